"""The records of a run: written after every round, saved and loaded without the loss of a bit."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.round_plan import Exchange, PlannedClient, PlannedTail, RoundPlan
from hsplit_flwr.reports.health.records import AdapterCoverage, AggregationHealth, MatrixSpectrum, TailSteps
from hsplit_flwr.reports.records import ClientRecord, Journal, RoundRecord, RunSummary

THIRD = 1 / 3
PLAN = RoundPlan(
    clients={
        "0": PlannedClient(
            client="0",
            cut=1,
            ranks={"h.0.a": 4, "h.0.b": 0},
            memory_bytes=10,
            memory_budget_bytes=12,
            step_s=0.1,
            round_s=THIRD,
            limited_by="memory",
            value=2.5,
        )
    },
    left_out={"7": "needs 2.1 MB, has 1.0 MB"},
    tail=PlannedTail({"h.1.a": 8}, 30, 60, 1e-300),
    value=math.pi,
    round_s=12.25,
    step_s=0.1 + 0.2,
    pace=math.e,
    exchange=Exchange(activation_codec="int8", micro_batches=4),
)
FULL = RoundRecord(
    round=3,
    central_perplexity=math.nan,
    federated_perplexity=4.719,
    train_loss=math.inf,
    clients=(
        ClientRecord("0", 1, "0-4", 2.0, 100, 20, None, 5, 6, {"load": 0.1}),
        ClientRecord("1", 2, "8", 8.0, 100, 20, THIRD, 5, 6),
    ),
    failures=("client 7: \u00fcber", "client 8: late"),
    plan=PLAN,
    plan_reasons=("first plan",),
    drift=0.1 + 0.2,
    importance={"h.0.a": THIRD, "h.0.b": 2 / 3},
    steps=TailSteps((2.0, -math.inf)),
    aggregation=AggregationHealth(
        (MatrixSpectrum("m", 2.0, (2.0, 1.0), 2.4, 12, 2, 8, 0.7),), {"svd": 0.1}, AdapterCoverage(0.1, 8.0, 8.0, 16)
    ),
    seconds={"fit": 1e-7},
)


def journal_of(*records: RoundRecord) -> Journal:
    journal = Journal()
    journal.rounds.extend(records)
    return journal


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state, allow_nan=False))


def test_records_come_back_exactly() -> None:
    """Bit for bit, types and all: `repr` tells NaN and -0.0 where `==` does not."""
    before = journal_of(RoundRecord(1), replace(FULL, round=2, plan=None, steps=None, aggregation=None), FULL)
    after = Journal()
    after.load_state(through_json(before.state()))
    assert repr(after.rounds) == repr(before.rounds)
    assert after.state() == before.state()


def test_numpy_scalars_come_back_as_plain_numbers_of_the_same_value() -> None:
    numbers: dict[str, Any] = {"loss": np.float32(0.1), "tokens": np.int64(7)}
    client = replace(FULL.clients[0], **numbers)
    after = Journal()
    after.load_state(through_json(journal_of(replace(FULL, clients=(client,))).state()))
    found = after.rounds[0].clients[0]
    assert (found.loss, found.tokens) == (float(np.float32(0.1)), 7)
    assert (type(found.loss), type(found.tokens)) == (float, int)


def test_a_loaded_journal_goes_on() -> None:
    after = Journal()
    after.load_state(journal_of(RoundRecord(1), RoundRecord(2)).state())
    after.note(2, train_loss=1.5)
    after.note(3, train_loss=1.25)
    assert [(record.round, record.train_loss) for record in after.rounds] == [(1, None), (2, 1.5), (3, 1.25)]


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: without(record, "drift"), r"rounds\[0\] of a saved state to have the fields"),
        (lambda record: {**record, "extra": 1}, r"rounds\[0\] of a saved state to have the fields"),
        (lambda record: {**record, "round": "1"}, r"Expected int as .*\.round of a saved state, found str"),
        (lambda record: {**record, "round": True}, r"Expected int as .*\.round .* found bool"),
        (lambda record: {**record, "drift": "much"}, r"Expected float as .*\.drift .* found str: 'much'"),
        (lambda record: {**record, "failures": "none"}, r"\.failures of a saved state, found str"),
        (lambda record: {**record, "importance": {"a": None}}, r"\.importance\['a'\] of a saved state"),
        (lambda record: {**record, "steps": []}, r"\.steps of a saved state to have the fields"),
        (lambda record: None, r"rounds\[0\] of a saved state to have the fields"),
    ],
)
def test_what_is_no_journal_is_refused_by_the_name_of_its_field(change: Callable[[Any], Any], message: str) -> None:
    journal = journal_of(RoundRecord(9))
    (record,) = through_json(journal_of(FULL).state())["rounds"]
    with pytest.raises(ConfigError, match=message):
        journal.load_state({"rounds": [change(record)]})
    assert journal.rounds == [RoundRecord(9)]


@pytest.mark.parametrize("limit", [PLAN.clients["0"].limited_by, "greed"])
def test_a_choice_is_one_of_its_choices(limit: str) -> None:
    state = through_json(journal_of(FULL).state())
    state["rounds"][0]["plan"]["clients"]["0"]["limited_by"] = limit
    if limit == "memory":
        Journal().load_state(state)
        return
    with pytest.raises(ConfigError, match=r"plan\.clients\['0'\]\.limited_by of a saved state, found str: 'greed'"):
        Journal().load_state(state)


@pytest.mark.parametrize("numbers", [(2, 1), (1, 1)])
def test_rounds_are_in_their_order_each_once(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="in their order"):
        Journal().load_state(journal_of(*(RoundRecord(number) for number in numbers)).state())


def test_a_value_that_is_no_record_is_refused() -> None:
    bad: Any = {"m": {1, 2}}
    with pytest.raises(ConfigError, match="found set"):
        journal_of(RoundRecord(1, importance=bad)).state()


def test_saving_after_every_round_is_cheap(tmp_path: Path) -> None:
    """A run of 100 rounds and 20 clients: the longest save, the last one, takes a moment beside a round."""
    client = replace(FULL.clients[0], seconds={"load": 0.1, "compute": 1.0, "exchange": 2.0})
    history = tuple(
        replace(FULL, round=number, clients=(client,) * 20, importance={f"h.{i}": THIRD for i in range(100)})
        for number in range(1, 101)
    )
    summary = RunSummary(10.0, history, 0, {}, None, "flwr run .", 1.0, status="running")
    started = time.perf_counter()
    summary.save(tmp_path / "summary.json")
    assert time.perf_counter() - started < 5.0
