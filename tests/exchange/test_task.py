"""A client's task: what travels comes back, and junk is refused."""

import json
import math
import re
import time
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.task import PROTOCOL_VERSION, RoundTask
from hsplit_flwr.exchange.task_limits import LONGEST_S
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload

pytestmark = pytest.mark.timeout(20)

LORA = LoraSpec(4, 8.0, ("q_proj", "v_proj"), {r"layers\.1\.q_proj": 2}, {r"layers\.2\.v_proj": 3.5})
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
    limit=st.floats(1e-3, LONGEST_S),
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
        TailService(None, lambda have, cut, own: (0, True, {}), "run", ServiceConfig(gradient_codec="int3"))  # type: ignore[arg-type]


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


def of_plan(**lora: Any) -> str:
    return edited(plan={"cut": 1, "lora": {**LORA.to_dict(), **lora}})


def of_training(**values: Any) -> str:
    return edited(training={**asdict(TRAINING), **values})


def of_workload(**values: Any) -> str:
    return edited(workload={**asdict(Workload()), **values})


SLOW = "(a+)+b" * 4
"""a regular expression that takes 2^n tries on a name of n a's"""
HOSTILE = {
    "cut of a billion": (
        edited(plan={"cut": 10**9, "lora": LORA.to_dict()}),
        r"cut of a task.*1\.\.10000, found 10000",
    ),
    "rank of a billion": (of_plan(r=10**9), r"rank of a task.*found 1000000000"),
    "rank of a billion somewhere": (of_plan(rank_pattern={"q_proj": 10**9}), "rank of a task"),
    "rank of 4000 digits": (of_plan(r=10**4000), "rank of a task"),
    "alpha of 1e300": (of_plan(lora_alpha=1e300), "lora_alpha of a task"),
    "alpha of NaN": (of_plan(alpha_pattern={"q_proj": math.nan}), "lora_alpha"),
    "slow pattern": (of_plan(rank_pattern={SLOW: 1}), "without regular expressions, found"),
    "slow pattern of alphas": (of_plan(alpha_pattern={SLOW: 1.0}), "without regular expressions, found"),
    "pattern that compiles for ever": (of_plan(rank_pattern={"(" * 5000: 1}), "a module's name of a task"),
    "any name": (of_plan(rank_pattern={".*": 1}), "without regular expressions, found"),
    "many patterns": (of_plan(rank_pattern={f"m{i}": 1 for i in range(20_000)}), "at most 16384, found 2000"),
    "many targets": (of_plan(target_modules=["q"] * 20_000), "at most 16384, found 2000"),
    "target of no text": (of_plan(target_modules=[1]), "a module's name of a task"),
    "a trillion steps": (of_training(local_steps=10**12), r"local_steps of a task.*found 1000000000000"),
    "a trillion rounds": (of_training(rounds=10**12), "rounds of a task"),
    "warm-up of 400 digits": (of_training(warmup_steps=10**400), "warmup_steps of a task"),
    "rate of infinity": (of_training(learning_rate=math.inf), "learning_rate > 0, found inf"),
    "rate of 1e308": (of_training(learning_rate=1e308), "learning_rate of a task"),
    "decay of NaN": (of_training(weight_decay=math.nan), "weight_decay >= 0, found nan"),
    "seed of text": (of_training(seed="1"), "seed of a task"),
    "round of NaN": (edited(round=math.nan), "round of a task"),
    "round below zero": (edited(round=-1), "round of a task"),
    "round a trillion": (edited(round=10**12), "round of a task"),
    "no limit of time": (edited(time_limit_s=math.inf), r"time_limit_s of a task.*found inf"),
    "limit of NaN": (edited(time_limit_s=math.nan), "time_limit_s of a task"),
    "limit of nothing": (edited(time_limit_s=0.0), "time_limit_s of a task to be > 0 s"),
    "limit below zero": (edited(time_limit_s=-5.0), "time_limit_s of a task"),
    "endless grace": (edited(reconnect_grace_s=math.inf), r"reconnect_grace_s of a task.*found inf"),
    "grace below zero": (edited(reconnect_grace_s=-1.0), "reconnect_grace_s of a task"),
    "limit of text": (edited(time_limit_s="60"), "time_limit_s of a task"),
    "frames of 2^62": (edited(max_frame_bytes=2**62), r"max_frame_bytes of a task.*1\.\.2147483647"),
    "frames of NaN": (edited(max_frame_bytes=math.nan), "max_frame_bytes of a task"),
    "mode of its own": (edited(mode="delete"), "mode 'delete'"),
    "id without end": (edited(client="x" * 10**6), "client of a task"),
    "token of a list": (edited(token=[1]), "token of a task"),
    "rows without end": (of_workload(batch_size=10**12), "batch_size of the workload"),
    "width of 400 digits": (of_workload(sequence_length=10**400), "sequence_length of the workload"),
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_task_is_refused_by_name_at_once(text: str, message: str) -> None:
    """A broken or malicious server: the client neither computes, reserves memory nor waits."""
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=f"(?s){message}") as refused:
        RoundTask.from_json(text)
    assert time.perf_counter() - started < 2.0
    assert len(str(refused.value)) < 600


def test_a_round_starts_where_the_last_one_ended() -> None:
    assert [replace(TASK, round=r).first_step for r in (1, 2, 3)] == [0, 7, 14]
    assert replace(TASK, round=3).first_step + TRAINING.local_steps == TRAINING.total_steps == 21


def test_fresh_adapters_differ_by_client_and_round_only() -> None:
    seeds = {replace(TASK, client=c, round=r).adapter_seed for c in ("a", "b") for r in (1, 2)}
    assert len(seeds) == 4
    other_plan = replace(TASK, plan=ClientPlan(1, LoraSpec()), token="x", address="y", mode="evaluate")
    assert other_plan.adapter_seed == TASK.adapter_seed
    assert replace(TASK, training=replace(TRAINING, seed=6)).adapter_seed != TASK.adapter_seed
