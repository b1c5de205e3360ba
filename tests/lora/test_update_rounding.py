"""Updates that are rounded before they are sent: over the rounds nothing is lost but the last rounding error."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsplit_flwr.errors import AggregationError, ConfigError
from hsplit_flwr.lora.delta_log import DeltaLog
from hsplit_flwr.lora.delta_update import DeltaReplica, DeltaUpdate
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.places import MEMORY, ScratchFolder, as_tensor
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.lora.update_rounding import UpdateRounding, best_factors, shortened, tensor_forms
from tests.helpers.states import through_disk

EXACT = 1e-6
"""of a sum over 30 rounds in float32, relative to one in float64"""
SHAPES = {"h.0.q": (48, 40), "h.0.up": (96, 40)}
CODINGS = {
    "bf16": UpdateCoding("bf16"),
    "rank 3": UpdateCoding(rank=3),
    "rank 3 in bf16": UpdateCoding("bf16", 3),
}
ROUNDS = 30
Sums = dict[str, Tensor]


def update(number: int, rank: int = 6) -> dict[str, LoraFactors]:
    """Of a round: in part as in all rounds, as training does; not every matrix in every round."""
    drift, new = (torch.Generator().manual_seed(seed) for seed in (0, number))
    made = {}
    for name, (d_out, d_in) in SHAPES.items():
        A = torch.randn(rank, d_in, generator=drift) + torch.randn(rank, d_in, generator=new)
        B = torch.randn(d_out, rank, generator=drift) + torch.randn(d_out, rank, generator=new)
        made[name] = LoraFactors(A, 1e-2 * B, 1.0)
    return {name: made[name] for name in list(SHAPES)[: 1 + number % 2]}


def product(factors: LoraFactors) -> Tensor:
    return factors.scaling * (factors.B.double() @ factors.A.double())


def norm(matrix: Tensor) -> float:
    return float(matrix.double().norm())


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("in_files", [False, True])
def test_what_was_sent_and_the_last_residual_are_the_exact_sum(coding: str, in_files: bool, tmp_path: Path) -> None:
    rounding = UpdateRounding(CODINGS[coding], ScratchFolder(tmp_path) if in_files else MEMORY)
    exact, sent = ({name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()} for _ in "ab")
    missing = []
    for number in range(ROUNDS):
        made = update(number)
        for name, factors in rounding.round(made).items():
            exact[name] += product(made[name])
            sent[name] += product(factors)
        residuals = {name: tensor.double() for name, tensor in rounding.state().items()}
        for name in made:
            assert norm(sent[name] + residuals[name] - exact[name]) <= EXACT * norm(exact[name]), (number, name)
        missing.append(norm(residuals["h.0.q"]) / norm(product(made["h.0.q"])))
    assert norm(sent["h.0.q"] - exact["h.0.q"]) > 100 * EXACT * norm(exact["h.0.q"])  # something was rounded
    assert max(missing[20:]) < 1.5 * max(missing[5:15])  # and does not pile up
    residuals = {name: as_tensor(residual) for name, residual in rounding.take_residuals().items()}
    assert residuals.keys() == SHAPES.keys()
    assert rounding.state() == {}


@pytest.mark.parametrize("coding", CODINGS)
def test_the_factors_are_what_the_coding_says(coding: str) -> None:
    rounding = UpdateRounding(CODINGS[coding])
    for number in range(3):
        for name, factors in rounding.round(update(number)).items():
            assert factors.rank == (CODINGS[coding].rank or 6)
            assert (factors.A.dtype, factors.B.dtype, factors.scaling) == (torch.float32, torch.float32, 1.0)
            tensors = {f"{name}|A": factors.A, f"{name}|B": factors.B}
            packed = shortened(tensors, CODINGS[coding])
            expected = torch.bfloat16 if CODINGS[coding].codec == "bf16" else torch.float32
            assert all(tensor.dtype == expected for tensor in packed.values())
            assert all(torch.equal(packed[key].float(), tensors[key]) for key in tensors)


def test_what_bf16_does_not_hold_travels_in_float32() -> None:
    tensors = {"dense": torch.tensor([[1.0, 1.0 + 2**-12]]), "place": torch.tensor([3.0, 0.1], dtype=torch.float64)}
    packed = shortened(tensors, UpdateCoding("bf16"))
    assert all(
        torch.equal(packed[key], tensor) and packed[key].dtype == tensor.dtype for key, tensor in tensors.items()
    )


def test_by_default_nothing_is_touched() -> None:
    rounding, made = UpdateRounding(), update(1)
    assert rounding.round(made) is made
    assert rounding.take_residuals() == {}


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_best_factors_are_those_of_the_truncated_svd(rank: int) -> None:
    """Of the update and a residual of full rank, as far as the update's own rows span them."""
    generator = torch.Generator().manual_seed(rank)
    factors = update(1)["h.0.up"]
    matrix = factors.delta() + 1e-3 * torch.randn(96, 40, generator=generator)
    A, B = best_factors(matrix, factors.A, rank)
    assert (A.shape, B.shape) == ((rank, 40), (96, rank))
    singular = torch.linalg.svdvals(matrix.double())
    best = float(singular[rank:].square().sum().sqrt())  # Eckart and Young, 1936
    assert best <= norm(matrix.double() - B.double() @ A.double()) <= best * (1 + 1e-4)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_client_has_what_the_server_has(coding: str) -> None:
    rounding, log, replica = UpdateRounding(CODINGS[coding]), DeltaLog(), DeltaReplica()
    for number in range(ROUNDS):
        log.append(rounding.round(update(number)))
        lacking = log.since(replica.version, SHAPES)
        tensors = shortened(lacking.to_tensors(), CODINGS[coding])
        received = DeltaUpdate.from_tensors(tensors, SHAPES, base=lacking.base, version=lacking.version)
        replica.apply(received, SHAPES)
        for name in replica.total.names():
            assert torch.equal(replica.total.dense(name), log.total.dense(name)), (number, name)


@pytest.mark.parametrize("coding", CODINGS)
def test_rounds_go_on_from_a_state_bit_for_bit(coding: str, tmp_path: Path) -> None:
    rounding = UpdateRounding(CODINGS[coding])
    for number in range(5):
        rounding.round(update(number))
    restored = UpdateRounding(CODINGS[coding])
    restored.load_state(through_disk(rounding.state(), tmp_path), SHAPES)
    for number in range(5, 9):
        for (name, ours), theirs in zip(
            restored.round(update(number)).items(), rounding.round(update(number)).values(), strict=True
        ):
            assert torch.equal(ours.A, theirs.A), name
            assert torch.equal(ours.B, theirs.B), name


def beside(in_files: Path | None, coding: UpdateCoding, rounds: int) -> tuple[UpdateRounding, DeltaLog, Sums]:
    """`rounds` rounds whose updates stand beside a quantised base, and the exact sums of them."""
    rounding, log = UpdateRounding(coding, ScratchFolder(in_files) if in_files else MEMORY), DeltaLog()
    exact = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for number in range(rounds):
        for name, factors in update(number).items():
            exact[name] += product(factors)
        added, replaced = rounding.bound(rounding.round(update(number)), log.total)
        log.append(added, None, replaced)
    return rounding, log, exact


@pytest.mark.parametrize("coding", [UpdateCoding(), UpdateCoding("bf16"), UpdateCoding(rank=3)], ids=str)
@pytest.mark.parametrize("in_files", [False, True])
def test_beside_a_quantised_base_the_rank_is_bounded_and_nothing_is_lost(
    coding: UpdateCoding, in_files: bool, tmp_path: Path
) -> None:
    bounded = replace(coding, total_rank=8)
    rounding, log, exact = beside(tmp_path if in_files else None, bounded, ROUNDS)
    squares = [0.0, 0.0]
    for name, residual in rounding.state().items():
        form = log.total.form(name)
        assert isinstance(form, LoraFactors)
        assert form.rank <= 8
        assert norm(product(form) + residual.double() - exact[name]) <= EXACT * norm(exact[name]), name
        squares[0] += norm(residual) ** 2
        squares[1] += norm(exact[name]) ** 2
    expected = math.sqrt(squares[0] / squares[1])
    assert 0.01 < expected < 1
    assert rounding.relative_error(log.total) == pytest.approx(expected, rel=1e-2 if coding.codec == "bf16" else 1e-5)


@pytest.mark.parametrize("rounds", [1, 2, ROUNDS])
def test_what_is_beside_are_the_best_factors_of_all_updates(rounds: int) -> None:
    """As long as they fit (two of rank 6), the updates themselves; then close to the truncated SVD of their sum."""
    rounding, log, exact = beside(None, UpdateCoding(total_rank=12), rounds)
    for name in log.total.names():
        found = norm(log.total.dense(name) - exact[name])
        singular = torch.linalg.svdvals(exact[name])
        best = float(singular[12:].square().sum().sqrt())
        assert best * (1 - EXACT) <= found + EXACT * norm(exact[name])
        assert found <= (best * 1.5 if rounds == ROUNDS else EXACT * norm(exact[name])), name
    assert (rounding.relative_error(log.total) == 0) == (rounds <= 2)


def test_a_client_beside_a_quantised_base_has_what_the_server_has(tmp_path: Path) -> None:
    """Also one that was away for some rounds, and one whose server was resumed."""
    rounding, log = UpdateRounding(UpdateCoding(total_rank=12)), DeltaLog()
    always, seldom = DeltaReplica(), DeltaReplica()
    kinds: set[str] = set()
    for number in range(9):
        added, replaced = rounding.bound(update(number), log.total)
        kinds |= {kind for kind, names in (("added", added), ("replaced", replaced.names())) if names}
        log.append(added, None, replaced)
        for replica in (always, seldom) if number % 3 == 0 else (always,):
            lacking = log.since(replica.version, SHAPES)
            tensors = lacking.to_tensors()
            received = DeltaUpdate.from_tensors(tensors, SHAPES, base=lacking.base, version=lacking.version)
            replica.apply(received, SHAPES)
            for name in log.total.names():
                assert torch.equal(replica.total.dense(name), log.total.dense(name)), (number, name)
        if number == 5:
            saved = through_disk({"log": log.state(), "residuals": rounding.state()}, tmp_path)
            log, rounding = DeltaLog(), UpdateRounding(UpdateCoding(total_rank=12))
            log.load_state(saved["log"], SHAPES)
            rounding.load_state(saved["residuals"], SHAPES)
    assert kinds == {"added", "replaced"}


def test_where_a_dense_matrix_takes_no_more_the_sum_is_exact() -> None:
    rounding, log, exact = beside(None, UpdateCoding(total_rank=40), ROUNDS)
    for name, expected in exact.items():
        assert isinstance(log.total.form(name), Tensor)
        assert norm(log.total.dense(name) - expected) <= EXACT * norm(expected)
    assert rounding.relative_error(log.total) == 0


def test_residuals_of_another_model_are_refused() -> None:
    with pytest.raises(AggregationError, match=r"residual of 'h\.0\.q' with the shape \(48, 40\), found \(4, 4\)"):
        UpdateRounding().load_state({"h.0.q": torch.zeros(4, 4)}, SHAPES)
    with pytest.raises(AggregationError, match="Expected a finite residual"):
        UpdateRounding().load_state({"h.0.q": torch.full((48, 40), torch.nan)}, SHAPES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"codec": "int8"}, "update_codec as one of"), ({"rank": -1}, "update_rank"), ({"rank": True}, "update_rank")],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpdateCoding(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("coding", "own"), itertools.product([UpdateCoding(), *CODINGS.values()], [0, 2, 6, 40]))
def test_the_tensors_of_an_update_are_foretold(coding: UpdateCoding, own: int) -> None:
    for rank in (6, 46):  # factors, and dense
        found = tensor_forms(coding, "h.0.q", SHAPES["h.0.q"], rank, min(own, rank))
        sent = rank if coding.exact else min(rank, 40, coding.rank or rank)
        if sent * 88 >= 48 * 40:
            assert found == {"replace|h.0.q|dense": ((48, 40), torch.float32)}
        elif coding.exact and own:
            rest = sent - min(own, rank)
            assert found.pop("own|h.0.q") == ((2,), torch.float64)
            assert [shape for shape, _ in found.values()] == ([(rest, 40), (48, rest)] if rest else [])
        else:
            dtype = torch.bfloat16 if coding.codec == "bf16" else torch.float32
            assert found == {"add|h.0.q|A": ((sent, 40), dtype), "add|h.0.q|B": ((48, sent), dtype)}
