"""A step of the tail without threads, against PEFT on the whole transformers model and torch's AdamW."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.errors import ConfigError, ExchangeError, UnsupportedModelError
from hsplit_flwr.lora.factors import init_lora_A
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import segment_from_model
from hsplit_flwr.training import tail_step
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.importance import ImportanceProbe
from hsplit_flwr.training.optimizer import Optimizer
from hsplit_flwr.training.step import StepRequest, TrainedBatch, step_report
from hsplit_flwr.training.tail_step import TailTrainer
from tests.helpers.models import tiny_model
from tests.helpers.replies import gradient_of
from tests.helpers.states import through_disk

TOLERANCE = 1e-5
"""largest absolute difference of fp32 values to PEFT after a few AdamW steps"""
RELATIVE = 1e-5
"""of importance, per matrix"""
SEED = 3
LORA = LoraSpec(r=4, lora_alpha=8)
SCALING = 2.0
CONFIG = TrainingConfig(1, 2, 1e-2, warmup_steps=0, max_grad_norm=0.0, importance_rows=2)
CUTS = {"a": 1, "b": 3, "c": 1, "d": 1}
LENGTHS = {"a": 10, "b": 10, "c": 10, "d": 8}
PROMPTS = {"a": 3, "b": 7, "c": 2, "d": 3}
"""positions without loss: unequal token counts"""
Batch = dict[str, Tensor]
Adapters = dict[str, tuple[nn.Parameter, nn.Parameter]]


def batch_of(client: str, step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + ord(client))
    ids = torch.randint(3, 90, (3, LENGTHS[client]), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    mask[1, :2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : PROMPTS[client]] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@cache
def activations_of(client: str, step: int, architecture: str) -> Tensor:
    """What a head that trains nothing sends."""
    batch = batch_of(client, step)
    head = segment_from_model(tiny_model(architecture), 0, CUTS[client])
    with torch.no_grad():
        return head(batch["input_ids"], batch["attention_mask"])  # type: ignore[no-any-return]


def request_of(client: str, step: int = 0, architecture: str = "llama", **changes: Any) -> StepRequest:
    batch = batch_of(client, step)
    sent = StepRequest(
        client=client,
        cut=CUTS[client],
        run_step=step,
        activations=activations_of(client, step, architecture),
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    )
    return replace(sent, **changes)


def block(name: str) -> int:
    return int(name.split(".")[2])


def trainer_of(config: TrainingConfig = CONFIG, architecture: str = "llama", lora: LoraSpec = LORA) -> TailTrainer:
    segment = segment_from_model(tiny_model(architecture))
    names = [name for name in segment.linear_modules() if block(name) >= 1]
    trainer = TailTrainer(segment, SegmentAdapters(segment, lora, names), config)
    trainer.open_round(SEED)
    return trainer


def take(trainer: TailTrainer, *requests: StepRequest) -> list[TrainedBatch]:
    """A step with its further passes, as the shared tail takes it."""
    turns = [list(requests)] if trainer.config.joint_steps else [[request] for request in requests]
    done = [trainer.train(turn, ends_step=turn is turns[-1]) for turn in turns]
    trainer.train_again([(batch.requests, batch is done[-1]) for batch in done if batch.requests])
    return done


def tensors(trainer: TailTrainer) -> dict[str, Tensor]:
    """Everything that a step changes, by name."""
    flat = {f"{n}.{k}": f[k] for n, f in trainer.state()["adapters"].items() for k in ("A", "B")}
    for index, saved in trainer.state()["optimizer"]["parameters"].items():
        flat |= {f"{index}.{key}": torch.as_tensor(value) for key, value in saved["values"].items()}
    return flat


def assert_same(found: TailTrainer, expected: TailTrainer) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


# ------------------------------------------------------------------------------------------- the reference: PEFT


@dataclass
class Reference:
    """PEFT's whole model; for a client with a cut, the adapters before it are switched off."""

    model: Any
    layers: dict[str, Any]
    adapters: Adapters
    adamw: torch.optim.AdamW

    def backward(self, client: str, step: int, weight: float) -> tuple[float, Tensor]:
        """A client's mean loss and its gradient at the activations; `weight` times it is added to the adapters'."""
        for name, layer in self.layers.items():
            held = block(name) >= CUTS[client]
            layer.scaling["default"] = SCALING if held else 0.0
            for factor in self.adapters[name]:
                factor.requires_grad_(held)
        entered: list[Tensor] = []

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            entered.append(inputs[0].requires_grad_())
            return inputs

        hook = self.model.base_model.model.model.layers[CUTS[client]].register_forward_pre_hook(note)
        loss = self.model(**batch_of(client, step)).loss
        hook.remove()
        (loss * weight).backward()
        assert entered[0].grad is not None
        return loss.item(), entered[0].grad / weight


def reference_of() -> Reference:
    names = [n for n, layer in tiny_model("llama").named_modules() if n.endswith("_proj") and block(n) >= 1]
    config = peft.LoraConfig(r=LORA.r, lora_alpha=8, target_modules=names)
    model = peft.get_peft_model(tiny_model("llama"), config)
    layers = {name: model.base_model.model.get_submodule(name) for name in names}
    adapters = {n: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for n, layer in layers.items()}
    for name, (A, B) in adapters.items():
        A.data.copy_(init_lora_A(A.shape[0], A.shape[1], derive_seed(SEED, name)))
        B.data.zero_()
    factors = [factor for pair in adapters.values() for factor in pair]
    return Reference(model, layers, adapters, torch.optim.AdamW(factors, lr=1.0, weight_decay=0.0))


def tokens_of(client: str, step: int) -> int:
    return int((batch_of(client, step)["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("joint", [False, True], ids=["one-by-one", "joint"])
def test_steps_of_unequal_clients_equal_peft(joint: bool, passes: int) -> None:
    """Two steps; a gradient per client is of its own mean loss, at the tail that it meets in the first pass."""
    trainer = trainer_of(replace(CONFIG, joint_steps=joint, tail_passes=passes))
    reference = reference_of()
    for step in range(2):
        done = take(trainer, *(request_of(client, step) for client in CUTS))
        replies = {client: reply for batch in done for client, reply in batch.replies.items()}
        tokens = {client: tokens_of(client, step) for client in CUTS}
        assert {client: reply.tokens for client, reply in replies.items()} == tokens
        assert len(set(tokens.values())) > 2
        losses = {}
        for number in range(passes):
            for together in [list(CUTS)] if joint else [[client] for client in CUTS]:
                reference.adamw.zero_grad()
                total = sum(tokens[client] for client in together)
                for client in together:
                    loss, gradient = reference.backward(client, step, tokens[client] / total)
                    if number == 0:
                        losses[client] = loss
                        torch.testing.assert_close(replies[client].gradient, gradient, atol=TOLERANCE, rtol=0)
                reference.adamw.param_groups[0]["lr"] = CONFIG.learning_rate_at(step)
                reference.adamw.step()
        assert {c: r.loss for c, r in replies.items()} == pytest.approx(losses, abs=TOLERANCE)
        report = step_report(done, 7)
        mean = sum(losses[client] * tokens[client] for client in CUTS) / sum(tokens.values())
        assert (report.step, set(report.clients), report.tokens) == (step, set(CUTS), sum(tokens.values()))
        assert report.loss == pytest.approx(mean, abs=TOLERANCE)
        assert report.round_clients == 7
    found = trainer.adapters.factors()
    assert found.keys() == reference.adapters.keys()
    for name, (A, B) in reference.adapters.items():
        torch.testing.assert_close(found[name].A, A.detach(), atol=TOLERANCE, rtol=0, msg=name)
        torch.testing.assert_close(found[name].B, B.detach(), atol=TOLERANCE, rtol=0, msg=name)
        assert B.detach().abs().max() > 100 * TOLERANCE


@contextmanager
def passes_seen(trainer: TailTrainer) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the activations of every pass through the tail."""
    seen: list[tuple[int, ...]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(tuple(inputs[0].shape))

    hook = trainer.segment.register_forward_pre_hook(note)
    yield seen
    hook.remove()


def test_a_joint_step_is_one_pass_per_cut_and_length() -> None:
    trainer = trainer_of(replace(CONFIG, joint_steps=True))
    with passes_seen(trainer) as seen:
        take(trainer, *(request_of(client) for client in CUTS))
    assert sorted((rows, length) for rows, length, _ in seen) == [(3, 8), (3, 10), (6, 10)]


def test_one_by_one_is_a_pass_and_a_time_per_client() -> None:
    trainer = trainer_of()
    with passes_seen(trainer) as seen:
        done = take(trainer, *(request_of(client) for client in CUTS))
    assert [shape[:2] for shape in seen] == [(3, 10), (3, 10), (3, 10), (3, 8)]
    answered = step_report(done, 4).answered_s
    assert len(answered) == 4
    assert list(answered) == sorted(answered)
    assert answered[-1] == pytest.approx(sum(batch.seconds for batch in done))


@pytest.mark.parametrize("measured", [False, True], ids=["", "measured"])
@pytest.mark.parametrize("joint", [False, True], ids=["one-by-one", "joint"])
def test_gradients_that_nobody_wants_are_not_computed(joint: bool, measured: bool) -> None:
    """Not even the further passes' own, before; what the tail learns and measures does not depend on it."""
    config = replace(CONFIG, joint_steps=joint, tail_passes=2)
    trainer, all_sent = trainer_of(config), trainer_of(config)
    wanting = {"a": False, "b": False, "c": True, "d": False}
    differentiated: list[bool] = []
    hook = trainer.segment.register_forward_pre_hook(lambda _, inputs: differentiated.append(inputs[0].requires_grad))
    found = take(trainer, *(request_of(c, wants_gradient=wants, measured=measured) for c, wants in wanting.items()))
    hook.remove()
    expected = take(all_sent, *(request_of(client, measured=measured) for client in wanting))
    passes = [["d"], ["a", "c"], ["b"]] if joint else [["a"], ["b"], ["c"], ["d"]]
    assert differentiated == [measured or "c" in together for together in passes] + [False] * len(passes)
    replies = {client: reply for batch in found for client, reply in batch.replies.items()}
    for client, reply in {c: r for batch in expected for c, r in batch.replies.items()}.items():
        assert (replies[client].loss, replies[client].tokens) == (reply.loss, reply.tokens)
        assert (replies[client].gradient is not None) == wanting[client]
    assert_same(trainer, all_sent)
    assert trainer.importance() == all_sent.importance()
    assert bool(trainer.importance()) == measured


def test_a_tail_that_trains_nothing_answers_heads_that_do_not_either() -> None:
    trainer, untouched = trainer_of(lora=LoraSpec(r=0)), trainer_of(lora=LoraSpec(r=0))
    (batch,) = take(trainer, request_of("a", wants_gradient=False))
    assert (batch.refused, batch.replies["a"].gradient) == ({}, None)
    assert batch.replies["a"].loss > 0
    assert_same(trainer, untouched)


def test_a_batch_without_targets_moves_nothing() -> None:
    trainer, untouched = trainer_of(), trainer_of()
    request = request_of("a")
    (batch,) = take(trainer, replace(request, labels=torch.full_like(request.labels, -100)))
    assert batch.replies["a"].tokens == batch.tokens == 0
    assert not gradient_of(batch.replies["a"]).any()
    assert_same(trainer, untouched)


# ------------------------------------------------------------------------------------------- poison


def poison(value: float = 1e30) -> StepRequest:
    request = request_of("b", architecture="gpt2", measured=True)
    return replace(request, activations=torch.full_like(request.activations, value))


@pytest.mark.parametrize("joint", [False, True], ids=["one-by-one", "joint"])
def test_poison_is_refused_and_the_step_is_as_if_it_had_not_asked(joint: bool) -> None:
    config = replace(CONFIG, joint_steps=joint, tail_passes=2)
    trainer, alone = trainer_of(config, "gpt2"), trainer_of(config, "gpt2")
    good = [request_of(client, architecture="gpt2", measured=True) for client in ("a", "c")]
    done = take(trainer, good[0], poison(), good[1])
    expected = take(alone, *good)
    refused = {client: error for batch in done for client, error in batch.refused.items()}
    assert list(refused) == ["b"]
    assert isinstance(refused["b"], ExchangeError)
    assert refused["b"].code == "non_finite"
    assert_same(trainer, alone)
    assert trainer.importance() == alone.importance()
    assert trainer.importance().keys() == {"a", "c"}
    found = {c: r for batch in done for c, r in batch.replies.items()}
    for client, reply in {c: r for batch in expected for c, r in batch.replies.items()}.items():
        assert torch.equal(gradient_of(found[client]), gradient_of(reply))
        assert (found[client].loss, found[client].tokens) == (reply.loss, reply.tokens)


def test_a_step_of_poison_alone_moves_nothing() -> None:
    trainer, untouched = trainer_of(architecture="gpt2"), trainer_of(architecture="gpt2")
    (batch,) = take(trainer, poison())
    assert (batch.requests, batch.replies, list(batch.refused)) == ([], {}, ["b"])
    assert_same(trainer, untouched)
    assert trainer.importance() == {}


def failing(monkeypatch: pytest.MonkeyPatch, fails: Any) -> None:
    """Where `fails(group)`, the pass runs out of memory."""
    accumulate = TailTrainer._accumulate

    def out_of_memory(trainer: TailTrainer, group: list[StepRequest], total: int) -> Any:
        if fails(group):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return accumulate(trainer, group, total)

    monkeypatch.setattr(TailTrainer, "_accumulate", out_of_memory)


def test_clients_that_fit_alone_but_not_together_are_all_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda group: len(group) > 1)
    trainer, untouched = trainer_of(replace(CONFIG, joint_steps=True)), trainer_of()
    (batch,) = take(trainer, request_of("a"), request_of("c"))
    assert batch.refused.keys() == {"a", "c"}
    assert_same(trainer, untouched)


def test_an_optimizer_that_fails_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have moved some adapters already: taken again, the step would train twice on one batch."""
    calls: list[int] = []

    def broken(_: Any, run_step: int) -> None:
        calls.append(run_step)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(Optimizer, "step", broken)
    (batch,) = take(trainer_of(replace(CONFIG, joint_steps=True)), request_of("a", 1), request_of("c", 1))
    assert calls == [1]
    assert batch.refused.keys() == {"a", "c"}
    assert not batch.requests


# ------------------------------------------------------------------------------------------- further passes


@pytest.mark.parametrize(
    "error",
    [RuntimeError("cuDNN error"), torch.OutOfMemoryError("CUDA out of memory"), ExchangeError("x", "y")],
    ids=repr,
)
def test_a_further_pass_that_fails_is_left_out_and_said_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second of three passes fails in both steps: each step is the first pass alone."""
    trainer, once = trainer_of(replace(CONFIG, tail_passes=3)), trainer_of()
    accumulate, calls = TailTrainer._accumulate, []

    def second_fails(self: TailTrainer, group: list[StepRequest], total: int) -> Any:
        calls.append(self)
        if self is trainer and calls.count(trainer) % 2 == 0:
            raise error
        return accumulate(self, group, total)

    monkeypatch.setattr(TailTrainer, "_accumulate", second_fails)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            done = take(trainer, request_of("a", step))
            assert done[0].replies.keys() == {"a"}
            take(once, request_of("a", step))
        assert_same(trainer, once)
        assert caplog.text.count("the tail leaves out further passes of this step: ") == 1
        assert str(error) in caplog.text
        trainer.close_round()
    assert "the tail leaves out further passes of this step: 2 times in all" in caplog.text


def test_further_passes_that_are_interrupted_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(replace(CONFIG, tail_passes=2))
    (batch,) = [trainer.train([request_of("a")])]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TailTrainer, "_accumulate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_again([(batch.requests, True)])


# ------------------------------------------------------------------------------------------- importance


def full_gradient(client: str) -> dict[str, float]:
    """transformers' model and loss on the client's first rows, autograd's own gradient, without adapters."""
    model = tiny_model("llama").requires_grad_(False)
    layers = {n: m for n, m in model.named_modules() if n.endswith("_proj") and block(n) >= CUTS[client]}
    for layer in layers.values():
        layer.weight.requires_grad_()
    model(**{key: tensor[: CONFIG.importance_rows] for key, tensor in batch_of(client).items()}).loss.backward()
    return {n: float((m.weight * m.weight.grad).detach().abs().sum()) / sum(m.weight.shape) for n, m in layers.items()}


def test_importance_is_of_each_clients_rows_apart() -> None:
    trainer = trainer_of(replace(CONFIG, joint_steps=True))
    take(trainer, *(request_of(client, measured=client != "c") for client in CUTS))
    found = trainer.importance()
    assert found.keys() == {"a", "b", "d"}
    for client, measured in found.items():
        assert measured == pytest.approx(full_gradient(client), rel=RELATIVE), client


@pytest.mark.parametrize("joint", [False, True], ids=["one-by-one", "joint"])
def test_importance_that_cannot_be_measured_costs_nobody_the_step(
    joint: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is what it is without measuring; what is missing is said once, and shows as missing, not as 0."""
    config = replace(CONFIG, joint_steps=joint)
    trainer, unmeasured = trainer_of(config), trainer_of(config)
    take(unmeasured, *(request_of(client) for client in CUTS))

    class Broken(ImportanceProbe):
        def values(self) -> list[dict[str, float]]:
            if self._samples:
                raise UnsupportedModelError("Expected rows, found none. Set importance_steps to 0.")
            return super().values()

    monkeypatch.setattr(tail_step, "ImportanceProbe", Broken)
    done = take(trainer, *(request_of(client, measured=True) for client in CUTS))
    assert not any(batch.refused for batch in done)
    assert_same(trainer, unmeasured)
    assert trainer.importance() == {}
    assert caplog.text.count("does not measure importance in this step: Expected rows, found none. Set importance") == 1


def test_measuring_that_does_not_fit_for_all_is_left_out_for_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, lambda group: len(group) > 1 and any(request.measured for request in group))
    config = replace(CONFIG, joint_steps=True)
    trainer, unmeasured = trainer_of(config), trainer_of(config)
    (batch,) = take(trainer, request_of("a", measured=True), request_of("c", measured=True))
    take(unmeasured, request_of("a"), request_of("c"))
    assert batch.replies.keys() == {"a", "c"}
    assert_same(trainer, unmeasured)
    assert "does not measure importance in this step: OutOfMemoryError: CUDA out of memory" in caplog.text


# ------------------------------------------------------------------------------------------- rounds and state


def test_kept_modules_go_on_and_the_others_restart() -> None:
    trainer = trainer_of()
    take(trainer, request_of("a"))
    before = trainer.adapters.factors()
    keep = {name for name in before if block(name) == 3}
    trainer.open_round(8, keep)
    remembered = set(trainer.state()["optimizer"]["parameters"])
    kept = [i for i, name in enumerate(n for n in before for _ in "AB") if name in keep]
    assert remembered == {str(i) for i in kept}
    for name, pair in trainer.adapters.factors().items():
        assert torch.equal(pair.B, before[name].B) == (name in keep), name
        assert pair.B.any() == (name in keep)


def test_an_undone_round_is_forgotten() -> None:
    """Also by the optimizer, of the modules that were kept: the next steps are as if that round had not been."""
    trainer, without = trainer_of(), trainer_of()
    keep = [name for name in trainer.adapters.module_names if block(name) == 3]
    for one in (trainer, without):
        take(one, request_of("a"))
    trainer.open_round(8, keep)
    take(trainer, request_of("b", 1))
    trainer.undo_round()
    for one in (trainer, without):
        one.open_round(9, keep)
        take(one, request_of("a", 1))
    assert_same(trainer, without)


@pytest.mark.parametrize("joint", [False, True], ids=["one-by-one", "joint"])
def test_a_trainer_goes_on_from_its_state_bit_for_bit(joint: bool, tmp_path: Path) -> None:
    config = replace(CONFIG, joint_steps=joint, tail_passes=2)
    trainer, restored = trainer_of(config), trainer_of(config)
    take(trainer, *(request_of(client) for client in CUTS))
    restored.open_round(99)
    restored.load_state(through_disk(trainer.state(), tmp_path))
    assert_same(restored, trainer)
    for step in (1, 2):
        take(trainer, *(request_of(client, step) for client in CUTS))
        take(restored, *(request_of(client, step) for client in CUTS))
    assert_same(restored, trainer)


def test_a_state_is_a_copy() -> None:
    trainer = trainer_of()
    take(trainer, request_of("a"))
    state, before = trainer.state(), tensors(trainer)
    take(trainer, request_of("a", 1))
    trainer.load_state(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(trainer).items())


OTHERS: Mapping[str, LoraSpec] = {
    "rank": LoraSpec(r=2, lora_alpha=4),
    "scaling": LoraSpec(r=4, lora_alpha=4),
    "modules": LoraSpec(r=4, lora_alpha=8, target_modules=("q_proj",)),
}


@pytest.mark.parametrize("lora", OTHERS.values(), ids=OTHERS)
def test_the_state_of_other_adapters_is_refused(lora: LoraSpec) -> None:
    with pytest.raises(
        ConfigError, match=r"Expected the state of adapters as they are here, found .*Resume with the plans"
    ):
        trainer_of().load_state(trainer_of(lora=lora).state())
