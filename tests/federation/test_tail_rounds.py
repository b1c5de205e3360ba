"""The tail from round to round: what is kept trains on as if there were no rounds, and is merged when it must be."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from hsplit_flwr.common.seeds import derive_seed, head_seed, tail_seed
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.tail_rounds import TailRounds
from hsplit_flwr.lora.aggregation import Contribution
from hsplit_flwr.lora.factors import LoraFactors, init_lora_A
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import block_of, linear_shapes, segment_from_model
from hsplit_flwr.planning.configured_plans import ConfiguredPlans
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.head import train_head
from tests.helpers.federation import random_batches
from tests.helpers.models import tiny_model
from tests.helpers.states import through_disk

STEPS, ROUNDS = 4, 3
TOLERANCE = 1e-5
"""largest absolute difference of fp32 values after 12 AdamW steps"""
SAME = 1e-6
"""largest absolute difference where only the form of a sum changes"""
LORA = LoraSpec(4, 8.0)
TRAINING = TrainingConfig(ROUNDS, STEPS, 5e-3, warmup_steps=3, max_grad_norm=0.0)
BATCHES = random_batches(STEPS * ROUNDS, seed=4)
Weights = dict[str, Tensor]


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> GlobalModel:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return GlobalModel(ModelFiles.resolve(str(folder)))


def rounds_of(model: GlobalModel, plans: ClientPlan | Mapping[str, ClientPlan]) -> TailRounds:
    book = ConfiguredPlans(plans, LORA, None, linear_shapes(model.segment))
    return TailRounds(model, book, TRAINING)


def play_round(rounds: TailRounds, model: GlobalModel, number: int, cut: int) -> None:
    """One client, in this process."""
    head = segment_from_model(model.segment.model, 0, cut)
    adapters = SegmentAdapters(head, LORA, head.linear_modules())
    adapters.reset(head_seed(0, number, "0", False))
    rounds.open(number, ["0"], 1)
    first = (number - 1) * STEPS
    session = rounds.tail.join("0", cut, first)
    train_head(head, adapters, BATCHES[first : first + STEPS], session, TRAINING, first)
    session.close()
    rounds.tail.close_training()
    rounds.merge([Contribution(1.0, cut, adapters.factors())], rounds.tail.adapters.factors(), "noise_free")


def whole_weights(model: GlobalModel, rounds: TailRounds) -> Weights:
    """Of every linear layer, with what is not merged yet."""
    layers = model.segment.linear_modules()
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}  # type: ignore[operator]
    for name, pair in rounds.unmerged().items():
        weights[name] += pair.delta()
    return weights


class WithoutRounds:
    """PEFT's whole model and one AdamW. After every round the head's adapters are merged and start afresh."""

    def __init__(self, cut: int) -> None:
        names = [n for n, layer in tiny_model("llama").named_modules() if n.split(".")[-1].endswith("_proj")]
        config = peft.LoraConfig(r=LORA.r, lora_alpha=8, target_modules=names)
        self.model = peft.get_peft_model(tiny_model("llama"), config)
        self.layers = {name: self.model.base_model.model.get_submodule(name) for name in names}
        self.heads = {name for name in names if int(name.split(".")[2]) < cut}
        for name in self.layers:
            self._restart(name, 1)
        factors = [factor for layer in self.layers.values() for factor in self._pair(layer)]
        self.adamw = torch.optim.AdamW(factors, lr=1.0, weight_decay=0.0)

    def round(self, number: int) -> None:
        for step in range((number - 1) * STEPS, number * STEPS):
            self.adamw.zero_grad()
            self.model(**BATCHES[step]).loss.backward()
            self.adamw.param_groups[0]["lr"] = TRAINING.learning_rate_at(step)
            self.adamw.step()
        for name in self.heads:
            layer = self.layers[name]
            A, B = self._pair(layer)
            layer.base_layer.weight.data += 2.0 * (B @ A).detach()
            self._restart(name, number + 1)
            for factor in (A, B):
                del self.adamw.state[factor]

    def weights(self) -> Weights:
        return {
            name: (layer.base_layer.weight + 2.0 * self._pair(layer)[1] @ self._pair(layer)[0]).detach()
            for name, layer in self.layers.items()
        }

    def _restart(self, name: str, number: int) -> None:
        A, B = self._pair(self.layers[name])
        seed = head_seed(0, number, "0", False) if name in self.heads else tail_seed(0, number)
        A.data.copy_(init_lora_A(A.shape[0], A.shape[1], derive_seed(seed, name)))
        B.data.zero_()

    @staticmethod
    def _pair(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index, union-attr]


@pytest.mark.parametrize("replanned", [False, True], ids=["", "with a new plan that is the old one"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_tail_trains_on_as_if_there_were_no_rounds(model: GlobalModel, cut: int, replanned: bool) -> None:
    rounds, reference = rounds_of(model, ClientPlan(cut, LORA)), WithoutRounds(cut)
    start = reference.weights()
    for number in range(1, ROUNDS + 1):
        play_round(rounds, model, number, cut)
        if replanned:
            rounds.replan()
        reference.round(number)
        expected = reference.weights()
        found = whole_weights(model, rounds)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert (found[name] - weight).abs().max() <= TOLERANCE, (number, name)
            assert (weight - start[name]).abs().max() > 100 * TOLERANCE
        assert set(rounds.unmerged()) == {name for name in expected if block_of(name) >= cut}


def test_what_some_plan_gives_to_a_head_is_merged_though_its_client_is_away(model: GlobalModel) -> None:
    """The client with three blocks may come in any round, and lacks then what the tail trained of them."""
    rounds = rounds_of(model, {"0": ClientPlan(1, LORA), "away": ClientPlan(3, LORA)})
    play_round(rounds, model, 1, 1)
    assert {block_of(name) for name in rounds.unmerged()} == {3}
    assert {block_of(name) for name in model.log.total.names()} == {0, 1, 2}
    idle = {name: pair for name, pair in rounds.tail.adapters.factors().items() if block_of(name) < 3}
    assert not any(pair.B.any() for pair in idle.values())


def deeper_head(book: ConfiguredPlans) -> None:
    book.plans = ClientPlan(3, LORA)


def other_rank(book: ConfiguredPlans) -> None:
    book.tail_lora = LoraSpec(4, 8.0, rank_pattern={r"layers\.2\..*": 2})


def other_scaling(book: ConfiguredPlans) -> None:
    book.tail_lora = LoraSpec(4, 8.0, alpha_pattern={r"layers\.2\..*": 3.0})


@pytest.mark.parametrize("change", [deeper_head, other_rank, other_scaling])
def test_a_new_plan_merges_what_cannot_go_on(model: GlobalModel, change: Callable[[ConfiguredPlans], None]) -> None:
    """Block 2 goes to a head, or gets another rank or scaling; block 3 goes on."""
    book = ConfiguredPlans(ClientPlan(2, LORA), LORA, None, linear_shapes(model.segment))
    rounds = TailRounds(model, book, TRAINING)
    play_round(rounds, model, 1, 2)
    before, kept = whole_weights(model, rounds), rounds.unmerged()
    assert {block_of(name) for name in kept} == {2, 3}
    change(book)
    rounds.replan()
    assert {block_of(name) for name in rounds.unmerged()} == {3}
    for name, pair in rounds.unmerged().items():
        assert torch.equal(pair.A, kept[name].A)
        assert torch.equal(pair.B, kept[name].B)
    for name, weight in whole_weights(model, rounds).items():
        assert (weight - before[name]).abs().max() <= SAME, name
    for name, pair in rounds.tail.adapters.factors().items():
        assert pair.B.any() == (block_of(name) == 3), name
        assert pair.rank == book.tail_lora.rank(name)
    play_round(rounds, model, 2, book.deepest_cut)
    assert {block_of(name) for name in rounds.unmerged()} == ({3} if change is deeper_head else {2, 3})


def test_merging_what_remains_changes_the_form_alone(model: GlobalModel) -> None:
    rounds = rounds_of(model, ClientPlan(2, LORA))
    play_round(rounds, model, 1, 2)
    before = whole_weights(model, rounds)
    assert all(pair.B.any() for pair in rounds.unmerged().values())
    rounds.merge_remaining()
    assert not rounds.unmerged()
    assert not any(pair.B.any() for pair in rounds.tail.adapters.factors().values())
    tail_layers = rounds.tail.segment.linear_modules()
    for name, weight in whole_weights(model, rounds).items():
        assert (weight - before[name]).abs().max() <= SAME, name
        assert torch.equal(tail_layers[name].weight, weight), name  # type: ignore[arg-type]
    play_round(rounds, model, 2, 2)  # the new adapters train
    assert all(pair.B.any() for pair in rounds.unmerged().values())


def test_a_round_that_nobody_finished_is_forgotten(model: GlobalModel) -> None:
    """Also by what goes on, from the rounds before it."""
    rounds = rounds_of(model, ClientPlan(1, LORA))
    play_round(rounds, model, 1, 1)
    before, kept = whole_weights(model, rounds), rounds.unmerged()
    rounds.open(2, ["0"], 1)
    session = rounds.tail.join("0", 1, STEPS)
    batch = BATCHES[STEPS]
    hidden = segment_from_model(model.segment.model, 0, 1)(batch["input_ids"], batch["attention_mask"])
    session.train_step(0, hidden.detach(), batch["attention_mask"], batch["labels"])
    session.close()
    rounds.tail.close_training()
    assert any(not torch.equal(pair.B, kept[name].B) for name, pair in rounds.unmerged().items())
    rounds.tail.undo_training()
    after: dict[str, LoraFactors] = rounds.unmerged()
    assert all(torch.equal(after[name].A, pair.A) and torch.equal(after[name].B, pair.B) for name, pair in kept.items())
    for name, weight in whole_weights(model, rounds).items():
        assert torch.equal(weight, before[name]), name
    play_round(rounds, model, 2, 1)


# ------------------------------------------------------------------------------------------- one model, two segments


def parameters(model: nn.Module) -> dict[str, int]:
    """Where each frozen tensor lies."""
    return {
        name.replace(".base_layer.", "."): parameter.data_ptr()
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def test_the_tail_has_no_memory_of_its_own_and_the_model_no_adapters(model: GlobalModel) -> None:
    """Before training, after every merge, after a new plan, after a state was loaded, at the end."""
    rounds = rounds_of(model, ClientPlan(2, LORA))

    def check() -> None:
        plain = model.segment.model
        assert not [name for name, _ in plain.named_modules() if "lora" in name or "base_layer" in name]
        assert not hasattr(plain, "peft_config")
        assert parameters(rounds.tail.segment.model) == parameters(plain)
        assert rounds.tail.segment is not model.segment

    check()
    for number in (1, 2):
        play_round(rounds, model, number, 2)
        check()
    rounds.replan()
    check()
    rounds.load_state(rounds.state())
    check()
    rounds.merge_remaining()
    check()


def transformers_loss(model: GlobalModel, rounds: TailRounds, batch: Mapping[str, Tensor]) -> float:
    """transformers' own model and loss, with dense weights that hold all that was learnt."""
    reference = copy.deepcopy(tiny_model("llama"))
    for name, weight in whole_weights(model, rounds).items():
        reference.get_submodule(name).weight.data.copy_(weight)
    with torch.no_grad():
        return float(reference(**batch).loss)


def test_the_score_counts_what_is_not_merged_yet(model: GlobalModel) -> None:
    rounds = rounds_of(model, ClientPlan(2, LORA))
    batch = random_batches(1, seed=9)[0]
    start = rounds.score([batch])
    assert start == model.score([batch])
    for number in (1, 2):
        play_round(rounds, model, number, 2)
        found = rounds.score([batch])
        assert found.loss == pytest.approx(transformers_loss(model, rounds, batch), rel=TOLERANCE)
        assert abs(found.loss - model.score([batch]).loss) > 100 * TOLERANCE  # the merged weights alone lack something
        with torch.no_grad():
            assert float(rounds.evaluated_model()(**batch).loss) == pytest.approx(found.loss, rel=TOLERANCE)
    unmerged = rounds.score([batch])
    rounds.merge_remaining()
    assert rounds.score([batch]).loss == pytest.approx(unmerged.loss, rel=TOLERANCE)
    assert rounds.score([batch]) == model.score([batch])


def test_the_evaluated_model_generates_as_the_model_does(model: GlobalModel) -> None:
    model.segment.model.generation_config.repetition_penalty = 1.25
    rounds = rounds_of(model, ClientPlan(2, LORA))
    assert rounds.evaluated_model().generation_config.repetition_penalty == 1.25
    ids = torch.tensor([[5, 6, 7]])
    plain = model.segment.model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(rounds.evaluated_model().generate(ids, max_new_tokens=5, do_sample=False), plain)


# ------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("done", [1, 2])
def test_rounds_go_on_from_their_state_bit_for_bit(model: GlobalModel, tmp_path: Path, done: int) -> None:
    """Through JSON and safetensors, into a model and a tail of their own."""
    rounds = rounds_of(model, ClientPlan(2, LORA))
    for number in range(1, 1 + done):
        play_round(rounds, model, number, 2)
    saved = through_disk({"model": model.state(), "rounds": rounds.state()}, tmp_path)
    restored = GlobalModel(model.files)
    restored.load_state(saved["model"])
    again = rounds_of(restored, ClientPlan(2, LORA))
    again.load_state(saved["rounds"])
    batch = random_batches(1, seed=9)[0]
    assert again.score([batch]) == rounds.score([batch])
    for number in range(1 + done, 4):
        play_round(rounds, model, number, 2)
        play_round(again, restored, number, 2)
        expected, found = whole_weights(model, rounds), whole_weights(restored, again)
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
        assert again.score([batch]) == rounds.score([batch])
    for have in (0, *range(done, 4)):  # a client that is new, or lags since then, is sent the same
        version, whole, tensors = model.since(have, 2)
        assert restored.since(have, 2)[:2] == (version, whole)
        assert restored.since(have, 2)[2].keys() == tensors.keys()
        assert all(torch.equal(restored.since(have, 2)[2][key], tensor) for key, tensor in tensors.items())


def test_a_state_under_other_plans_is_refused(model: GlobalModel) -> None:
    saved = rounds_of(model, ClientPlan(2, LORA)).state()
    book = ConfiguredPlans(ClientPlan(2, LORA), LoraSpec(2, 4.0), None, linear_shapes(model.segment))
    with pytest.raises(ConfigError, match=r"Expected the state of adapters .*Resume with the plans"):
        TailRounds(model, book, TRAINING).load_state(saved)


def test_a_state_is_not_loaded_into_a_model_that_has_changed(model: GlobalModel) -> None:
    rounds = rounds_of(model, ClientPlan(2, LORA))
    play_round(rounds, model, 1, 2)
    with pytest.raises(ConfigError, match=r"Expected a model at version 0 .*found version 1"):
        model.load_state(model.state())
