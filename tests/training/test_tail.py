"""The shared tail's thread: what callbacks and optional work raise ends nobody's round; no wait is for ever."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit_flwr.errors import ConfigError, ExchangeError
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import segment_from_model
from hsplit_flwr.training import tail as tail_module
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.local_session import LocalSession
from hsplit_flwr.training.session import BatchPart, StepReply
from hsplit_flwr.training.step import StepReport
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.tail_step import TailTrainer
from tests.helpers.models import HIDDEN_SIZE, VOCAB_SIZE, tiny_model
from tests.helpers.replies import gradient_of
from tests.helpers.states import through_disk

pytestmark = pytest.mark.timeout(60)

CUT, STEPS, SOON_S = 2, 3, 10.0
CONFIG = TrainingConfig(1, STEPS, 1e-2, warmup_steps=0)
LIMITS = BarrierLimits(30.0, 30.0, 30.0)
"""what a client would wait, were nobody to tell it"""
Callback = Callable[[StepReport], None]


def make_tail(
    config: TrainingConfig = CONFIG, on_step: Callback | None = None, limits: BarrierLimits = LIMITS
) -> SharedTail:
    segment = segment_from_model(tiny_model("llama"), CUT)
    return SharedTail(segment, SegmentAdapters(segment, LoraSpec(2, 4.0)), config, limits, on_step)


def ask(session: LocalSession, step: int) -> StepReply:
    generator = torch.Generator().manual_seed(100 * step + ord(session.client))
    activations = torch.randn(2, 6, HIDDEN_SIZE, generator=generator)
    labels = torch.randint(0, VOCAB_SIZE, (2, 6), generator=generator)
    return session.train_step(step, activations, torch.ones(2, 6, dtype=torch.int64), labels)


@contextmanager
def in_round(tail: SharedTail, *clients: str) -> Iterator[list[LocalSession]]:
    tail.open_training(clients, len(clients), adapter_seed=7)
    sessions = [tail.join(client, CUT, 0) for client in clients]
    yield sessions
    for session in sessions:
        session.close()
    tail.close_training()


def play(tail: SharedTail, *clients: str) -> list[list[StepReply]]:
    """A round of `STEPS` steps, every client in a thread."""
    with in_round(tail, *clients) as sessions, ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(lambda session: [ask(session, step) for step in range(STEPS)], sessions))


def assert_same(found: Any, expected: Any) -> None:
    """Two states, bit for bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


# ------------------------------------------------------------------------------------------- what may fail


def test_a_callback_that_raises_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The story: a full disk under a progress line ended the tail's worker, and every client of the round with it."""

    def full_disk(report: StepReport) -> None:
        raise OSError("No space left on device")

    quiet, loud = make_tail(), make_tail(on_step=full_disk)
    expected = play(quiet, "a", "b")
    found = play(loud, "a", "b")
    assert_same(loud.state(), quiet.state())
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(gradient_of(x), gradient_of(y)) for x, y in zip(ours, theirs, strict=True))
    failed = "the progress callback (on_step) failed, training goes on: "
    assert caplog.text.count(f"{failed}OSError: No space left on device") == 1
    assert "in full_disk" in caplog.text  # where, for who wrote it
    assert f"{failed}{STEPS} times in all (OSError)" in caplog.text


@pytest.mark.parametrize(
    "error", [RuntimeError("cuDNN error"), torch.OutOfMemoryError("CUDA out of memory")], ids=["runtime", "memory"]
)
def test_further_passes_that_raise_end_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The story: only a refusal of ours was caught; a further pass out of memory ended the round for everybody."""
    accumulate = TailTrainer._accumulate
    further = threading.local()

    def train_again(trainer: TailTrainer, batches: Any) -> None:
        further.now = True
        try:
            original(trainer, batches)
        finally:
            further.now = False

    def out_of_memory(trainer: TailTrainer, group: Any, total: int) -> Any:
        if getattr(further, "now", False):
            raise error
        return accumulate(trainer, group, total)

    single, several = make_tail(), make_tail(replace(CONFIG, tail_passes=4))
    original = TailTrainer.train_again
    monkeypatch.setattr(TailTrainer, "train_again", train_again)
    monkeypatch.setattr(TailTrainer, "_accumulate", out_of_memory)
    play(single, "a", "b")
    replies = play(several, "a", "b")
    assert [len(steps) for steps in replies] == [STEPS, STEPS]
    assert_same(several.state(), single.state())
    said = "the tail leaves out further passes of this step: "
    assert caplog.text.count(f"{said}{type(error).__name__}: {error}") == 1
    assert f"{said}{STEPS} times in all" in caplog.text


def test_a_round_says_again_what_failed_in_it(caplog: pytest.LogCaptureFixture) -> None:
    def broken(report: StepReport) -> None:
        raise OSError("No space left on device")

    tail = make_tail(on_step=broken)
    play(tail, "a")
    play(tail, "a")
    assert caplog.text.count("training goes on: OSError: No space left on device") == 2


# ------------------------------------------------------------------------------------------- what ends the worker


class Stop(BaseException):
    """Ends a thread."""


def refusal_of(future: "Future[StepReply]") -> ExchangeError:
    error = future.exception(SOON_S)
    assert isinstance(error, ExchangeError)
    return error


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("where", ["train", "train_again"])
def test_whatever_ends_the_worker_everybody_hears_why(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those in the step have nobody left to answer them, those for the next one nobody to take it."""
    holding, go = threading.Event(), threading.Event()

    def stop(*_: Any, **__: Any) -> None:
        holding.set()
        assert go.wait(SOON_S)
        raise Stop("out of threads")

    monkeypatch.setattr(TailTrainer, where, stop)
    tail = make_tail()
    with in_round(tail, "a", "b") as (a, b), ThreadPoolExecutor(3) as pool:
        in_step = [pool.submit(ask, session, 0) for session in (a, b)]
        assert holding.wait(SOON_S)
        if where == "train_again":  # these two have their answers
            assert all(future.result(SOON_S).tokens for future in in_step)
            in_step = [pool.submit(ask, a, 1)]
            wait_until(lambda: a.barrier is not None and bool(a.barrier._pending))
        go.set()
        for future in in_step:
            refusal = refusal_of(future)
            assert refusal.code == "tail_failed"
            assert "Expected the tail to take steps, found its worker ended by Stop('out of threads')" in str(refusal)
        with pytest.raises(ExchangeError, match="worker ended by Stop") as late:  # who was on the way hears it, too
            ask(b, 1)
        assert late.value.code == "tail_failed"
        started = time.monotonic()
    assert time.monotonic() - started < SOON_S  # the end of the round does not wait either
    assert "the tail's worker ended, the round cannot go on: Stop('out of threads')" in caplog.text


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (BatchPart(0, 1, 2), None),
        (BatchPart(0, 0, 4), None),
        (BatchPart(0, 0, 0), None),
        (BatchPart(0, 0, 2), BatchPart(0, 0, 2)),
        (BatchPart(0, 0, 2), BatchPart(0, 1, 3)),
        (BatchPart(0, 0, 2), BatchPart(0, 2, 2)),
    ],
    ids=str,
)
def test_parts_come_in_order_and_no_more_than_were_agreed(first: BatchPart, then: BatchPart | None) -> None:
    tail = make_tail(replace(CONFIG, micro_batches=3))
    sent = (torch.zeros(1, 6, HIDDEN_SIZE), torch.ones(1, 6), torch.zeros(1, 6, dtype=torch.int64))
    with in_round(tail, "a") as (session,):
        if then:
            session.send_part(first, *sent)
        with pytest.raises(ExchangeError, match=r"\[wrong_part\].*Take micro-batches from the task"):
            session.send_part(then or first, *sent)


def test_the_round_after_a_worker_that_ended_is_a_new_one() -> None:
    reports: list[StepReport] = []

    def once(report: StepReport) -> None:
        reports.append(report)
        if len(reports) == 1:
            raise Stop

    tail = make_tail(on_step=once)
    with in_round(tail, "a") as (session,):
        ask(session, 0)
        with pytest.raises(ExchangeError):
            ask(session, 1)
    assert [len(steps) for steps in play(tail, "a")] == [STEPS]
    assert len(reports) == 1 + STEPS


def test_a_step_that_does_not_end_is_not_merged_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters would move while they are aggregated: closing says so, and waits on when it is called again."""
    monkeypatch.setattr(tail_module, "_LEAST_CLOSING_S", 0.1)
    go = threading.Event()

    def slow(report: StepReport) -> None:
        go.wait(SOON_S)

    tail = make_tail(on_step=slow, limits=replace(LIMITS, step_limit_s=0.1))
    with in_round(tail, "a") as (session,):
        session.step_limit_s = SOON_S
        ask(session, 0)
        with pytest.raises(ExchangeError, match=r"last step of the round to end within 0\.1 s.*Raise step-limit-s"):
            tail.close_training()
        go.set()
        wait_until(lambda: not any(thread.name == "tail-steps" for thread in threading.enumerate()))
        assert tail.close_training() == {}


# ------------------------------------------------------------------------------------------- state


def test_a_tail_goes_on_from_its_state_bit_for_bit(tmp_path: Path) -> None:
    config = replace(CONFIG, joint_steps=True)
    tail, restored = make_tail(config), make_tail(config)
    play(tail, "a", "b")
    restored.load_state(through_disk(tail.state(), tmp_path))
    assert_same(restored.state(), tail.state())
    keep = [name for name in tail.adapters.module_names if ".3." in name]
    for one in (tail, restored):
        one.open_training(["a"], 1, 8, keep)
        session = one.join("a", CUT, STEPS)
        for step in range(STEPS):
            ask(session, step)
        session.close()
        one.close_training()
    assert_same(restored.state(), tail.state())


def test_a_state_is_not_loaded_under_an_open_round() -> None:
    tail = make_tail()
    state = tail.state()
    with in_round(tail, "a"), pytest.raises(ConfigError, match=r"Expected no open round, found one\. Load"):
        tail.load_state(state)
