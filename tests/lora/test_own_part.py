"""A client that trained a part of an update gets the others' only, and has the same weights to the bit."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.aggregation import RULES, STACKING, Contribution, aggregate, stacked_parts
from hsplit_flwr.lora.delta_log import DeltaLog
from hsplit_flwr.lora.delta_update import DeltaReplica, DeltaUpdate, OwnFactors, OwnRound
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.places import ScratchFolder

SHAPES = {"h.0.q": (32, 32), "h.0.up": (48, 24), "h.1.q": (32, 32), "h.2.q": (32, 32)}
CUTS = {"a": 1, "b": 2, "c": 3}
RANKS = {"a": 1, "b": 2, "c": 1}


def block_of(name: str) -> int:
    return int(name.split(".")[1])


def held(client: str) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in SHAPES.items() if block_of(name) < CUTS[client]}


def adapters(names: Any, rank: int, seed: int, scaling: float) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            torch.randn(rank, SHAPES[name][1], generator=generator),
            torch.randn(SHAPES[name][0], rank, generator=generator),
            scaling,
        )
        for name in names
    }


def trained(client: str, round_number: int) -> dict[str, LoraFactors]:
    return adapters(held(client), RANKS[client], 10 * round_number + ord(client), 2.0 / 3)


class Server:
    """Rounds of a log by a rule that stacks, with a share of its own for every client that finished."""

    def __init__(self, log: DeltaLog, rule: str = "noise_free") -> None:
        self.log, self.rule = log, rule

    def close(self, finished: str, round_number: int, clipped: str = "") -> None:
        """`clipped` is a client whose update was scaled down by a bound."""
        shares = {client: (1 + i) / sum(range(1, len(finished) + 1)) for i, client in enumerate(finished)}
        contributions = []
        for client in finished:
            factors = trained(client, round_number)
            if client == clipped:
                factors = {name: replace(pair, scaling=pair.scaling * 0.37) for name, pair in factors.items()}
            contributions.append(Contribution(shares[client], CUTS[client], factors, client))
        tail = adapters(["h.1.q", "h.2.q"], 2, 77 + round_number, 0.5)
        update = aggregate(contributions, tail, block_of, RULES[self.rule])
        self.log.append(update, stacked_parts(contributions, tail, block_of, self.rule, round_number))


def fetch(log: DeltaLog, replica: DeltaReplica, client: str, own: OwnFactors | None) -> DeltaUpdate:
    """As over the wire."""
    names, replica.own = held(client), own
    update = log.since(replica.version, names, own=OwnRound(client, own.round_number) if own else None)
    received = DeltaUpdate.from_tensors(update.to_tensors(), names, base=update.base, version=update.version)
    assert received.nbytes == update.nbytes == sum(tensor.nbytes for tensor in update.to_tensors().values())
    replica.apply(received, names)
    return update


def assert_equal(found: DeltaReplica, expected: DeltaReplica) -> None:
    assert (found.version, found.names) == (expected.version, expected.names)
    ours, theirs = found.total.to_tensors(), expected.total.to_tensors()
    assert ours.keys() == theirs.keys()
    assert [key for key, tensor in theirs.items() if not torch.equal(ours[key], tensor)] == []


@pytest.mark.parametrize("rule", sorted(STACKING))
@pytest.mark.parametrize("in_files", [False, True])
def test_thirty_rounds_of_clients_that_come_go_fail_and_are_clipped(rule: str, in_files: bool, tmp_path: Path) -> None:
    server = Server(DeltaLog(WeightDelta(place=ScratchFolder(tmp_path))) if in_files else DeltaLog(), rule)
    draw = random.Random(7)
    own: dict[str, OwnFactors | None] = dict.fromkeys(CUTS)
    ours, plain = ({client: DeltaReplica() for client in CUTS} for _ in range(2))
    saved = 0
    for number in range(1, 31):
        sampled = sorted(draw.sample("abc", draw.choice([1, 2, 3])))
        for client in sampled:
            lost = draw.random() < 0.1
            if lost:
                ours[client], own[client] = DeltaReplica(), None
                plain[client] = DeltaReplica()
            sent = fetch(server.log, ours[client], client, own[client]).nbytes
            usual = fetch(server.log, plain[client], client, None).nbytes
            assert sent <= usual
            saved += usual - sent
            assert_equal(ours[client], plain[client])
            own[client] = OwnFactors(number, trained(client, number))
        finished = [client for client in sampled if draw.random() > 0.2] or sampled[:1]
        server.close("".join(finished), number, clipped=draw.choice([*finished, ""]))
    assert saved > 0


def test_only_the_others_columns_travel() -> None:
    server = Server(DeltaLog())
    server.close("ab", 1)
    update = server.log.since(None, held("b"), own=OwnRound("b", 1))
    shapes = {key: tuple(tensor.shape) for key, tensor in update.to_tensors().items()}
    assert shapes == {
        "add|h.0.q|A": (1, 32), "add|h.0.q|B": (32, 1), "add|h.0.up|A": (1, 24), "add|h.0.up|B": (48, 1),
        "add|h.1.q|A": (2, 32), "add|h.1.q|B": (32, 2), "own|h.0.q": (2,), "own|h.0.up": (2,), "own|h.1.q": (2,),
    }  # fmt: skip
    assert update.own["h.0.q"] == (1, 2 / 3 * (2.0 / 3))


def test_who_trained_alone_gets_places_only() -> None:
    server = Server(DeltaLog())
    server.close("a", 1)
    replica = DeltaReplica()
    update = fetch(server.log, replica, "a", OwnFactors(1, trained("a", 1)))
    assert sorted(update.to_tensors()) == ["own|h.0.q", "own|h.0.up"]
    assert torch.equal(replica.total.dense("h.0.q"), server.log.total.dense("h.0.q"))


@pytest.mark.parametrize("own", [OwnRound("b", 2), OwnRound("c", 1), None])
def test_who_holds_no_part_of_it_gets_all(own: OwnRound | None) -> None:
    """It trained in another round, or was refused, or lost what it had."""
    server = Server(DeltaLog())
    server.close("ab", 1)
    update = server.log.since(None, held("b"), own=own)
    assert not update.own
    assert all(torch.equal(update.replaced.dense(n), server.log.total.dense(n)) for n in held("b"))


def test_rules_that_do_not_stack_leave_nothing_out() -> None:
    contributions = [Contribution(1.0, 3, trained("c", 1), "c")]
    for rule in RULES.keys() - STACKING.keys():
        assert stacked_parts(contributions, {}, block_of, rule, 1) == {}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ([9.0, 1.0], r"Expected a place in the increment of 'h\.0\.q', found column 9"),
        ([-1.0, 1.0], "Expected start >= 0 and scale"),
        ([0.5, 1.0], "Expected start >= 0 and scale"),
        ([0.0, float("nan")], "Expected no figure beyond"),
        ([0.0, 1e30], "Expected no figure beyond"),
        ([0.0], "Expected start >= 0 and scale"),
    ],
)
def test_a_wrong_place_is_refused(place: list[float], message: str) -> None:
    replica = DeltaReplica(1, frozenset(SHAPES), own=OwnFactors(1, trained("b", 1)))
    tensors = {f"add|h.0.q|{side}": getattr(trained("a", 1)["h.0.q"], side) for side in "AB"}
    tensors["own|h.0.q"] = torch.tensor(place, dtype=torch.float64)
    with pytest.raises(AggregationError, match=message):
        replica.apply(DeltaUpdate.from_tensors(tensors, SHAPES, base=1, version=2), SHAPES)
    assert (replica.version, replica.total.names()) == (1, [])


def test_a_part_that_is_not_held_is_refused() -> None:
    replica = DeltaReplica(1, frozenset(SHAPES))
    tensors = {"own|h.0.q": torch.tensor([0.0, 1.0], dtype=torch.float64)}
    with pytest.raises(AggregationError, match=r"found one without 'h\.0\.q'"):
        replica.apply(DeltaUpdate.from_tensors(tensors, SHAPES, base=1, version=2), SHAPES)
