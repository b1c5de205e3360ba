import copy
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.delta_log import DeltaLog
from hsplit_flwr.lora.delta_update import DeltaReplica, DeltaUpdate
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.factors import LoraFactors, dense_bytes, factor_bytes
from hsplit_flwr.lora.merge import merge_into
from tests.helpers.states import through_disk

EXACT = 1e-6  # relative, float32 sums against float64 ones
SHAPES = {"h.0.q": (16, 16), "h.0.up": (24, 12), "h.1.q": (16, 16), "h.2.down": (12, 40)}
Array = NDArray[np.float64]


def random_factors(name: str, rank: int, seed: int, scaling: float = 1.0) -> LoraFactors:
    d_out, d_in = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    return LoraFactors(A, B, scaling)


def product(factors: LoraFactors) -> Array:
    return np.asarray(factors.scaling * (factors.B.double() @ factors.A.double()).numpy())


def assert_same(found: Tensor, expected: Array) -> None:
    error = np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected)
    assert error <= EXACT


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


# --- merging: the cumulative float32 delta survives bf16 weights ---


def test_fifty_small_increments_into_bf16_weights_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    W_0 = (0.02 * torch.randn(256, 256, generator=generator)).bfloat16()
    log, naive, true_sum = DeltaLog(), W_0.clone(), torch.zeros(256, 256, dtype=torch.float64)
    merged, base_before = W_0, W_0.clone()
    drift = torch.randn(256, 4, generator=generator)  # rounds agree in part, as training steps do
    for _ in range(50):
        B = drift + torch.randn(256, 4, generator=generator)
        increment = LoraFactors(torch.randn(4, 256, generator=generator).abs(), 2e-6 * B, 1.0)
        log.append({"q": increment})
        true_sum += torch.from_numpy(product(increment))
        merged = merge_into(W_0, log.total.dense("q"), transposed=False, dtype=torch.bfloat16)
        naive += increment.delta().bfloat16()  # what adding to the merged weights again and again would do

    def relative(found: Tensor) -> float:
        return float((found.double() - true_sum).norm() / true_sum.norm())

    kept, lost = relative(log.total.dense("q")), relative(naive.double() - W_0.double())
    print(f"relative error of the accumulated delta: float32 sum {kept:.1e}, in-place bf16 {lost:.1e}")
    assert kept < 1e-3
    assert lost > 10 * max(kept, 1e-3)
    assert torch.equal(W_0, base_before)
    # the weights are the exact sum rounded once, so they are as close to it as bf16 allows: half an ulp
    exact = W_0.double() + true_sum
    assert float(((merged.double() - exact).abs() / exact.abs()).max()) <= 2**-8 * (1 + 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_merge_rounds_the_float32_sum_once(
    dtype: torch.dtype, stored: torch.dtype, transposed: bool, rows: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    delta = torch.randn(rows, 30, generator=generator)
    base = torch.randn((30, rows) if transposed else (rows, 30), generator=generator).to(stored)
    before = base.clone()
    merged = merge_into(base, delta, transposed=transposed, dtype=dtype)
    expected = (before.to(torch.float32) + (delta.t() if transposed else delta)).to(dtype)
    assert torch.equal(merged, expected)
    assert merged.is_contiguous()
    assert torch.equal(base, before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_merging_factors_is_merging_their_product(transposed: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    A, B = torch.randn(6, 30, generator=generator), torch.randn(rows, 6, generator=generator)
    factors = LoraFactors(A, B, 0.5)
    W_0 = torch.randn((30, rows) if transposed else (rows, 30), generator=generator)
    delta = product(factors)
    expected = W_0.double().numpy() + (delta.T if transposed else delta)
    assert_same(merge_into(W_0, factors, transposed=transposed, dtype=torch.float32), expected)
    half = merge_into(W_0, factors, transposed=transposed, dtype=torch.bfloat16)
    assert half.is_contiguous()
    worst = np.abs(half.double().numpy() - expected) / np.maximum(np.abs(expected), 1e-3)
    assert worst.max() <= 2**-8 * (1 + 1e-3)  # half an ulp: rounded once


def test_merge_refuses_a_delta_of_another_orientation() -> None:
    for delta in (torch.zeros(4, 6), LoraFactors(torch.zeros(1, 6), torch.zeros(4, 1), 1.0)):
        with pytest.raises(AggregationError, match=r"= \(6, 4\) .*transposed=True.*found \(4, 6\)"):
            merge_into(torch.zeros(4, 6), delta, transposed=True, dtype=torch.float32)
    with pytest.raises(AggregationError, match=r"found \(1, 6\)"):  # would broadcast
        merge_into(torch.zeros(4, 6), torch.zeros(1, 6), transposed=False, dtype=torch.float32)


# --- the sum: exact, and in the smaller form ---

ranks = st.sampled_from([0, 1, 1, 2, 3, 8])
increments = st.dictionaries(
    st.sampled_from(sorted(SHAPES)),
    st.tuples(ranks, st.integers(0, 2**20), st.sampled_from([0.5, 1.0, 2.0])),
)


def make_increment(drawn: dict[str, tuple[int, int, float]]) -> dict[str, LoraFactors]:
    return {name: random_factors(name, rank, seed, scaling) for name, (rank, seed, scaling) in drawn.items()}


@settings(max_examples=100, deadline=None)
@given(st.lists(increments, max_size=12))
def test_weight_delta_is_the_exact_sum_in_the_smaller_form(
    drawn: list[dict[str, tuple[int, int, float]]],
) -> None:
    delta = WeightDelta()
    total_ranks = dict.fromkeys(SHAPES, 0)
    sums: dict[str, Array] = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for increment in map(make_increment, drawn):
        delta.add(increment)
        for name, factors in increment.items():
            total_ranks[name] += factors.rank
            sums[name] += product(factors)
    assert sorted(delta.names()) == sorted(name for name, rank in total_ranks.items() if rank > 0)
    smallest = 0
    for name in delta.names():
        assert_same(delta.dense(name), sums[name])
        d_out, d_in = SHAPES[name]
        smallest += 4 * min(d_out * d_in, total_ranks[name] * (d_out + d_in))
    tensors = delta.to_tensors()
    assert delta.nbytes == tensor_bytes(tensors) == smallest

    back = WeightDelta.from_tensors(tensors, SHAPES)
    assert back.nbytes == delta.nbytes
    for name in delta.names():
        assert_same(back.dense(name), sums[name])


def test_the_form_changes_to_dense_at_equal_bytes() -> None:
    delta = WeightDelta()  # 16 x 16: rank 8 takes the bytes of the dense matrix
    for step in range(8):
        assert set(delta.to_tensors()) == (set() if step == 0 else {"h.0.q|A", "h.0.q|B"})
        delta.add({"h.0.q": random_factors("h.0.q", 1, step)})
    assert set(delta.to_tensors()) == {"h.0.q|dense"}


def test_a_view_stays_what_it_was_while_the_sum_moves_on() -> None:
    for rank in (1, 8):  # as factors, and dense
        delta = WeightDelta()
        delta.add({name: random_factors(name, rank, 0) for name in SHAPES})
        view = delta.restricted(["h.1.q", "h.0.q", "never.changed"])
        assert view.names() == ["h.1.q", "h.0.q"]
        before, nbytes = view.dense("h.0.q").clone(), view.nbytes
        delta.add({"h.0.q": random_factors("h.0.q", 8, 1)})
        assert torch.equal(view.dense("h.0.q"), before)
        assert view.nbytes == nbytes
        assert not torch.equal(delta.dense("h.0.q"), before)


def test_a_refused_increment_changes_nothing() -> None:
    delta = WeightDelta()
    delta.add({"h.0.q": random_factors("h.0.q", 2, 0), "h.1.q": random_factors("h.1.q", 2, 1)})
    before = delta.dense("h.0.q").clone()
    log = DeltaLog(delta, version=4)
    wrong = {"h.0.q": random_factors("h.0.q", 2, 2), "h.1.q": random_factors("h.0.up", 2, 3)}
    with pytest.raises(AggregationError, match=r"= \(16, 16\) for 'h\.1\.q', found \(24, 12\)"):
        log.append(wrong)
    nan = LoraFactors(torch.full((2, 16), math.nan), torch.ones(16, 2), 1.0)
    with pytest.raises(AggregationError, match=r"Module 'h\.1\.q': .*NaN or Inf"):
        log.append({"h.0.q": random_factors("h.0.q", 2, 2), "h.1.q": nan})
    assert torch.equal(delta.dense("h.0.q"), before)
    assert log.version == 4


def valid_tensors() -> dict[str, Tensor]:
    delta = WeightDelta()
    delta.add({"h.0.q": random_factors("h.0.q", 2, 0), "h.1.q": random_factors("h.1.q", 9, 0)})
    return delta.to_tensors()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h.0.q|B": None}, r"\['h\.0\.q\|B'\] without its counterpart"),
        ({"h.0.q|C": torch.zeros(1)}, r"'h\.0\.q\|C'"),
        ({"bare": torch.zeros(1)}, r"'bare'"),
        ({"h.0.q|dense": torch.zeros(16, 16)}, r"one form of the delta of 'h\.0\.q'"),
        ({"h.9.q|dense": torch.zeros(16, 16)}, r"modules that this process holds, found 'h\.9\.q'"),
        ({"h.9.q|A": torch.zeros(1, 16), "h.9.q|B": torch.zeros(16, 1)}, r"found 'h\.9\.q'"),
        ({"h.1.q|dense": torch.zeros(16, 15)}, r"float32 \(16, 16\), found torch\.float32 \(16, 15\)"),
        ({"h.1.q|dense": torch.zeros(16, 16).half()}, r"found torch\.float16"),
        ({"h.1.q|dense": torch.full((16, 16), math.inf)}, "with NaN or Inf"),
        ({"h.0.q|A": torch.zeros(2, 15)}, r"\(16, 16\) for 'h\.0\.q', found \(16, 15\)"),
        ({"h.0.q|A": torch.zeros(3, 16)}, r"Module 'h\.0\.q': .*of one rank"),
        ({"h.0.q|A": torch.full((2, 16), math.nan)}, r"Module 'h\.0\.q': .*NaN or Inf"),
        ({"h.0.q|A": torch.zeros(2, 16).double()}, r"float32 factors"),
    ],
)
def test_tensors_from_outside_are_checked(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {key: tensor for key, tensor in (valid_tensors() | change).items() if tensor is not None}
    with pytest.raises(AggregationError, match=message):
        WeightDelta.from_tensors(tensors, SHAPES)


# --- versions ---


@dataclass
class Server:
    """The log, and beside it every increment ever made: what the log is checked against."""

    log: DeltaLog = field(default_factory=DeltaLog)
    history: list[dict[str, LoraFactors]] = field(default_factory=list)

    def step(self, increment: dict[str, LoraFactors]) -> None:
        self.history.append(increment)
        assert self.log.append(increment) == len(self.history)

    def rank(self, name: str, since: int) -> int:
        return sum(increment[name].rank for increment in self.history[since:] if name in increment)

    def total(self, name: str) -> Array:
        parts = [product(increment[name]) for increment in self.history if name in increment]
        return np.asarray(sum(parts, np.zeros(SHAPES[name])))

    def smallest(self, names: list[str], held: frozenset[str], version: int | None) -> int:
        """Bytes of the cheapest way to bring `names` up to date, from the whole history."""
        smallest = 0
        for name in names:
            d_out, d_in = SHAPES[name]
            base = version if version is not None and name in held else 0
            smallest += 4 * min(d_out * d_in, self.rank(name, base) * (d_out + d_in))
        return smallest


module_sets = st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True)
rounds = st.lists(
    st.tuples(
        increments,
        # who is sampled in this round, with which modules, and whether it lost its state
        st.dictionaries(st.integers(0, 3), st.tuples(module_sets, st.sampled_from([False, False, True]))),
    ),
    min_size=1,
    max_size=15,
)


@settings(max_examples=150, deadline=None)
@given(rounds)
def test_clients_that_lag_lose_their_state_or_change_modules_end_where_the_server_is(
    drawn: list[tuple[dict[str, tuple[int, int, float]], dict[int, tuple[list[str], bool]]]],
) -> None:
    server, replicas = Server(), {client: DeltaReplica() for client in range(4)}
    for increment, sampled in drawn:
        server.step(make_increment(increment))
        for client, (names, lost) in sampled.items():
            replica = replicas[client] = DeltaReplica() if lost else replicas[client]
            update = server.log.since(replica.version, names, held=replica.names)
            tensors = update.to_tensors()
            expected_bytes = server.smallest(names, replica.names, replica.version)
            assert tensor_bytes(tensors) == update.nbytes == expected_bytes

            received = DeltaUpdate.from_tensors(tensors, SHAPES, base=update.base, version=update.version)
            replica.apply(received, names)
            assert replica.version == server.log.version
            assert set(replica.total.names()) == set(server.log.total.restricted(names).names())
            for name in replica.total.names():
                assert_same(replica.total.dense(name), server.total(name))
        dense = sum(dense_bytes(SHAPES[name]) for name in server.log.total.names())
        assert server.log.nbytes <= 2 * dense


def test_a_lagging_client_gets_the_missing_increments_only() -> None:
    log = DeltaLog()
    for seed in range(5):
        log.append({"h.0.q": random_factors("h.0.q", 1, seed), "h.1.q": random_factors("h.1.q", 1, seed)})
    update = log.since(3, ["h.0.q"])
    assert (update.kind, update.base, update.version) == ("increments", 3, 5)
    assert {key: tuple(t.shape) for key, t in update.to_tensors().items()} == {
        "add|h.0.q|A": (2, 16),
        "add|h.0.q|B": (16, 2),
    }
    assert log.since(5, ["h.0.q"]).to_tensors() == {}
    assert update.names() == ["h.0.q"]


@pytest.mark.parametrize("version", [None, 0, -1, 6])
def test_an_unknown_version_gets_the_whole(version: int | None) -> None:
    log = DeltaLog()
    for seed in range(5):
        log.append({"h.0.q": random_factors("h.0.q", 1, seed)})
    update = log.since(version, SHAPES)
    assert (update.kind, update.base, update.version) == ("whole", None, 5)
    stale = DeltaReplica(version=6, names=frozenset(SHAPES))
    stale.total.add({"h.0.q": random_factors("h.0.q", 2, 77), "h.1.q": random_factors("h.1.q", 2, 78)})
    stale.apply(update, SHAPES)
    assert stale.total.names() == ["h.0.q"]  # nothing of another run survives
    assert torch.equal(stale.total.dense("h.0.q"), log.total.dense("h.0.q"))


def test_a_restored_log_serves_clients_of_any_version() -> None:
    first = Server()
    for seed in range(4):
        names = ("h.0.q", "h.0.up")  # h.0.up never changes again after the restart
        first.step({name: random_factors(name, 1, seed) for name in names})
    restored = DeltaLog(WeightDelta.from_tensors(first.log.total.to_tensors(), SHAPES), version=4)
    first.history.append({"h.0.q": random_factors("h.0.q", 1, 9), "h.1.q": random_factors("h.1.q", 1, 9)})
    assert restored.append(first.history[-1]) == 5
    for version in (None, 2, 4, 5):
        replica = DeltaReplica(version, frozenset(SHAPES))
        if version is not None:
            for increment in first.history[:version]:
                replica.total.add(increment)
        replica.apply(restored.since(version, SHAPES), SHAPES)
        for name in ("h.0.q", "h.0.up", "h.1.q"):
            assert_same(replica.total.dense(name), first.total(name))


@pytest.mark.parametrize("rounds", [0, 3, 30], ids=["empty", "factors", "dense, old increments gone"])
def test_a_log_goes_on_from_its_state_bit_for_bit(tmp_path: Path, rounds: int) -> None:
    """The same to a new client and to those of every version since, also after the rounds that follow.

    Earlier versions are of another run. Their increments once took half of a checkpoint, and nobody was ever sent them.
    """
    log, restored = DeltaLog(), DeltaLog()

    def step(seed: int, *logs: DeltaLog) -> None:
        names = list(SHAPES)[: 1 + seed % 4]
        for one in logs:
            one.append({name: random_factors(name, 1 + seed % 3, seed, scaling=0.7) for name in names})

    for seed in range(rounds):
        step(seed, log)
    restored.load_state(through_disk(log.state(), tmp_path), SHAPES)
    for seed in range(rounds, rounds + 12):
        assert restored.version == log.version == seed
        for version in (None, *range(rounds, seed + 1)):
            expected, found = log.since(version, SHAPES), restored.since(version, SHAPES)
            assert (found.kind, found.base, found.version) == (expected.kind, expected.base, expected.version)
            tensors = found.to_tensors()
            assert tensors.keys() == expected.to_tensors().keys()
            assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.to_tensors().items())
        whole = restored.since(None, SHAPES).to_tensors().keys()
        for version in range(1, rounds):
            assert restored.since(version, SHAPES).to_tensors().keys() == whole
        step(seed, log, restored)


def test_a_log_of_another_model_is_refused(tmp_path: Path) -> None:
    log = DeltaLog()
    log.append({"h.0.q": random_factors("h.0.q", 1, 0)})
    with pytest.raises(AggregationError, match=r"Expected factors of \(d_out, d_in\) = \(8, 8\) for 'h\.0\.q'"):
        DeltaLog().load_state(log.state(), {"h.0.q": (8, 8)})
    with pytest.raises(AggregationError, match=r"Expected deltas of modules that this process holds, found 'h\.0\.q'"):
        DeltaLog().load_state(log.state(), {})


def test_memory_stays_within_twice_the_dense_bytes_over_many_rounds() -> None:
    log = DeltaLog()
    peak = 0
    for seed in range(200):
        log.append({name: random_factors(name, 1 + seed % 3, seed) for name in SHAPES})
        peak = max(peak, log.nbytes)
    dense = sum(map(dense_bytes, SHAPES.values()))
    assert dense < peak <= 2 * dense
    recent = log.since(199, SHAPES)  # and the last round still travels as what it is
    assert recent.nbytes == sum(factor_bytes(random_factors(name, 1 + 199 % 3, 0)) for name in SHAPES)


def test_an_update_on_another_version_is_refused_and_changes_nothing() -> None:
    log = DeltaLog()
    for seed in range(3):
        log.append({"h.0.q": random_factors("h.0.q", 1, seed)})
    replica = DeltaReplica()
    replica.apply(log.since(None, ["h.0.q"]), ["h.0.q"])
    log.append({"h.0.q": random_factors("h.0.q", 1, 3), "h.1.q": random_factors("h.1.q", 1, 3)})
    before = copy.copy(replica)
    with pytest.raises(AggregationError, match=r"on version 3, found one on 2\. Ask for the whole"):
        replica.apply(log.since(2, ["h.0.q"]), ["h.0.q"])
    log.append({"h.1.q": random_factors("h.1.q", 1, 4)})
    # the server believes that the client holds h.1.q, which grew from rank 1 to 2 since version 4
    replica.version = 4
    with pytest.raises(AggregationError, match=r"modules that are held, found \['h\.1\.q'\]"):
        replica.apply(log.since(4, ["h.1.q"]), ["h.1.q"])
    assert (replica.names, replica.total) == (before.names, before.total)


def test_a_replica_holds_the_modules_of_its_plan_only() -> None:
    log = DeltaLog()
    log.append({name: random_factors(name, 1, 0) for name in SHAPES})
    replica = DeltaReplica()
    replica.apply(log.since(None, SHAPES), ["h.0.q"])  # sent more than it is to hold
    assert (replica.total.names(), replica.names) == (["h.0.q"], frozenset({"h.0.q"}))


def test_an_update_with_unknown_keys_is_refused() -> None:
    with pytest.raises(AggregationError, match=r"start with 'add\|' or 'replace\|', found \['h\.0\.q\|A'\]"):
        DeltaUpdate.from_tensors({"h.0.q|A": torch.zeros(1, 16)}, SHAPES, base=None, version=1)
    with pytest.raises(AggregationError, match="without its counterpart or of another kind"):
        DeltaUpdate.from_tensors({"add|h.0.q|dense": torch.zeros(16, 16)}, SHAPES, base=1, version=2)


@pytest.mark.parametrize("figure", [1e30, -1e26, math.nan, math.inf])
@pytest.mark.parametrize("key", ["add|h.0.q|A", "add|h.0.q|B", "replace|h.1.q|dense"])
def test_a_client_refuses_absurd_figures_of_a_server(key: str, figure: float) -> None:
    """A broken or malicious server: finite, and yet no weight of a model."""
    tensors = {
        "add|h.0.q|A": torch.zeros(1, 16),
        "add|h.0.q|B": torch.zeros(16, 1),
        "replace|h.1.q|dense": torch.zeros(16, 16),
    }
    tensors[key][0, 0] = figure
    with pytest.raises(
        AggregationError, match=rf"beyond 1e\+25 in the delta.*found {re.escape(f'{abs(figure):g}')} in"
    ):
        DeltaUpdate.from_tensors(tensors, SHAPES, base=1, version=2)
