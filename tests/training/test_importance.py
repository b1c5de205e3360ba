"""Importance against autograd's own full gradient of a transformers model; what it must not touch; its history."""

import json
import math
import re
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hsplit_flwr.errors import ConfigError, ExchangeError, UnsupportedModelError
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import Segment, segment_from_model
from hsplit_flwr.planning.importance_history import LEAST_BALANCE, ImportanceHistory, drift, merge, normalize
from hsplit_flwr.training import importance
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.head import TrainReport, train_head
from hsplit_flwr.training.importance import (
    ImportanceProbe,
    MeanImportance,
    SampledRows,
    gradient_weight_product,
    sample_rows,
)
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession
from hsplit_flwr.training.tail import SharedTail
from tests.helpers.models import ARCHITECTURES, tiny_model

TOLERANCE = 1e-5
"""relative, per matrix, fp32"""
BF16_TOLERANCE = 0.03
"""relative, per matrix, where weights and activations are bf16 (8 bits of mantissa, through 4 blocks and back)"""
CONFIG = TrainingConfig(1, 3, 2e-2, warmup_steps=0, importance_steps=2, joint_steps=True)
NONE = LoraSpec(r=0)
SOME = LoraSpec(r=4, lora_alpha=8, rank_pattern={r".*(q_proj|c_attn|down_proj)": 0, r"2\..*": 2})
EVERYWHERE = LoraSpec(r=2, lora_alpha=4)
LATER = LoraSpec(r=4, lora_alpha=8, rank_pattern={r"0\..*": 0})
LIMITS = BarrierLimits(30.0, 30.0, 30.0)
Batch = dict[str, Tensor]
Importance = dict[str, float]


def padded_batches(count: int, seed: int = 5, rows: int = 3, length: int = 10) -> list[Batch]:
    """Right and left padding in the first two rows, a masked prompt."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 90, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 3 :] = 0
        mask[1, :2] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def full_gradient(
    name: str, batch: Batch, rows: int, factors: Mapping[str, LoraFactors], dtype: torch.dtype = torch.float32
) -> Importance:
    """The reference: transformers' own model and loss with the adapters merged, autograd's own full gradient.

    The gradient of W + delta is that of W.
    """
    model = tiny_model(name).to(dtype).requires_grad_(False)
    layers = {
        key: layer
        for key, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and re.search(r"\.\d+\.", key)
    }
    base = {key: layer.weight.detach().clone() for key, layer in layers.items()}
    for key, layer in layers.items():
        if key in factors:
            delta = factors[key].delta()
            layer.weight.data += delta if isinstance(layer, nn.Linear) else delta.T
        layer.weight.requires_grad_()
    sampled = {key: tensor[: rows or None] for key, tensor in batch.items()}
    model(**sampled).loss.backward()
    expected = {}
    for key, layer in layers.items():
        assert layer.weight.grad is not None
        expected[key] = float((base[key].double() * layer.weight.grad.double()).abs().sum()) / sum(layer.weight.shape)
    return expected


def weak_storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def block(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    assert found
    return int(found[1])


def mean(profiles: list[Importance]) -> Importance:
    return {name: sum(p[name] for p in profiles) / len(profiles) for name in profiles[0]}


@dataclass
class Client:
    cut: int
    batches: list[Batch]
    lora: LoraSpec = SOME
    poison_step: int | None = None


@dataclass
class Played:
    reports: dict[str, TrainReport] = field(default_factory=dict)
    tail: dict[str, Importance] = field(default_factory=dict)
    adapters: dict[str, list[dict[str, LoraFactors]]] = field(default_factory=dict)
    """client -> all adapters it computed with: per step, then after the last"""
    segments: list[Segment] = field(default_factory=list)

    def measured(self, client: str) -> Importance:
        return self.reports[client].importance | self.tail.get(client, {})


class Watched(TailSession):
    """A session that notes the adapters of both sides before each step, and sends NaN where told."""

    def __init__(self, inner: TailSession, note: Any, poison_step: int | None) -> None:
        self._inner, self._note, self._poison_step = inner, note, poison_step

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        self._note()  # the tail is at rest: it waits for this client's request
        sent = activations * math.nan if part.step == self._poison_step else activations
        self._inner.send_part(part, sent, attention_mask, labels)

    def receive_part(self) -> StepReply:
        return self._inner.receive_part()

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        return self._inner.score_step(step, activations, attention_mask, labels)

    def close(self) -> None:
        self._inner.close()


def play(
    name: str,
    clients: Mapping[str, Client],
    config: TrainingConfig = CONFIG,
    *,
    tail_lora: LoraSpec = SOME,
    checkpointing: bool = False,
    at_once: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Played:
    """One round with a shared tail, every client in a thread of its own; `at_once` of them at a time."""
    at_once = at_once or len(clients)
    played = Played()
    whole = segment_from_model(tiny_model(name).to(dtype))
    first_cut = min(client.cut for client in clients.values())
    names = [n for n in whole.linear_modules() if block(n) >= first_cut]
    tail = SharedTail(whole, SegmentAdapters(whole, tail_lora, names), config, LIMITS)
    tail.open_training(clients, concurrency=at_once, adapter_seed=3)
    heads = {key: segment_from_model(tiny_model(name).to(dtype), 0, client.cut) for key, client in clients.items()}
    adapters = {key: SegmentAdapters(heads[key], client.lora) for key, client in clients.items()}
    played.segments = [whole, *heads.values()]
    for segment in played.segments:
        segment.gradient_checkpointing = checkpointing

    def train(key: str) -> None:
        def note() -> None:
            head_names = heads[key].linear_modules()
            of_tail = {n: f for n, f in tail.adapters.factors().items() if n not in head_names}
            played.adapters.setdefault(key, []).append(adapters[key].factors() | of_tail)

        adapters[key].reset(seed=7)
        session = tail.join(key, clients[key].cut, 0)
        watched = Watched(session, note, clients[key].poison_step)
        try:
            played.reports[key] = train_head(heads[key], adapters[key], clients[key].batches, watched, config)
            note()
        except ExchangeError as error:
            if clients[key].poison_step is None or error.code != "non_finite":
                raise
        finally:
            session.close()

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(train, clients))
    tail.close_training()
    played.tail = tail.importance()
    return played


def assert_measured(played: Played, name: str, clients: Mapping[str, Client], config: TrainingConfig = CONFIG) -> None:
    """Head and tail of every client together equal the reference, the mean over the round's first steps."""
    for key, client in clients.items():
        found = played.measured(key)
        expected = mean(
            [
                full_gradient(name, client.batches[step], config.importance_rows, played.adapters[key][step])
                for step in range(config.importance_steps)
            ]
        )
        assert list(found) == list(expected)
        assert set(played.reports[key].importance) == {n for n in expected if block(n) < client.cut}
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=0), key
        assert min(found.values()) > 0


@pytest.mark.parametrize(("rows", "checkpointing"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_head_and_tail_equal_the_full_gradient(name: str, cut: int, rows: int, checkpointing: bool) -> None:
    config = replace(CONFIG, importance_rows=rows)
    clients = {"0": Client(cut, padded_batches(3))}
    played = play(name, clients, config, checkpointing=checkpointing)
    assert_measured(played, name, clients, config)
    first, second, *_ = played.adapters["0"]
    assert all((f.B == 0).all() for f in first.values())  # the second step's gradient is one at trained adapters
    assert all((f.B != 0).any() for f in second.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [NONE, LATER], ids=["no adapter", "no adapter in block 0"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_that_no_gradient_would_reach_are_measured(name: str, lora: LoraSpec, checkpointing: bool) -> None:
    clients = {"0": Client(2, padded_batches(3), lora)}
    assert_measured(play(name, clients, tail_lora=NONE, checkpointing=checkpointing), name, clients)


@pytest.mark.parametrize("lora", [NONE, SOME], ids=["no adapter", "adapters"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, lora: LoraSpec) -> None:
    config = replace(CONFIG, local_steps=1, importance_steps=1)
    clients = {"0": Client(2, padded_batches(1), lora)}
    assert_measured(play(name, clients, config, tail_lora=lora), name, clients, config)


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("at_once", [4, 1], ids=["together", "in waves"])
def test_each_client_is_measured_on_its_own_rows(at_once: int, rows: int) -> None:
    """Unequal cuts, lengths, row counts, ranks and tokens; a client that comes late counts its own first steps."""
    config = replace(CONFIG, importance_rows=rows)
    clients = {
        "a": Client(1, padded_batches(3, 1, rows=4)),
        "b": Client(3, padded_batches(3, 2), LATER),
        "c": Client(1, padded_batches(3, 3, rows=2)),
        "d": Client(1, padded_batches(3, 4, length=8), NONE),
    }
    for batch in clients["c"].batches:
        batch["labels"][:, :6] = -100
    assert_measured(play("llama", clients, config, at_once=at_once), "llama", clients, config)


def test_a_step_taken_again_without_a_poisoned_client_counts_once() -> None:
    clients = {
        "a": Client(1, padded_batches(3, 1)),
        "b": Client(1, padded_batches(3, 2)),
        "c": Client(2, padded_batches(3, 3)),
    }
    poisoned = play("llama", {**clients, "b": replace(clients["b"], poison_step=1)})
    without = play("llama", {key: clients[key] for key in "ac"})
    for key in "ac":
        assert list(poisoned.measured(key)) == list(without.measured(key))
    assert "b" not in poisoned.reports
    good = {key: clients[key] for key in "ac"}
    assert_measured(poisoned, "llama", good)
    first_step = full_gradient("llama", clients["b"].batches[0], 2, poisoned.adapters["b"][0])
    assert poisoned.tail["b"] == pytest.approx({n: first_step[n] for n in poisoned.tail["b"]}, rel=TOLERANCE, abs=0)


def test_bf16_weights() -> None:
    config = replace(CONFIG, local_steps=1, importance_steps=1)
    clients = {"0": Client(2, padded_batches(1))}
    found = play("llama", clients, config, dtype=torch.bfloat16).measured("0")
    expected = full_gradient("llama", clients["0"].batches[0], 2, {}, torch.bfloat16)
    assert found == pytest.approx(expected, rel=BF16_TOLERANCE, abs=0)


def test_no_steps_no_importance() -> None:
    played = play("llama", {"0": Client(2, padded_batches(3))}, replace(CONFIG, importance_steps=0))
    assert played.measured("0") == {}
    assert played.tail == {}


def test_steps_whose_sampled_rows_hold_no_target_do_not_count() -> None:
    clients = {"a": Client(2, padded_batches(3, 1)), "b": Client(2, padded_batches(3, 2))}
    clients["a"].batches[0]["labels"][:2] = -100
    for batch in clients["b"].batches:
        batch["labels"][:] = -100
    played = play("llama", clients)
    expected = full_gradient("llama", clients["a"].batches[1], 2, played.adapters["a"][1])
    assert played.measured("a") == pytest.approx(expected, rel=TOLERANCE, abs=0)
    assert played.measured("b") == {}
    assert set(played.tail) == {"a"}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [SOME, LATER, NONE], ids=["some", "not in block 0", "none"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_training_is_bit_for_bit_the_same(name: str, lora: LoraSpec, checkpointing: bool) -> None:
    clients = {"a": Client(1, padded_batches(3, 1), lora), "b": Client(3, padded_batches(3, 2), lora)}
    on = play(name, clients, checkpointing=checkpointing)
    off = play(name, clients, replace(CONFIG, importance_steps=0), checkpointing=checkpointing)
    for key in clients:
        assert on.measured(key)
        assert on.reports[key].losses == off.reports[key].losses
        for found, expected in zip(on.adapters[key], off.adapters[key], strict=True):
            assert found.keys() == expected.keys()
            for module, factors in expected.items():
                assert torch.equal(found[module].A, factors.A)
                assert torch.equal(found[module].B, factors.B)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_nothing_stays_behind(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    """When the next batch is asked for, while the graph of the step still exists, its sampled inputs are gone."""
    copies: list[weakref.ref[Tensor]] = []
    sampled = ImportanceProbe._sampled

    def noted(self: ImportanceProbe, name: str, tensor: Tensor) -> list[Tensor]:
        parts = sampled(self, name, tensor)
        copies.extend(map(weakref.ref, parts))
        return parts

    alive: list[int] = []
    clones: list[weakref.ref[Tensor]] = []
    clone = Tensor.clone

    def noted_clone(tensor: Tensor) -> Tensor:
        clones.append(weakref.ref(copied := clone(tensor)))
        return copied

    def watched() -> Iterator[Batch]:
        for batch in padded_batches(3):
            alive.append(sum(reference() is not None for reference in [*copies, *clones]))
            yield batch

    monkeypatch.setattr(ImportanceProbe, "_sampled", noted)
    monkeypatch.setattr(Tensor, "clone", noted_clone)
    client = Client(2, [], LATER)
    client.batches = watched()  # type: ignore[assignment]
    played = play("llama", {"0": client}, checkpointing=checkpointing)
    assert len(copies) > 2 * 28
    assert clones
    assert alive == [0, 0, 0]
    hooks = [module._forward_hooks for segment in played.segments for module in segment.modules()]
    assert not any(hooks)


@pytest.mark.parametrize(("lora", "checkpointing"), [(NONE, False), (NONE, True), (EVERYWHERE, True)])
def test_only_the_sampled_rows_of_an_input_are_kept(lora: LoraSpec, checkpointing: bool) -> None:
    """Where neither the model nor an adapter keeps a layer's input for the backward pass."""
    segment = segment_from_model(tiny_model("llama"))
    SegmentAdapters(segment, lora)
    segment.gradient_checkpointing = checkpointing
    inputs: list[StorageWeakRef] = []
    for key, layer in segment.linear_modules().items():
        if key.endswith("down_proj"):
            layer.register_forward_pre_hook(lambda _, args: inputs.append(weak_storage(args[0])))
    batch = padded_batches(1)[0]
    with ImportanceProbe(segment, [SampledRows(0, 2, 1.0)], (3, 10)) as probe:
        logits = segment(batch["input_ids"], batch["attention_mask"])
        assert len(inputs) == segment.num_blocks
        assert all(reference.expired() for reference in inputs)  # type: ignore[no-untyped-call]
        logits.sum().backward()
    assert min(probe.values()[0].values()) > 0


def test_hooks_are_removed_after_an_error() -> None:
    segment = segment_from_model(tiny_model("llama"))

    def interrupted() -> None:
        with ImportanceProbe(segment, [SampledRows(0, 1, 1.0)], (1, 4)):
            assert any(module._forward_hooks for module in segment.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(module._forward_hooks for module in segment.modules())


def test_a_layer_that_does_not_see_the_batch_is_refused() -> None:
    segment = segment_from_model(tiny_model("llama"))
    probe = ImportanceProbe(segment, [SampledRows(0, 1, 1.0)], (2, 5))
    with (
        pytest.raises(UnsupportedModelError, match=r"Expected .*q_proj to see all 2 x 5 .*set importance_steps to 0"),
        probe,
    ):
        segment(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64))


def test_a_pass_without_gradients_is_not_measured() -> None:
    segment = segment_from_model(tiny_model("llama"))
    ids = torch.ones(2, 4, dtype=torch.int64)
    with ImportanceProbe(segment, [SampledRows(0, 1, 1.0)], (2, 4)) as probe, torch.no_grad():
        segment(ids, ids)
    assert set(probe.values()[0].values()) == {0.0}


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operator made, views of `given` not counted."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self._given:
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (1, 64), (64, 1)])
def test_gradients_are_formed_in_tiles(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    tile_bytes = 700
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x, delta = torch.randn(2, shape[1], generator=generator), torch.randn(2, shape[0], generator=generator)
    monkeypatch.setattr(importance, "TILE_BYTES", tile_bytes)
    with Largest(weight, x, delta) as largest:
        found = gradient_weight_product(weight, x, delta)
    assert 0 < largest.nbytes <= tile_bytes
    expected = (weight.double() * (delta.double().T @ x.double())).abs().sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.dtype == torch.float32


def test_the_default_tile_is_small() -> None:
    assert importance.TILE_BYTES <= 16 << 20


def test_sampled_rows() -> None:
    labels = torch.tensor([[5, 5, -100], [-100, -100, 5], [5, 5, 5]])
    assert sample_rows(labels, 2) == SampledRows(0, 2, 4 / 2)
    assert sample_rows(labels, 0) == SampledRows(0, 3, 1.0)
    assert sample_rows(labels, 9, start=4, objective_tokens=10) == SampledRows(4, 7, 10 / 4)
    labels[:2] = -100
    labels[0, 0] = 5  # the first label is predicted from nothing
    assert sample_rows(labels, 2) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_does_not_count(bad: float) -> None:
    total = MeanImportance()
    assert total.mean() == {}
    for values in ({"x": 1.0, "y": 2.0}, {"x": bad, "y": 9.0}, {"x": 3.0, "y": 2.0}):
        total.add(values)
    assert total.mean() == {"x": 2.0, "y": 2.0}


# --- merge, drift, history -------------------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "d"]
profiles = (
    st.lists(st.floats(0, 1e6), min_size=4, max_size=4)
    .filter(lambda v: sum(v) > 1e-3)
    .map(lambda values: dict(zip(NAMES, values, strict=True)))
)


def test_merge_is_the_weighted_mean_over_those_who_measured() -> None:
    per_client = {"1": {"x": 1.0, "y": 4.0}, "2": {"x": 3.0}, "3": {}}
    merged = merge(per_client, {"1": 10, "2": 30, "3": 5, "gone": 7})
    assert merged == pytest.approx({"x": (10 * 1 + 30 * 3) / 40, "y": 4.0})
    assert merge({}, {}) == {}


@pytest.mark.parametrize("weights", [{}, {"1": 0.0}, {"1": -1.0}, {"1": math.nan}, {"1": math.inf}])
def test_merge_needs_weights(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"Expected a finite weight > 0 for client '1', found .*Leave clients out"):
        merge({"1": {"x": 1.0}}, weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
def test_importance_must_be_finite_and_not_negative(bad: float) -> None:
    for take in (normalize, ImportanceHistory().update, lambda p: merge({"1": p}, {"1": 1.0})):
        with pytest.raises(ConfigError, match=r"Expected importance to be a finite number >= 0, found .* for 'y'"):
            take({"x": 1.0, "y": bad})


def test_a_profile_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Expected an importance profile with a value above 0, found 1 modules"):
        normalize({"x": 0.0})


@given(profiles, profiles, profiles, st.floats(0.01, 100))
def test_drift_is_a_distance_in_0_1_and_blind_to_scale(
    a: Importance, b: Importance, c: Importance, scale: float
) -> None:
    assert 0 <= drift(a, b) <= 1
    assert drift(a, a) == 0
    assert drift(a, b) == drift(b, a)
    assert drift(a, c) <= drift(a, b) + drift(b, c) + 1e-9
    assert drift({n: scale * v for n, v in a.items()}, b) == pytest.approx(drift(a, b), abs=1e-9)


def test_drift_of_known_profiles() -> None:
    assert drift({"x": 2.0}, {"y": 5.0}) == 1
    assert drift({"x": 1.0, "y": 3.0}, {"x": 1.0, "y": 1.0}) == pytest.approx(0.25)


@given(st.lists(profiles, min_size=1, max_size=8))
def test_the_history_is_a_profile_between_past_and_present(rounds: list[Importance]) -> None:
    history = ImportanceHistory()
    for number, profile in enumerate(rounds):
        before = dict(history.profile)
        history.update(profile)
        assert LEAST_BALANCE <= history.beta <= 1
        assert sum(history.profile.values()) == pytest.approx(1)
        present = normalize(profile)
        past = before or present
        for name, value in history.profile.items():
            assert min(past[name], present[name]) - 1e-12 <= value <= max(past[name], present[name]) + 1e-12
            assert value == pytest.approx(history.beta * present[name] + (1 - history.beta) * past[name], abs=1e-12)
        assert history.updates == number + 1


def test_the_present_weighs_less_as_training_proceeds() -> None:
    history = ImportanceHistory()
    balances = []
    for _ in range(20):
        history.update({"x": 1.0, "y": 3.0})
        balances.append(history.beta)
    assert balances == pytest.approx([max(LEAST_BALANCE, 1 / t) for t in range(1, 21)])
    assert history.profile == pytest.approx({"x": 0.25, "y": 0.75})


def test_the_present_weighs_more_when_importance_fluctuates() -> None:
    balances = []
    for share in (0.5, 0.6, 0.8, 1.0):
        history = ImportanceHistory()
        for _ in range(20):
            history.update({"x": 0.5, "y": 0.5})
        history.update({"x": share, "y": 1 - share})
        balances.append(history.beta)
        least = LEAST_BALANCE
        assert history.beta == pytest.approx(least + (1 - least) * (share - 0.5))
    assert balances == sorted(balances)
    assert len(set(balances)) == 4


def test_modules_that_a_round_did_not_measure_keep_their_share() -> None:
    history = ImportanceHistory()
    history.update({"x": 1.0, "y": 1.0, "z": 2.0})
    history.update({"x": 300.0, "y": 100.0})
    assert history.profile["z"] == pytest.approx(0.5)
    assert history.beta == pytest.approx(0.5 + 0.5 * 0.125)
    assert history.profile["x"] == pytest.approx(0.25 + history.beta * 0.125)
    before = history.state()
    history.update({})
    assert history.state() == before


def test_the_history_travels_as_json() -> None:
    history = ImportanceHistory()
    history.update({"x": 1.0, "y": 3.0})
    history.update({"x": 2.0, "y": 1.0})
    copy = ImportanceHistory()
    copy.load_state(json.loads(json.dumps(history.state())))
    assert copy.state() == history.state()
    with pytest.raises(ConfigError, match=r"Expected HistoryRecord .* fields .*, found \['profile'\]"):
        ImportanceHistory().load_state({"profile": {}})
