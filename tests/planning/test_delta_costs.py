"""Predicted bytes of the weight delta against the files that real stores, models and checkpoints write."""

from pathlib import Path

import pytest
import torch

from hsplit_flwr.federation import checkpoint
from hsplit_flwr.federation.client_store import FileStore
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.lora.aggregation import StackedPart
from hsplit_flwr.lora.delta_update import DeltaUpdate, OwnFactors, OwnRound
from hsplit_flwr.lora.factors import LoraFactors, Shape, init_lora_A
from hsplit_flwr.lora.places import ScratchFolder
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import linear_shapes
from hsplit_flwr.planning.costs.delta_costs import DeltaCosts, update_ranks
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.costs.shapes import Matrix
from hsplit_flwr.training.workload import Workload
from tests.helpers.models import saved_llama

WIDTH, CUT, OWN, ROUNDS = 256, 2, 12, 6
PER_CENT = 0.01


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("model"), hidden_size=WIDTH, intermediate_size=4 * WIDTH)


@pytest.fixture
def served(model: Path, tmp_path: Path) -> GlobalModel:
    made = GlobalModel(ModelFiles.resolve(str(model)))
    (tmp_path / "server").mkdir()
    made.keep_delta_in(ScratchFolder(tmp_path / "server"))
    return made


@pytest.fixture(scope="module")
def costs(model: Path) -> DeltaCosts:
    return ModelCosts(ModelFiles.resolve(str(model)).config, Workload(batch_size=1, sequence_length=8)).deltas


def ranks_of(shapes: dict[str, Shape]) -> dict[str, int]:
    """Unequal ones: some matrices are dense after two rounds, some after four, some not within the test."""
    return {name: (20, 35, 60)[number % 3] for number, name in enumerate(shapes)}


def increment(shapes: dict[str, Shape], ranks: dict[str, int], seed: int) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            init_lora_A(ranks[name], d_in, seed), torch.randn(d_out, ranks[name], generator=generator), 1.0
        )
        for name, (d_out, d_in) in shapes.items()
        if ranks.get(name)
    }


def parts(increments: dict[str, LoraFactors], number: int) -> dict[str, list[StackedPart]]:
    return {name: [StackedPart("0", number, 0, OWN, 1.0)] for name in increments}


def own_part(increments: dict[str, LoraFactors], number: int) -> OwnFactors:
    own = {n: LoraFactors(f.A[:OWN].clone(), f.B[:, :OWN].clone(), 1.0) for n, f in increments.items()}
    return OwnFactors(number, own)


def take(served: GlobalModel, folder: Path, shapes: dict[str, Shape], own_round: int) -> tuple[int, set[bool]]:
    """As a client does at the start of a round; returns the most that was on its disk, and which forms there are."""
    own = OwnRound("0", own_round) if own_round else None
    with FileStore(folder).open("run", "0", shapes) as replica:
        have = replica.version or 0
        version, whole, tensors = served.since(have, CUT, own)
        update = DeltaUpdate.from_tensors(tensors, shapes, base=None if whole else have, version=version)
        replica.apply(update, shapes)
        most = bytes_in(folder) + sum(tensor.nbytes for tensor in tensors.values())
        return most, {replica.total.matrix(name).dense is None for name in replica.total.names()}


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_clients_files_take_what_was_predicted(served: GlobalModel, costs: DeltaCosts, tmp_path: Path) -> None:
    """After every round, with what it trained itself on top of it, and at the most in between."""
    store, folder = FileStore(tmp_path / "client"), tmp_path / "client"
    names = served.head_names(CUT)
    shapes = {name: shape for name, shape in linear_shapes(served.segment).items() if name in names}
    ranks, own_ranks = ranks_of(shapes), dict.fromkeys(shapes, OWN)
    forms = set()
    take(served, folder, shapes, own_round=0)  # of a round before which nothing had changed
    for number in range(1, ROUNDS + 1):
        changes = increment(shapes, ranks, number)
        served.apply(changes, parts(changes, number))
        store.keep_own("run", "0", own_part(changes, number))
        before, predicted = bytes_in(folder), costs.client_disk(CUT, ranks, own_ranks, number - 1)
        assert before == pytest.approx(predicted.delta, rel=PER_CENT), number
        most, kinds = take(served, folder, shapes, own_round=number)
        forms |= kinds
        assert most <= predicted.total_bytes
        assert most > 0.9 * predicted.total_bytes
        kept = bytes_in(folder)
        assert kept == pytest.approx(costs.client_disk(CUT, ranks, {}, number).delta, rel=PER_CENT), number
    assert forms == {True, False}


@pytest.mark.parametrize("coding", [UpdateCoding(), UpdateCoding("bf16")], ids=["exact", "rounded"])
def test_the_servers_files_and_checkpoints_take_what_was_predicted(
    served: GlobalModel, costs: DeltaCosts, tmp_path: Path, coding: UpdateCoding
) -> None:
    served.send_updates_by(coding)
    shapes = linear_shapes(served.segment)
    ranks = ranks_of(shapes)
    for number in range(1, ROUNDS + 1):
        changes = increment(shapes, ranks, number)
        served.apply_update(changes, parts(changes, number))
        predicted = costs.server_disk(ranks, {}, number, keep_checkpoints=2, carries_rest=not coding.exact)
        assert bytes_in(tmp_path / "server") == pytest.approx(predicted.delta, rel=PER_CENT), number
        written = checkpoint.save(tmp_path / "run", number, {}, {"model": served.state()}, keep=2)
        assert bytes_in(written) == pytest.approx(predicted.checkpoints / 3, rel=PER_CENT), number


def test_a_rounds_update_has_the_ranks_of_all_who_train_a_matrix() -> None:
    """The tail's where a client's head ends before it; nothing where the tail alone trains."""
    model = [("block.0", 0), ("block.1", 1), ("block.2", 2)]
    matrices = [Matrix(name, block, 8, 8) for name, block in model]
    heads = [(1, {"block.0": 4}), (2, {"block.0": 2, "block.1": 8})]
    assert update_ranks(heads, {"block.1": 3, "block.2": 5}, matrices) == {"block.0": 6, "block.1": 11}


def test_memory_is_a_rounds_factors_and_a_matrix_however_many_rounds(costs: DeltaCosts, model: Path) -> None:
    shapes = linear_shapes(GlobalModel(ModelFiles.resolve(str(model))).segment)
    of_rank = [costs.server_merging(dict.fromkeys(shapes, rank)) for rank in (1, 2, 3)]
    sides = 4 * sum(map(sum, shapes.values()))
    assert of_rank[1] - of_rank[0] == of_rank[2] - of_rank[1] == sides
    assert of_rank[0] - sides < 4 * 4 * 4 * WIDTH * WIDTH
    assert costs.client_loading(CUT, dict.fromkeys(shapes, 1)) < of_rank[0]
