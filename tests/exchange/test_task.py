"""A client's task: what travels comes back, and junk is refused."""

import json
import math
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.task import PROTOCOL_VERSION, RoundTask
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.training.config import ClientPlan, TrainingConfig

pytestmark = pytest.mark.timeout(20)

LORA = LoraSpec(4, 8.0, ("q_proj", "v_proj"), {r"1\..*": 2}, {r"2\..*": 3.5})
TRAINING = TrainingConfig(3, 7, learning_rate=1e-4, schedule="cosine", activation_codec="bf16", seed=5)
TASK = RoundTask("run", 2, "client-1", "train", "127.0.0.1:80", "t0k3n", 60.5, 1 << 20, ClientPlan(3, LORA), TRAINING)


def test_a_task_survives_json() -> None:
    text = TASK.to_json()
    assert RoundTask.from_json(text) == TASK
    assert json.loads(text)["protocol"] == PROTOCOL_VERSION


@settings(max_examples=50, deadline=None)
@given(
    client=st.text(),
    round_number=st.integers(1, 10**6),
    limit=st.floats(1e-3, 1e9),
    rate=st.floats(1e-30, 1e3),
    rank=st.integers(0, 512),
    targets=st.sampled_from(["all-linear", ("q_proj",), ("a", "b.c")]),
)
def test_any_task_survives_json(
    client: str, round_number: int, limit: float, rate: float, rank: int, targets: str | tuple[str, ...]
) -> None:
    plan = ClientPlan(1, LoraSpec(rank, 2.0, targets, {re.escape(client): rank}, {re.escape(client): 0.1}))
    training = replace(TRAINING, learning_rate=rate)
    task = replace(TASK, client=client, round=round_number, time_limit_s=limit, plan=plan, training=training)
    assert RoundTask.from_json(task.to_json()) == task


@pytest.mark.parametrize("protocol", [0, PROTOCOL_VERSION + 1, "1", None])
def test_a_task_of_another_version_is_refused_first(protocol: Any) -> None:
    """Before its fields are looked at: another version may have others."""
    text = json.dumps({"protocol": protocol, "something": "new"})
    with pytest.raises(ConfigError, match=f"protocol version {PROTOCOL_VERSION}, found {protocol}.*Install the same"):
        RoundTask.from_json(text)


@pytest.mark.parametrize("key", ["activation_codec", "gradient_codec"])
def test_a_task_with_a_codec_that_this_client_lacks_is_refused_by_name(key: str) -> None:
    training = {**json.loads(TASK.to_json())["training"], key: "int3"}
    with pytest.raises(ConfigError, match=r"this side has, one of fp32, .*, found 'int3'.*Install the same"):
        RoundTask.from_json(edited(training=training))


def test_a_server_with_a_codec_that_it_lacks_does_not_open() -> None:
    with pytest.raises(ConfigError, match=r"one of fp32, .*, found 'int3'"):
        TailService(None, lambda have, cut: (0, True, {}), "run", ServiceConfig(gradient_codec="int3"))  # type: ignore[arg-type]


def edited(**changes: Any) -> str:
    return json.dumps({**json.loads(TASK.to_json()), **changes})


def without(name: str) -> str:
    return json.dumps({key: value for key, value in json.loads(TASK.to_json()).items() if key != name})


JUNK = {
    "nothing": "",
    "not json": "{",
    "a list": "[]",
    "a text": '"protocol"',
    "a number": "1",
    "null": "null",
    "nested without end": "[" * 100_000,
    "a number of 5000 digits": '{"protocol": ' + "1" * 5000 + "}",
    "no protocol": without("protocol"),
    "no plan": without("plan"),
    "no token": without("token"),
    "one field more": edited(surprise=1),
    "plan is a list": edited(plan=[1]),
    "plan is null": edited(plan=None),
    "plan without a cut": edited(plan={"lora": LORA.to_dict()}),
    "plan without ranks": edited(plan={"cut": 1}),
    "cut of text": edited(plan={"cut": "1", "lora": LORA.to_dict()}),
    "cut of zero": edited(plan={"cut": 0, "lora": LORA.to_dict()}),
    "rank of text": edited(plan={"cut": 1, "lora": {**LORA.to_dict(), "r": "8"}}),
    "rank below zero": edited(plan={"cut": 1, "lora": {**LORA.to_dict(), "r": -1}}),
    "patterns in a list": edited(plan={"cut": 1, "lora": {**LORA.to_dict(), "rank_pattern": [1]}}),
    "no lora key": edited(plan={"cut": 1, "lora": {}}),
    "training is null": edited(training=None),
    "training of others": edited(training={"epochs": 1}),
    "rounds of text": edited(training={**asdict(TRAINING), "rounds": "3"}),
    "learning rate of NaN": edited(training={**asdict(TRAINING), "learning_rate": math.nan}),
}


@pytest.mark.parametrize("text", JUNK.values(), ids=JUNK)
def test_junk_is_no_task(text: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)Expected .*found "):
        RoundTask.from_json(text)


def test_a_round_starts_where_the_last_one_ended() -> None:
    assert [replace(TASK, round=r).first_step for r in (1, 2, 3)] == [0, 7, 14]
    assert replace(TASK, round=3).first_step + TRAINING.local_steps == TRAINING.total_steps == 21


def test_fresh_adapters_differ_by_client_and_round_only() -> None:
    seeds = {replace(TASK, client=c, round=r).adapter_seed for c in ("a", "b") for r in (1, 2)}
    assert len(seeds) == 4
    other_plan = replace(TASK, plan=ClientPlan(1, LoraSpec()), token="x", address="y", mode="evaluate")
    assert other_plan.adapter_seed == TASK.adapter_seed
    assert replace(TASK, training=replace(TRAINING, seed=6)).adapter_seed != TASK.adapter_seed
