"""Clients that lie, break, stall or vanish, over real gRPC on loopback.

Each fault is refused with its code, or survived; and what the tail has learned afterwards (adapters and AdamW state)
is bit for bit what a tail learned that never met the bad client.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from hsplit_flwr.errors import ConfigError, ExchangeError
from hsplit_flwr.exchange import delta_frames, grpc_transport
from hsplit_flwr.exchange.batches import batch_tensors
from hsplit_flwr.exchange.codecs import CODECS
from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.exchange.grpc_transport import GrpcStream, ServiceConfig, connect
from hsplit_flwr.exchange.positions import traveling
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.tail_service import DeltaSource, TailService
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.exchange.tls_files import ClientTls
from hsplit_flwr.exchange.transport import Connect
from hsplit_flwr.lora.delta_update import OwnRound
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.segments import segment_from_model
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.session import StepReply, TailSession
from hsplit_flwr.training.step import StepReport, StepRequest
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.tail_step import TailTrainer
from hsplit_flwr.training.workload import Workload
from tests.helpers.models import HIDDEN_SIZE, VOCAB_SIZE, tiny_model
from tests.helpers.replies import gradient_of

pytestmark = pytest.mark.timeout(60)

BATCH, LENGTH = 2, 6
CUT = 2
STEPS = 3
MAX_FRAME = 1 << 20
STRAGGLER_S = 30.0
SOON_S = 10.0
"""a tail that waited for a straggler or a closed round would take longer"""
CONFIG = TrainingConfig(rounds=1, local_steps=STEPS, learning_rate=1e-2, warmup_steps=0, max_grad_norm=1.0)
LIMITS = BarrierLimits(start_gate_s=30.0, straggler_limit_s=STRAGGLER_S, step_limit_s=60.0)
LORA = LoraSpec(r=2, lora_alpha=4)
ROOT = Path(__file__).parents[2]
State = dict[str, Tensor]


def batch(client: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, mask and labels that depend on nothing but the names."""
    generator = torch.Generator().manual_seed(1000 * sum(map(ord, client)) + step)
    activations = torch.randn(BATCH, LENGTH, HIDDEN_SIZE, generator=generator)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, 4:] = 0
    labels = torch.randint(0, VOCAB_SIZE, (BATCH, LENGTH), generator=generator).masked_fill(mask == 0, -100)
    return activations, mask, labels


def make_tail(
    architecture: str,
    limits: BarrierLimits = LIMITS,
    on_step: Callable[[StepReport], None] | None = None,
    lora: LoraSpec = LORA,
) -> SharedTail:
    segment = segment_from_model(tiny_model(architecture), CUT)
    return SharedTail(segment, SegmentAdapters(segment, lora), CONFIG, limits, on_step)


def learned(tail: SharedTail | TailTrainer) -> State:
    """Everything a step of the tail changes."""
    state = {f"adapter.{i}": p.detach().clone() for i, p in enumerate(tail.adapters.parameters())}
    for i, saved in tail.state()["optimizer"]["parameters"].items():
        state |= {f"adamw.{i}.{name}": torch.as_tensor(value) for name, value in saved["values"].items()}
    return state


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert any("exp_avg" in key for key in expected)  # the tail has taken a step
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@dataclass
class Served:
    """A tail behind gRPC in an open round."""

    tail: SharedTail
    service: TailService
    tokens: dict[str, str]
    cuts: Mapping[str, int]
    mode: Mode
    training: TrainingConfig
    sessions: list[RemoteTail] = field(default_factory=list)

    def task(self, client: str) -> RoundTask:
        plan = ClientPlan(self.cuts[client], LORA)
        token = self.tokens[client]
        return RoundTask("run", 1, client, self.mode, self.service.address, token, 60.0, MAX_FRAME, plan, self.training)

    def fresh(self, client: str) -> "Intruder":
        """A connected session of `client`; closed with the server."""
        session = Intruder(self.task(client), MAX_FRAME)
        self.sessions.append(session)
        session.__enter__()
        return session

    def ready(self, client: str) -> "Intruder":
        """A session of `client` that has joined the round."""
        session = self.fresh(client)
        session.fetch_delta(0)
        return session


class Intruder(RemoteTail):
    """A client that can also send what it likes, with its stream at hand."""

    stream: GrpcStream

    def __init__(self, task: RoundTask, max_receive_bytes: int) -> None:
        def remembered(*args: Any) -> GrpcStream:
            self.stream = connect(*args)
            return self.stream

        super().__init__(task, max_receive_bytes, remembered)

    def send_raw(self, frame: bytes) -> None:
        self.stream.send(frame)
        self.stream.receive()


def no_delta(have: int, cut: int, own: OwnRound | None) -> tuple[int, bool, dict[str, Tensor]]:
    return 0, True, {}


@contextmanager
def serving(
    *clients: str,
    architecture: str = "llama",
    concurrency: int = 1,
    limits: BarrierLimits = LIMITS,
    mode: Mode = "train",
    codec: str = "fp32",
    deltas: DeltaSource = no_delta,
    on_step: Callable[[StepReport], None] | None = None,
    lora: LoraSpec = LORA,
    steps: int | None = None,
    workload: Workload | None = None,
    **config: Any,
) -> Iterator[Served]:
    tail = make_tail(architecture, limits, on_step, lora)
    settings = ServiceConfig(max_frame_bytes=MAX_FRAME, activation_codec=codec, gradient_codec=codec, **config)
    service = TailService(tail, deltas, "run", settings)
    cuts = dict.fromkeys(clients, CUT)
    tokens = service.open_round(1, mode, cuts, 0, steps=steps, workload=workload)
    if mode == "train":
        tail.open_training(clients, concurrency, adapter_seed=7)
    training = replace(CONFIG, activation_codec=codec, gradient_codec=codec)
    served = Served(tail, service, tokens, cuts, mode, training)
    try:
        yield served
    finally:
        tail.close_training()
        service.stop()
        for session in served.sessions:
            session.close()


def reference(*steps: Mapping[str, int], architecture: str = "llama") -> tuple[State, dict[str, StepReply]]:
    """What a tail learns from exactly these steps (client -> its own step number), and its replies, in this process."""
    segment = segment_from_model(tiny_model(architecture), CUT)
    trainer = TailTrainer(segment, SegmentAdapters(segment, LORA), CONFIG)
    trainer.open_round(7)
    replies: dict[str, StepReply] = {}
    for step in steps:
        for client, number in sorted(step.items()):
            replies[f"{client}{number}"] = trainer.train([tail_request(client, number)]).replies[client]
    return learned(trainer), replies


def tail_request(client: str, number: int) -> StepRequest:
    activations, mask, labels = batch(client, number)
    return StepRequest(
        client=client, cut=CUT, run_step=number, activations=activations, attention_mask=mask, labels=labels
    )


@pytest.fixture(scope="module")
def alone() -> State:
    """What the tail learns from the good client's steps."""
    return reference(*({"good": step} for step in range(STEPS)))[0]


def train(session: TailSession, client: str, steps: range) -> list[StepReply]:
    return [session.train_step(step, *batch(client, step)) for step in steps]


def refused(action: Callable[[], object], code: str) -> ExchangeError:
    with pytest.raises(ExchangeError, match=r"Expected|closed|larger than max") as refusal:
        action()
    assert refusal.value.code == code
    return refusal.value


def test_a_further_pass_that_diverges_costs_nobody_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    """The first pass makes such adapters that the second has no finite loss: that one is left out, and said."""
    segment = segment_from_model(tiny_model("llama"), CUT)
    training = replace(CONFIG, tail_passes=3, learning_rate=1e30, max_grad_norm=0.0)
    tail = SharedTail(segment, SegmentAdapters(segment, LORA), training, LIMITS)
    tail.open_training(["good"], 1, adapter_seed=7)
    session = tail.join("good", CUT, 0)
    reply = session.train_step(0, *batch("good", 0))
    session.close()
    tail.close_training()
    assert torch.isfinite(gradient_of(reply)).all()
    assert caplog.text.count("the tail leaves out further passes of this step: [non_finite]") == 1


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end, f"waited {SOON_S} s for: {what}"
        time.sleep(0.005)


def asked(served: Served, client: str) -> bool:
    """Is a request of `client` waiting for its step?"""
    return served.tail._barrier is not None and client in served.tail._barrier._pending


# ---------------------------------------------------------------------------------------------- admission


def change_token(task: RoundTask) -> RoundTask:
    return replace(task, token="x" * 43)


def no_token(task: RoundTask) -> RoundTask:
    return replace(task, token="")


def no_deadline(task: RoundTask) -> RoundTask:
    return replace(task, time_limit_s=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "code"),
    [(change_token, "unauthenticated"), (no_token, "unauthenticated"), (no_deadline, "no_deadline")],
    ids=["wrong-token", "no-token", "no-deadline"],
)
def test_who_may_not_come_in(alone: State, change: Callable[[RoundTask], RoundTask], code: str) -> None:
    with serving("bad", "good") as served:
        good = served.ready("good")
        train(good, "good", range(1))
        with RemoteTail(change(served.task("bad")), MAX_FRAME, connect) as bad:
            refused(lambda: bad.fetch_delta(0), code)
        train(good, "good", range(1, STEPS))
        assert_same(learned(served.tail), alone)
        if code == "no_deadline":  # the mistake cost the client nothing: its token is still good
            served.ready("bad")


def test_a_stream_without_any_metadata_is_refused() -> None:
    with serving("good") as served, grpc.insecure_channel(served.service.address) as channel:
        with pytest.raises(grpc.RpcError) as refusal:
            next(channel.stream_stream("/hsplit_flwr.Tail/Exchange")(iter([]), timeout=SOON_S))
        assert refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert served.tokens["good"] not in refusal.value.details()


def test_a_token_is_good_for_one_stream(alone: State) -> None:
    """Also: who tries a used token must not get the stream that used it rightly out of the service's books."""
    with serving("good", "waiting") as served:
        good, waiting = served.ready("good"), served.ready("waiting")
        for _ in range(2):
            with RemoteTail(served.task("good"), MAX_FRAME, connect) as thief:
                refused(lambda tail=thief: tail.fetch_delta(0), "unauthenticated")  # type: ignore[misc]
            with RemoteTail(served.task("waiting"), MAX_FRAME, connect) as thief:
                refused(lambda tail=thief: tail.fetch_delta(0), "unauthenticated")  # type: ignore[misc]
        waiting.close()
        train(good, "good", range(STEPS))
        assert_same(learned(served.tail), alone)
        with ThreadPoolExecutor(1) as pool:
            end = pool.submit(good.stream.receive)
            served.service.close_round()
            refused(lambda: end.result(SOON_S), "round_closed")
        good.close()


def test_a_finished_client_does_not_come_back() -> None:
    with serving("good") as served:
        session = served.ready("good")
        train(session, "good", range(1))
        session.close()
        with RemoteTail(served.task("good"), MAX_FRAME, connect) as again:
            refused(lambda: again.fetch_delta(0), "unauthenticated")


def test_the_token_of_a_closed_round_is_void() -> None:
    with serving("good") as served:
        old = served.task("good")
        served.service.open_round(2, "train", served.cuts, STEPS)
        with RemoteTail(old, MAX_FRAME, connect) as late:
            refused(lambda: late.fetch_delta(0), "unauthenticated")
        served.service.close_round()
        with RemoteTail(old, MAX_FRAME, connect) as late:
            refused(lambda: late.fetch_delta(0), "unauthenticated")


# ---------------------------------------------------------------------------------------------- bad frames


def header(client: str = "bad", **changes: Any) -> Header:
    return replace(Header("train", "run", 1, client, CUT), **changes)


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    return {**batch_tensors(*batch("bad", 0), CODECS["fp32"]), **changes}


def filled(name: str, value: float) -> Tensor:
    tensor = tensors()[name].clone()
    tensor.view(-1)[-1] = value
    return tensor


REAL = int(traveling(*batch("bad", 0)[1:]).sum())
"""positions that travel"""
WIDE = torch.zeros(REAL, HIDDEN_SIZE + 1)
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "malformed_frame"),
    "noise": (bytes(range(256)) * 4, "malformed_frame"),
    "truncated": (encode(header(), tensors())[:-100], "malformed_frame"),
    "other protocol": (encode(header(protocol=99), tensors()), "protocol_version"),
    "too large": (encode(header(), tensors(activations=torch.zeros(64 * 128, HIDDEN_SIZE))), "frame_too_large"),
    "hello twice": (encode(header(kind="hello")), "wrong_kind"),
    "evaluate in a training round": (encode(header(kind="evaluate"), tensors()), "wrong_kind"),
    "a server's frame": (encode(header(kind="gradient"), tensors()), "wrong_kind"),
    "other run": (encode(header(run="run-2"), tensors()), "wrong_run"),
    "other round": (encode(header(round=2), tensors()), "wrong_round"),
    "another client's name": (encode(header(client="good"), tensors()), "wrong_client"),
    "other cut": (encode(header(cut=CUT + 1), tensors()), "wrong_cut"),
    "step of the future": (encode(header(step=1), tensors()), "wrong_step"),
    "no tensors": (encode(header()), "wrong_tensors"),
    "a farewell with tensors": (encode(header(kind="leave"), tensors()), "wrong_tensors"),
    "one tensor more": (encode(header(), tensors(extra=torch.zeros(1))), "wrong_tensors"),
    "dtype": (encode(header(), tensors(activations=WIDE[..., 1:].bfloat16())), "wrong_dtype"),
    "hidden size": (encode(header(), tensors(activations=WIDE)), "wrong_shape"),
    "mask of another batch": (
        encode(header(), tensors(**{"mask.spans": torch.ones(3, 2, dtype=torch.int32)})),
        "wrong_shape",
    ),
    "mask beyond its row": (
        encode(header(), tensors(**{"mask.spans": filled("mask.spans", LENGTH + 1)})),
        "wrong_mask",
    ),
    "NaN": (encode(header(), tensors(activations=filled("activations", float("nan")))), "non_finite"),
    "Inf": (encode(header(), tensors(activations=filled("activations", float("inf")))), "non_finite"),
    "label above the vocabulary": (encode(header(), tensors(labels=filled("labels", VOCAB_SIZE))), "wrong_labels"),
    "negative label": (encode(header(), tensors(labels=filled("labels", -5))), "wrong_labels"),
}


@pytest.mark.parametrize(("frame", "code"), FAULTS.values(), ids=FAULTS)
def test_a_bad_frame_ends_its_sender_alone(alone: State, frame: bytes, code: str) -> None:
    with serving("bad", "good") as served:
        good = served.ready("good")
        train(good, "good", range(1))
        bad = served.ready("bad")
        refused(lambda: bad.send_raw(frame), code)
        train(good, "good", range(1, STEPS))
        assert_same(learned(served.tail), alone)
        tickets = served.service.close_round()
    assert (tickets["bad"].steps, tickets["bad"].tokens) == (0, 0)
    assert tickets["good"].errors == []
    if code != "frame_too_large":  # gRPC itself refuses those, before the service sees them
        assert any(f"[{code}]" in error for error in tickets["bad"].errors)


@pytest.mark.parametrize(
    ("hello", "code"),
    [
        (encode(header(kind="hello", round=7)), "wrong_round"),
        (encode(header(kind="hello"), {"extra": torch.zeros(0, dtype=torch.uint8)}), "wrong_tensors"),
        (encode(header(kind="resume"), tensors()), "wrong_tensors"),
    ],
    ids=["other round", "hello with a tensor", "resume with tensors"],
)
def test_a_bad_hello_never_joins(alone: State, hello: bytes, code: str) -> None:
    """Greetings with tensors, which they do not have, were taken (found by `simulations/benchmarks/hostile.py`)."""
    with serving("bad", "good") as served:
        good = served.ready("good")
        with Intruder(served.task("bad"), MAX_FRAME) as bad:
            refused(lambda: bad.send_raw(hello), code)
        train(good, "good", range(STEPS))
        assert_same(learned(served.tail), alone)


def test_a_step_sent_again_is_refused(alone: State) -> None:
    """A replayed frame would train the tail twice on one batch."""
    with serving("good") as served:
        good = served.ready("good")
        train(good, "good", range(STEPS))
        replayed = encode(header("good", step=1), batch_tensors(*batch("good", 1), CODECS["fp32"]))
        refused(lambda: good.send_raw(replayed), "wrong_step")
        assert_same(learned(served.tail), alone)


def test_a_client_that_wants_more_than_was_planned_harms_nobody(alone: State) -> None:
    """An admitted client trained the tail for 100 steps in a round of 20, and on rows of 8,000 tokens."""
    with serving("bad", "good", steps=STEPS, workload=Workload(BATCH, LENGTH)) as served:
        good, bad = served.ready("good"), served.ready("bad")
        wide = (torch.zeros(BATCH, LENGTH + 1, HIDDEN_SIZE), *torch.ones(2, BATCH, LENGTH + 1))
        refused(lambda: bad.train_step(0, *wide), "batch_too_large")
        train(good, "good", range(STEPS))
        refused(lambda: good.train_step(STEPS, *batch("good", STEPS)), "too_many_steps")
        assert_same(learned(served.tail), alone)
        tickets = served.service.close_round()
    assert (tickets["bad"].steps, tickets["good"].steps) == (0, STEPS)
    assert "[too_many_steps]" in tickets["good"].errors[0]


# ---------------------------------------------------------------------------------------------- vanishing, stalling


def together(actions: Mapping[str, Callable[[], list[StepReply]]]) -> dict[str, list[StepReply]]:
    with ThreadPoolExecutor(len(actions)) as pool:
        futures = {client: pool.submit(action) for client, action in actions.items()}
        return {client: future.result(SOON_S) for client, future in futures.items()}


def in_step(served: Served, client: str, step: int, stack: ExitStack) -> "tuple[Intruder, Future[StepReply]]":
    """A session of `client` whose request for `step` waits for the others."""
    session = served.ready(client)
    future = stack.enter_context(ThreadPoolExecutor(1)).submit(session.train_step, step, *batch(client, step))
    wait_until(lambda: asked(served, client), f"{client} to ask for step {step}")
    return session, future


def test_a_client_that_vanishes_while_its_step_waits_leaves_no_trace() -> None:
    expected, replies = reference(*({"a": step, "b": step} for step in range(STEPS)))
    with serving("a", "b", "bad", concurrency=3) as served, ExitStack() as stack:
        sessions = {"a": served.ready("a"), "b": served.ready("b")}
        bad, step = in_step(served, "bad", 0, stack)
        bad.stream._channel.close()  # no goodbye
        with pytest.raises(ExchangeError):
            step.result(SOON_S)
        found = together({c: lambda c=c, s=s: train(s, c, range(STEPS)) for c, s in sessions.items()})  # type: ignore[misc]
        assert_same(learned(served.tail), expected)
        assert served.tail.close_training() == {}
        tickets = served.service.close_round()
    assert tickets["bad"].tokens == 0
    assert tickets["a"].tokens == STEPS * replies["a0"].tokens
    for client in sessions:
        for number, reply in enumerate(found[client]):
            assert torch.equal(gradient_of(reply), gradient_of(replies[f"{client}{number}"]))


VICTIM = """
import sys, torch
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.exchange.grpc_transport import connect
from hsplit_flwr.exchange.positions import traveling
from hsplit_flwr.exchange.remote_tail import RemoteTail
task = RoundTask.from_json(sys.stdin.readline())
with RemoteTail(task, task.max_frame_bytes, connect) as tail:
    tail.fetch_delta(0)
    ones = torch.ones({batch}, {length})
    tail.train_step(0, torch.ones({batch}, {length}, {hidden}), ones, ones)
"""


def test_a_killed_process_does_not_block_the_others(alone: State) -> None:
    script = VICTIM.format(batch=BATCH, length=LENGTH, hidden=HIDDEN_SIZE)
    with serving("victim", "good", concurrency=2) as served:
        victim = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert victim.stdin is not None
            victim.stdin.write(served.task("victim").to_json() + "\n")
            victim.stdin.flush()
            good = served.ready("good")
            end = time.monotonic() + 40
            while not asked(served, "victim"):
                assert victim.poll() is None, "the victim ended before it asked"
                assert time.monotonic() < end, "the victim did not ask"
                time.sleep(0.01)
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait(SOON_S)
            wait_until(lambda: not asked(served, "victim"), "the tail to notice the death")
            together({"good": lambda: train(good, "good", range(STEPS))})
            assert_same(learned(served.tail), alone)
            assert served.tail.close_training() == {}
        finally:
            victim.kill()
            victim.wait(SOON_S)


def test_a_stalled_client_is_dropped_from_the_step_and_may_come_back() -> None:
    expected, _ = reference({"good": 0, "slow": 0}, {"good": 1}, {"good": 2}, {"slow": 1}, {"slow": 2})
    limit_s = 0.3
    with serving("good", "slow", concurrency=2, limits=BarrierLimits(30.0, limit_s, 60.0)) as served:
        good, slow = served.ready("good"), served.ready("slow")
        together({"good": lambda: train(good, "good", range(1)), "slow": lambda: train(slow, "slow", range(1))})
        started = time.monotonic()
        train(good, "good", range(1, 3))  # its first turn comes at once, the second one after that of the other
        waited_s = time.monotonic() - started
        assert limit_s <= waited_s < limit_s + SOON_S
        good.close()
        train(slow, "slow", range(1, STEPS))
        slow.close()
        assert_same(learned(served.tail), expected)
        assert served.tail.close_training() == {"slow": 1}
        assert served.service.close_round()["slow"].steps == STEPS


# ---------------------------------------------------------------------------------------------- poison


@pytest.mark.parametrize(("architecture", "value"), [("gpt2", 1e30), ("llama", 3e38)], ids=["loss", "gradients"])
def test_poison_in_finite_activations_harms_its_sender_alone(architecture: str, value: float) -> None:
    """Not finite is the loss, or (LLaMA) only the gradients."""
    steps = [{"a": 0, "z": 0}, {"a": 1, "z": 1}]
    expected, replies = reference(*steps, architecture=architecture)
    with serving("a", "poison", "z", architecture=architecture, concurrency=3) as served:
        sessions = {client: served.ready(client) for client in ("a", "poison", "z")}

        def poison() -> list[StepReply]:
            _, mask, labels = batch("poison", 0)
            activations = torch.full((BATCH, LENGTH, HIDDEN_SIZE), value)
            error = refused(lambda: sessions["poison"].train_step(0, activations, mask, labels), "non_finite")
            assert "Lower the learning rate" in str(error)
            return []

        good = {c: lambda c=c: train(sessions[c], c, range(2)) for c in ("a", "z")}
        found = together({**good, "poison": poison})
        assert_same(learned(served.tail), expected)
        for client in ("a", "z"):
            for number, reply in enumerate(found[client]):
                assert torch.equal(gradient_of(reply), gradient_of(replies[f"{client}{number}"]))
                assert reply.loss == replies[f"{client}{number}"].loss
        tickets = served.service.close_round()
        assert tickets["poison"].tokens == 0


def test_poison_is_refused_by_a_tail_that_trains_nothing_itself() -> None:
    """Every rank 0: no adapter's gradient tells, but the client's tokens must not count."""
    with serving("bad", lora=LoraSpec(0)) as served:
        session = served.ready("bad")
        activations, mask, labels = batch("bad", 0)
        poison = torch.full_like(activations, 3e38)
        error = refused(lambda: session.train_step(0, poison, mask, labels), "non_finite")
        assert "activation gradients" in str(error)
        assert served.service.close_round()["bad"].tokens == 0


def test_a_batch_that_breaks_the_tail_harms_its_sender_alone(alone: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that does not fit into the tail's memory."""
    with serving("bad", "good", concurrency=2) as served:
        accumulate = TailTrainer._accumulate

        def out_of_memory(trainer: TailTrainer, group: Any, total: int) -> Any:
            if any(request.client == "bad" for request in group):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return accumulate(trainer, group, total)

        monkeypatch.setattr(TailTrainer, "_accumulate", out_of_memory)
        good, bad = served.ready("good"), served.ready("bad")

        def breaking() -> list[StepReply]:
            with pytest.raises(ExchangeError, match="out of memory"):
                bad.train_step(0, *batch("bad", 0))
            return []

        together({"good": lambda: train(good, "good", range(STEPS)), "bad": breaking})
        assert_same(learned(served.tail), alone)


def test_a_score_that_is_not_finite_is_refused() -> None:
    with serving("a", architecture="gpt2", mode="evaluate") as served:
        session = served.ready("a")
        activations, mask, labels = batch("a", 0)
        assert session.score_step(0, activations, mask, labels).tokens > 0
        refused(lambda: session.score_step(1, activations * 1e30, mask, labels), "non_finite")


def test_training_in_an_evaluation_round_is_refused() -> None:
    with serving("a", mode="evaluate") as served:
        session = served.ready("a")
        refused(lambda: session.train_step(0, *batch("a", 0)), "wrong_kind")


# ---------------------------------------------------------------------------------------------- the server's side


@pytest.mark.parametrize("side", ["tail", "service"])
def test_a_round_closed_under_a_waiting_client_ends_its_wait(side: str) -> None:
    with serving("good", "never", concurrency=2) as served, ExitStack() as stack:
        _, step = in_step(served, "good", 0, stack)
        if side == "tail":
            served.tail.close_training()
        else:
            served.service.close_round()
        refused(lambda: step.result(SOON_S), "round_closed")


def test_a_server_that_stops_ends_the_wait() -> None:
    with serving("good", "never", concurrency=2) as served, ExitStack() as stack:
        _, step = in_step(served, "good", 0, stack)
        served.service.stop()
        with pytest.raises(ExchangeError) as refusal:
            step.result(SOON_S)
        assert refusal.value.code in {"round_closed", "tail_lost"}


def test_joining_after_the_tail_closed_its_round_is_refused() -> None:
    with serving("good") as served:
        served.tail.close_training()
        with RemoteTail(served.task("good"), MAX_FRAME, connect) as session:
            session.fetch_delta(0)
            refused(lambda: session.train_step(0, *batch("good", 0)), "round_closed")


def test_a_step_that_takes_too_long_is_given_up() -> None:
    with serving("good", "never", concurrency=2, limits=BarrierLimits(30.0, 30.0, 0.3)) as served:
        session = served.ready("good")
        error = refused(lambda: session.train_step(0, *batch("good", 0)), "step_timeout")
        assert "within 0.3 s" in str(error)


def test_the_time_limit_of_the_task_ends_the_wait() -> None:
    with serving("good", "never", concurrency=2) as served:
        with RemoteTail(replace(served.task("good"), time_limit_s=0.5), MAX_FRAME, connect) as session:
            session.fetch_delta(0)
            with pytest.raises(ExchangeError, match=r"time limit is over\. Raise round-limit-s") as refusal:
                session.train_step(0, *batch("good", 0))
        assert refusal.value.code == "round_timeout"
        wait_until(lambda: not asked(served, "good"), "the tail to let go")


def test_a_progress_callback_that_fails_ends_nothing(alone: State, caplog: pytest.LogCaptureFixture) -> None:
    def full_disk(report: StepReport) -> None:
        raise OSError("No space left on device")

    with serving("good", on_step=full_disk) as served:
        train(served.ready("good"), "good", range(STEPS))
        assert_same(learned(served.tail), alone)
        assert served.tail.close_training() == {}
    failed = "the progress callback (on_step) failed, training goes on: "
    assert caplog.text.count(f"{failed}OSError: No space left on device") == 1
    assert f"{failed}{STEPS} times in all (OSError)" in caplog.text


def test_a_worker_that_ends_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    def stop(report: StepReport) -> None:
        raise SystemExit("stopped")

    with serving("good", on_step=stop) as served:
        session = served.ready("good")
        train(session, "good", range(1))
        with pytest.raises(ExchangeError) as refusal:
            session.train_step(1, *batch("good", 1))
        assert refusal.value.code in {"tail_failed", "round_closed"}
    assert "the tail's worker ended, the round cannot go on: SystemExit('stopped')" in caplog.text


def test_deltas_that_fail_are_an_error_at_the_client() -> None:
    def broken(have: int, cut: int, own: OwnRound | None) -> tuple[int, bool, dict[str, Tensor]]:
        raise RuntimeError("no such version")

    with serving("good", deltas=broken) as served, pytest.raises(ExchangeError, match="no such version"):
        served.ready("good")


def test_an_unreachable_tail_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_transport, "CONNECT_S", 1.0)
    with serving("good") as served:
        task = served.task("good")
    started = time.monotonic()
    error = refused(lambda: RemoteTail(task, MAX_FRAME, connect).__enter__(), "tail_unreachable")
    assert time.monotonic() - started < 1.0 + SOON_S
    assert task.address in str(error)
    assert "within 1 s" in str(error)
    assert "tail-address" in str(error)


@contextmanager
def imposter(answer: bytes) -> Iterator[RoundTask]:
    """A server that answers every frame with `answer`, and a task that leads to it."""
    handler = grpc.stream_stream_rpc_method_handler(lambda frames, context: (answer for _ in frames))
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, [grpc.method_handlers_generic_handler("hsplit_flwr.Tail", {"Exchange": handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        plan = ClientPlan(CUT, LORA)
        yield RoundTask("run", 1, "good", "train", f"127.0.0.1:{port}", "t", 20.0, MAX_FRAME, plan, CONFIG)
        server.stop(None).wait(SOON_S)


GRADIENT = header("good", kind="gradient")
ANSWERS: dict[str, tuple[bytes, str]] = {
    "noise": (b"\0" * 100, "malformed_frame"),
    "too large": (encode(GRADIENT, {"gradient": torch.zeros(64, 128, HIDDEN_SIZE)}), "frame_too_large"),
    "another step's": (encode(replace(GRADIENT, step=1), {"gradient": batch("good", 0)[0]}), "wrong_step"),
    "another client's": (encode(replace(GRADIENT, client="bad"), {"gradient": batch("good", 0)[0]}), "wrong_client"),
    "a score": (encode(replace(GRADIENT, kind="score")), "wrong_kind"),
    "no gradient": (encode(GRADIENT), "wrong_tensors"),
    "shape": (encode(GRADIENT, {"gradient": torch.zeros(1, REAL, HIDDEN_SIZE)}), "wrong_shape"),
    "NaN": (encode(GRADIENT, {"gradient": torch.full((REAL, HIDDEN_SIZE), float("nan"))}), "non_finite"),
}


@pytest.mark.parametrize(("answer", "code"), ANSWERS.values(), ids=ANSWERS)
def test_a_client_refuses_a_bad_answer(answer: bytes, code: str) -> None:
    with imposter(answer) as task, RemoteTail(task, MAX_FRAME, connect) as session:
        refused(lambda: session.train_step(0, *batch("good", 0)), code)


# ---------------------------------------------------------------------------------------------- TLS


def trusting(roots: bytes | None) -> Connect:
    return partial(connect, tls=ClientTls(roots) if roots else None)


def test_tls(certificates: tuple[Path, Path, bytes], alone: State, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key, other = certificates
    with serving("good", certificate=certificate, private_key=key) as served:
        task = served.task("good")
        with monkeypatch.context() as patch:
            patch.setattr(grpc_transport, "CONNECT_S", 1.0)
            for roots in (None, other):
                stranger = RemoteTail(task, MAX_FRAME, trusting(roots))
                error = refused(stranger.__enter__, "tail_unreachable")
                assert "TLS" in str(error)
        with RemoteTail(task, MAX_FRAME, trusting(certificate.read_bytes())) as session:
            session.fetch_delta(0)
            train(session, "good", range(STEPS))
        assert_same(learned(served.tail), alone)


def test_a_tls_client_does_not_talk_to_a_plaintext_tail(
    certificates: tuple[Path, Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_transport, "CONNECT_S", 1.0)
    with serving("good") as served:
        roots = certificates[0].read_bytes()
        refused(lambda: RemoteTail(served.task("good"), MAX_FRAME, trusting(roots)).__enter__(), "tail_unreachable")


@pytest.mark.parametrize(
    ("advertise", "expected"), [("", "127.0.0.1:{}"), ("tail.example", "tail.example:{}"), ("nat:77", "nat:77")]
)
def test_the_address_that_clients_are_told(advertise: str, expected: str) -> None:
    with serving("good", advertise=advertise) as served:
        port = served.service.address.rpartition(":")[2]
        assert served.service.address == expected.format(port)
        assert int(port) > 0


# ---------------------------------------------------------------------------------------------- bytes


def traffic(name: str) -> tuple[int, int]:
    """Bytes up and down of hello, delta and three steps, as both sides count them."""
    with serving("good", codec=name) as served:
        with RemoteTail(served.task("good"), MAX_FRAME, connect) as session:
            session.fetch_delta(0)
            replies = train(session, "good", range(STEPS))
            ticket = served.service.close_round()["good"]
        assert ticket.steps == STEPS
        assert (session.bytes_up, session.bytes_down) == (ticket.bytes_up, ticket.bytes_down)
        assert all(gradient_of(reply).dtype == DTYPES[name] for reply in replies)
        assert all(gradient_of(reply).abs().max() > 0 for reply in replies)
    return ticket.bytes_up, ticket.bytes_down


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_activations_halve_the_bytes(name: str) -> None:
    up, down = traffic(name)
    up32, down32 = traffic("fp32")
    halved = STEPS * REAL * HIDDEN_SIZE * 2
    tolerance = STEPS * 32  # "F32" and "BF16", loss digits, padding of the header
    assert up32 - up == pytest.approx(halved, abs=tolerance)
    assert down32 - down == pytest.approx(halved, abs=tolerance)


@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_half_precision_activations_train_like_full_ones(name: str, tolerance: float) -> None:
    _, replies = reference({"good": 0})
    with serving("good", codec=name) as served:
        (reply,) = train(served.ready("good"), "good", range(1))
    exact = replies["good0"]
    assert reply.loss == pytest.approx(exact.loss, rel=tolerance)
    error = (gradient_of(reply).float() - gradient_of(exact)).norm() / gradient_of(exact).norm()
    assert 0 < error < tolerance


def test_an_activation_beyond_fp16_is_refused_with_the_remedy() -> None:
    with serving("good", codec="fp16") as served:
        session = served.ready("good")
        activations, mask, labels = batch("good", 0)
        error = refused(lambda: session.train_step(0, activations * 1e6, mask, labels), "non_finite")
        assert "use bf16 instead of fp16" in str(error)


# ---------------------------------------------------------------------------------------------- weight delta


def test_the_delta_comes_in_frames_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_frames, "DELTA_FRAME_BYTES", 1000)
    sizes = [100, 100, 100, 5000, 100, 249, 1, 1]  # fp32: one tensor is larger than a frame
    sent = {f"t{i}": torch.randn(size) for i, size in enumerate(sizes)}
    asked_for = []

    def deltas(have: int, cut: int, own: OwnRound | None) -> tuple[int, bool, dict[str, Tensor]]:
        asked_for.append((have, cut))
        return 9, False, sent

    frames: list[list[str]] = []
    with serving("good", deltas=deltas) as served, RemoteTail(served.task("good"), MAX_FRAME, connect) as session:
        receive = session._receive

        def watch(*due: Any, **part: Any) -> Any:
            frame = receive(*due, **part)
            frames.append(sorted(frame.tensors))
            return frame

        monkeypatch.setattr(session, "_receive", watch)
        version, whole, tensors = session.fetch_delta(4)
        received, frames_of_delta = session.bytes_down, list(frames)
        train(session, "good", range(1))  # the stream goes on with the steps
        assert served.service.close_round()["good"].delta_bytes == received
    assert (version, whole, asked_for) == (9, False, [(4, CUT)])
    assert tensors.keys() == sent.keys()
    assert all(torch.equal(tensors[name], sent[name]) for name in sent)
    assert frames_of_delta == [["t0", "t1"], ["t2"], ["t3"], ["t4"], ["t5", "t6"], ["t7"]]


def test_no_delta_is_one_empty_frame() -> None:
    with serving("good", deltas=lambda have, cut, own: (3, False, {})) as served:
        assert served.fresh("good").fetch_delta(3) == (3, False, {})


def test_a_delta_above_the_clients_limit_is_refused() -> None:
    large = {"t": torch.zeros(MAX_FRAME // 4 + 1)}
    with serving("good", deltas=lambda have, cut, own: (1, True, large)) as served:
        session = served.fresh("good")
        error = refused(lambda: session.fetch_delta(0), "frame_too_large")
        assert "raise max-frame-mib" in str(error)


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0"])
def test_an_address_that_nobody_can_connect_to_is_a_clear_error(bind: str) -> None:
    """Clients of a deployment were told to connect to 0.0.0.0, and each found nobody there."""
    with pytest.raises(ConfigError, match=r"Expected an address that clients can reach, found only .*tail-address"):
        TailService(make_tail("llama"), no_delta, "run", ServiceConfig(bind=bind))
