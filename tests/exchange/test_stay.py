"""A client's stay in a round over several streams, with a session of this file's own: no transport, no model."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange import stay as stay_module
from hsplit_flwr.exchange.stay import Stay, StreamReplacedError
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession

pytestmark = pytest.mark.timeout(20)

SOON_S = 10.0
LONG_S = 600.0


class Session(TailSession):
    """Counts how often it was closed; nobody trains here."""

    def __init__(self) -> None:
        self.closed = 0

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def receive_part(self) -> StepReply:
        raise NotImplementedError

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        raise NotImplementedError

    def close(self) -> None:
        self.closed += 1


def joined(stay: Stay) -> tuple[int, Session]:
    stream, session = stay.arrive(), Session()
    stay.join(stream, lambda: session)
    return stream, session


def answer(stay: Stay, stream: int, step: int, keep: int = 2) -> bytes:
    return stay.answer(stream, step, 0, lambda session: bytes([step]) * 100, keep)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_no_more_answers_are_kept_than_may_be_missing() -> None:
    stay = Stay("a")
    stream, _ = joined(stay)
    for step in range(50):
        answer(stay, stream, step)
        assert stay.kept_bytes <= 200
    stay.leave(stream)
    assert stay.kept_bytes == 0


@pytest.mark.parametrize(("at", "owed"), [(2, []), (3, [3, 4]), (4, [4]), (5, []), (9, [])])
def test_who_is_back_gets_the_answers_that_it_lacks(at: int, owed: list[int]) -> None:
    """Five steps were answered, of which two answers are kept; what was heard of before is forgotten."""
    stay = Stay("a")
    stream, _ = joined(stay)
    for step in range(5):
        answer(stay, stream, step)
    found = stay.join(stay.arrive(), Session, (at, 0))
    assert [kept.step for kept in found] == owed
    assert stay.kept_bytes == 100 * len(owed)


def test_an_answer_under_way_is_waited_for_and_given_once() -> None:
    stay = Stay("a")
    first, session = joined(stay)
    begun, go_on = threading.Event(), threading.Event()
    computed = []

    def slow(session: TailSession) -> bytes:
        begun.set()
        assert go_on.wait(SOON_S)
        computed.append(session)
        return b"slow"

    with ThreadPoolExecutor(2) as pool:
        pool.submit(stay.answer, first, 0, 0, slow, 1)
        assert begun.wait(SOON_S)
        back = pool.submit(lambda: stay.join(stay.arrive(), Session, (0, 0)))
        time.sleep(0.05)
        assert not back.done()
        go_on.set()
        assert [kept.frame for kept in back.result(SOON_S)] == [b"slow"]
    assert computed == [session]
    with pytest.raises(StreamReplacedError):
        answer(stay, first, 1)


def test_of_streams_that_wait_the_newest_goes_on_and_no_thread_stays_behind() -> None:
    stay = Stay("a")
    first, _ = joined(stay)
    begun, go_on = threading.Event(), threading.Event()

    def slow(session: TailSession) -> bytes:
        begun.set()
        assert go_on.wait(SOON_S)
        return b"slow"

    with ThreadPoolExecutor(8) as pool:
        pool.submit(stay.answer, first, 0, 0, slow, 1)
        assert begun.wait(SOON_S)
        streams = [stay.arrive() for _ in range(6)]
        waiting = [pool.submit(stay.join, stream, Session, (0, 0)) for stream in streams]
        for replaced in waiting[:-1]:
            with pytest.raises(StreamReplacedError):
                replaced.result(SOON_S)  # before the answer is there
        go_on.set()
        assert len(waiting[-1].result(SOON_S)) == 1


def test_an_error_while_away_is_what_the_client_hears() -> None:
    stay = Stay("a")
    stream, session = joined(stay)
    stay.break_off(stream, LONG_S)

    def failing(session: TailSession) -> bytes:
        raise ExchangeError("non_finite", "Expected finite numbers, found none.")

    with pytest.raises(ExchangeError):
        stay.answer(stream, 0, 0, failing, 1)
    assert session.closed == 1
    with pytest.raises(ExchangeError) as refusal:
        stay.arrive()
    assert refusal.value.code == "non_finite"


def test_the_grace_period_ends_a_stay_unless_the_client_is_back() -> None:
    stay = Stay("a")
    stream, session = joined(stay)
    stay.break_off(stream, LONG_S)
    assert stay.is_away
    stream = stay.arrive()
    assert not stay.is_away
    stay.break_off(stream - 1, 0.0)  # the old stream's end, heard of late
    assert session.closed == 0
    stay.break_off(stream, 0.01)
    until(lambda: session.closed == 1)
    with pytest.raises(ExchangeError, match=r"within 0\.01 s .*Raise reconnect-grace-s") as refusal:
        stay.arrive()
    assert refusal.value.code == "too_late"


def test_nobody_comes_back_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stay_module, "MOST_STREAMS", 3)
    stay = Stay("a")
    for _ in range(3):
        stay.arrive()
    with pytest.raises(ExchangeError, match="at most 3 streams") as refusal:
        stay.arrive()
    assert refusal.value.code == "too_many_streams"


def test_who_left_does_not_come_back() -> None:
    stay = Stay("a")
    stream, session = joined(stay)
    stay.leave(stream)
    stay.break_off(stream, LONG_S)
    assert (stay.is_away, session.closed) == (False, 1)
    with pytest.raises(ExchangeError) as refusal:
        stay.arrive()
    assert refusal.value.code == "unauthenticated"
