"""Who is in the next step: gate, barrier and stragglers on a clock that the tests turn; no waiting but for threads."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest

from hsplit_flwr.errors import ConfigError, ExchangeError
from hsplit_flwr.training import barrier as barrier_module
from hsplit_flwr.training.barrier import BarrierLimits, StepBarrier

pytestmark = pytest.mark.timeout(20)

GATE_S, STRAGGLER_S = 60.0, 30.0
LIMITS = BarrierLimits(GATE_S, STRAGGLER_S, 300.0)
SOON_S = 5.0
"""what must happen is given this long"""
NOT_S = 0.04
"""what must not happen is watched this long: eight polls of the barrier"""

Step = list[str] | None
Take = Callable[[StepBarrier[str]], "Future[Step]"]


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Iterator[Take]:
    """Takes the next step in a thread of its own; barriers are closed at the end."""
    monkeypatch.setattr(barrier_module, "_POLL_S", NOT_S / 8)
    taken_from: list[StepBarrier[str]] = []
    with ThreadPoolExecutor(8) as pool:

        def start(barrier: StepBarrier[str]) -> "Future[Step]":
            taken_from.append(barrier)
            step = pool.submit(step_of, barrier)
            while not (step.done() or barrier._changed._waiters):  # type: ignore[attr-defined]
                time.sleep(0.001)  # the clock is not turned before the thread has looked at it
            return step

        yield start
        for barrier in taken_from:
            barrier.close()


def step_of(barrier: StepBarrier[str]) -> Step:
    turn = barrier.take()
    return None if turn is None else turn.requests


def waits(step: "Future[Step]") -> bool:
    try:
        step.result(NOT_S)
    except FutureTimeoutError:
        return True
    return False


def joint(clients: Iterable[str], concurrency: int, clock: Clock) -> StepBarrier[str]:
    """All of a step in one turn."""
    return StepBarrier(clients, concurrency, LIMITS, together=True, clock=clock)


def running(clock: Clock, take: Take, members: str, to_come: str = "", concurrency: int = 1) -> StepBarrier[str]:
    """A barrier whose gate has opened: `members` have taken one step together."""
    barrier: StepBarrier[str] = StepBarrier(
        [*members, *to_come], max(concurrency, len(members)), LIMITS, together=True, clock=clock
    )
    for client in members:
        barrier.join(client)
    for client in members:
        barrier.ask(client, f"{client}0")
    assert take(barrier).result(SOON_S) == [f"{client}0" for client in sorted(members)]
    return barrier


# ---------------------------------------------------------------------------------------------- the start gate


def test_the_gate_waits_for_as_many_as_run_at_a_time(clock: Clock, take: Take) -> None:
    barrier: StepBarrier[str] = joint("abcd", 3, clock)
    step = take(barrier)
    barrier.join("c")
    barrier.ask("c", "c0")
    barrier.join("a")
    barrier.ask("a", "a0")
    clock.now += GATE_S - 1
    assert waits(step)
    barrier.join("b")
    assert waits(step)  # the gate is open, the barrier waits for b's request
    barrier.ask("b", "b0")
    assert step.result(SOON_S) == ["a0", "b0", "c0"]
    assert barrier.dropped == {}


def test_the_gate_waits_for_fewer_where_fewer_are_left(clock: Clock, take: Take) -> None:
    barrier: StepBarrier[str] = joint("ab", 5, clock)
    barrier.join("a")
    barrier.ask("a", "a0")
    step = take(barrier)
    assert waits(step)
    barrier.join("b")
    barrier.ask("b", "b0")
    assert step.result(SOON_S) == ["a0", "b0"]


def test_the_gate_waits_for_fewer_after_a_client_left(clock: Clock, take: Take) -> None:
    barrier: StepBarrier[str] = joint("ab", 5, clock)
    barrier.join("a")
    barrier.ask("a", "a0")
    step = take(barrier)
    barrier.join("b")
    barrier.leave("b")
    assert step.result(SOON_S) == ["a0"]


@pytest.mark.parametrize("start", [0.0, 1e6], ids=["clock-at-zero", "clock-running"])
def test_the_gate_opens_after_its_time(take: Take, start: float) -> None:
    clock = Clock(start)
    barrier: StepBarrier[str] = joint("abc", 3, clock)
    barrier.join("a")
    step = take(barrier)
    clock.now += 20.0
    barrier.ask("a", "a0")
    clock.now += GATE_S - 20.0 - 0.1  # the gate's time counts from the join
    assert waits(step)
    clock.now += 0.1
    assert step.result(SOON_S) == ["a0"]
    assert barrier.dropped == {}  # who has not joined is no straggler


def test_the_straggler_limit_starts_when_the_gate_opens(clock: Clock, take: Take) -> None:
    barrier: StepBarrier[str] = joint("ab", 2, clock)
    barrier.join("a")
    barrier.ask("a", "a0")
    step = take(barrier)
    clock.now += STRAGGLER_S + 5
    assert waits(step)
    barrier.join("b")  # opens the gate
    assert waits(step)
    clock.now += STRAGGLER_S - 1
    assert waits(step)
    barrier.ask("b", "b0")
    assert step.result(SOON_S) == ["a0", "b0"]


def test_who_comes_late_joins_the_running_ones_without_a_gate(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "ab", to_come="cd", concurrency=2)
    barrier.join("c")
    step = take(barrier)
    for client in "abc":
        barrier.ask(client, f"{client}1")
    assert step.result(SOON_S) == ["a1", "b1", "c1"]


def test_clients_come_in_waves(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "ab", to_come="cde", concurrency=2)
    barrier.leave("a")
    barrier.leave("b")
    barrier.join("c")
    barrier.ask("c", "c0")
    step = take(barrier)
    assert waits(step)  # a new wave waits for the gate again
    barrier.join("d")
    barrier.ask("d", "d0")
    assert step.result(SOON_S) == ["c0", "d0"]
    barrier.leave("c")
    barrier.leave("d")
    barrier.join("e")
    barrier.ask("e", "e0")
    assert take(barrier).result(SOON_S) == ["e0"]  # the last wave is smaller
    assert barrier.dropped == {}


@pytest.mark.parametrize("concurrency", [0, -3, 1])
def test_a_concurrency_of_one_or_less_waits_for_nobody(clock: Clock, take: Take, concurrency: int) -> None:
    barrier: StepBarrier[str] = joint("ab", concurrency, clock)
    barrier.join("b")
    barrier.ask("b", "b0")
    assert take(barrier).result(SOON_S) == ["b0"]


# ---------------------------------------------------------------------------------------------- stragglers


def test_a_straggler_is_dropped_from_the_step_not_from_the_round(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "abc")
    step = take(barrier)
    barrier.ask("a", "a1")
    clock.now += STRAGGLER_S - 1
    barrier.ask("b", "b1")  # does not start the limit anew
    assert waits(step)
    clock.now += 1
    assert step.result(SOON_S) == ["a1", "b1"]
    assert barrier.dropped == {"c": 1}

    step = take(barrier)  # c is not waited for again ...
    barrier.ask("a", "a2")
    barrier.ask("b", "b2")
    assert step.result(SOON_S) == ["a2", "b2"]
    assert barrier.dropped == {"c": 1}

    barrier.ask("c", "c1")  # ... until it asks
    step = take(barrier)
    assert waits(step)
    barrier.ask("a", "a3")
    barrier.ask("b", "b3")
    assert step.result(SOON_S) == ["a3", "b3", "c1"]

    step = take(barrier)
    barrier.ask("a", "a4")
    barrier.ask("b", "b4")
    assert waits(step)
    clock.now += STRAGGLER_S
    assert step.result(SOON_S) == ["a4", "b4"]
    assert barrier.dropped == {"c": 2}


def test_each_step_has_its_own_straggler_limit(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "ab")
    clock.now += 10 * STRAGGLER_S  # computing, or everybody slow: no request, no limit
    step = take(barrier)
    assert waits(step)
    barrier.ask("a", "a1")
    assert waits(step)
    barrier.ask("b", "b1")
    assert step.result(SOON_S) == ["a1", "b1"]


# ---------------------------------------------------------------------------------------------- leaving


def test_the_others_go_on_at_once_when_the_awaited_client_leaves(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "ab")
    barrier.ask("a", "a1")
    step = take(barrier)
    assert waits(step)
    assert barrier.leave("b") is None
    assert step.result(SOON_S) == ["a1"]
    assert barrier.dropped == {}


def test_the_request_of_a_client_that_left_is_in_no_step(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "abc")
    barrier.ask("a", "a1")
    barrier.ask("b", "b1")
    step = take(barrier)
    assert barrier.leave("a") == "a1"
    assert barrier.leave("a") is None
    assert waits(step)
    barrier.ask("c", "c1")
    assert step.result(SOON_S) == ["b1", "c1"]


def test_the_limit_is_forgotten_with_the_only_request(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "abc")
    step = take(barrier)
    barrier.ask("a", "a1")
    clock.now += STRAGGLER_S - 1
    barrier.leave("a")
    clock.now += STRAGGLER_S
    assert waits(step)
    barrier.ask("b", "b1")
    clock.now += STRAGGLER_S - 1
    assert waits(step)  # b's own limit, not what is left of a's
    clock.now += 1
    assert step.result(SOON_S) == ["b1"]


def test_leaving_twice_or_without_having_joined_is_harmless(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "a", to_come="b")
    assert barrier.leave("b") is None
    assert barrier.leave("nobody") is None
    barrier.join("b")
    barrier.ask("a", "a1")
    barrier.ask("b", "b0")
    assert take(barrier).result(SOON_S) == ["a1", "b0"]


# ---------------------------------------------------------------------------------------------- refusals, closing


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ExchangeError, match="Expected") as error:
        action()
    return error.value.code


def test_only_clients_still_to_come_may_join(clock: Clock) -> None:
    barrier: StepBarrier[str] = joint("ab", 1, clock)
    assert refusal(lambda: barrier.join("stranger")) == "unknown_client"
    barrier.join("a")
    assert refusal(lambda: barrier.join("a")) == "unknown_client"
    barrier.leave("a")
    assert refusal(lambda: barrier.join("a")) == "unknown_client"
    barrier.join("b")


def test_a_second_request_is_refused_and_the_first_one_stays(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "a")
    barrier.ask("a", "a1")
    assert refusal(lambda: barrier.ask("a", "a2")) == "wrong_step"
    assert take(barrier).result(SOON_S) == ["a1"]


def test_only_members_may_ask(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "a", to_come="b")
    assert refusal(lambda: barrier.ask("b", "b0")) == "round_closed"
    barrier.leave("a")
    assert refusal(lambda: barrier.ask("a", "a1")) == "round_closed"


def test_closing_wakes_the_taker_and_returns_what_nobody_took(clock: Clock, take: Take) -> None:
    barrier = running(clock, take, "abc", to_come="d")
    barrier.ask("a", "a1")
    barrier.ask("b", "b1")
    step = take(barrier)
    assert waits(step)
    assert sorted(barrier.close()) == ["a1", "b1"]
    assert step.result(SOON_S) is None
    assert barrier.close() == []
    assert barrier.take() is None
    assert refusal(lambda: barrier.ask("c", "c1")) == "round_closed"
    assert refusal(lambda: barrier.join("d")) == "round_closed"


def test_closing_wakes_a_taker_without_requests(clock: Clock) -> None:
    """With the poll at its real second: the taker is woken, it does not find out by polling."""
    barrier: StepBarrier[str] = joint("a", 1, clock)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(barrier.take)
        with pytest.raises(FutureTimeoutError):
            step.result(NOT_S)
        started = time.perf_counter()
        barrier.close()
        assert step.result(SOON_S) is None
        assert time.perf_counter() - started < 0.5 * barrier_module._POLL_S


@pytest.mark.parametrize("name", ["start_gate_s", "straggler_limit_s", "step_limit_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_waiting_times_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"Expected {name} > 0 s, found {value} \(run config: {name.replace('_', '-')}\)"
    ):
        BarrierLimits(**{name: value})


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_grace_period_may_be_none_but_not_endless(value: float) -> None:
    assert BarrierLimits(reconnect_grace_s=0.0).reconnect_grace_s == 0.0
    with pytest.raises(ConfigError, match=rf"reconnect_grace_s >= 0 s, found {value} .*reconnect-grace-s"):
        BarrierLimits(reconnect_grace_s=value)


# ---------------------------------------------------------------------------------------------- in real time


@pytest.mark.parametrize("seed", range(3))
def test_every_request_is_taken_exactly_once_whatever_the_order(seed: int) -> None:
    """Twelve clients on four actors; some vanish, with and without a request pending. Nothing is lost or stuck."""
    clients = [f"{n:02}" for n in range(12)]
    barrier: StepBarrier[tuple[str, int, threading.Event]] = StepBarrier(
        clients, 4, BarrierLimits(0.05, 0.03, 5.0), together=True
    )
    taken: list[tuple[str, int]] = []
    steps: list[list[str]] = []

    def tail() -> None:
        while (turn := barrier.take()) is not None:
            steps.append([client for client, _, _ in turn.requests])
            for client, number, done in turn.requests:
                taken.append((client, number))
                done.set()

    def client_round(client: str) -> list[tuple[str, int]]:
        dice = random.Random(f"{seed} {client}")
        vanishes_at = dice.choice([None, None, 0, 2])
        sent = []
        barrier.join(client)
        for number in range(5):
            time.sleep(dice.random() * 0.01 if dice.random() < 0.9 else 0.05)
            done = threading.Event()
            barrier.ask(client, (client, number, done))
            if number == vanishes_at:
                break
            assert done.wait(SOON_S), f"{client} got no answer"
            sent.append((client, number))
        untaken = barrier.leave(client)
        if number == vanishes_at and untaken is None:
            assert done.wait(SOON_S)  # it was taken just before
            sent.append((client, number))
        return sent

    worker = threading.Thread(target=tail)
    worker.start()
    with ThreadPoolExecutor(4) as actors:
        sent = [request for round_number in actors.map(client_round, clients) for request in round_number]
    assert barrier.close() == []
    worker.join(SOON_S)
    assert not worker.is_alive()
    assert sorted(taken) == sorted(sent)
    assert len(sent) >= 30  # most clients do not vanish
    assert all(step == sorted(set(step)) and len(step) <= 4 for step in steps)
    assert max(map(len, steps)) > 1


def test_the_gate_does_not_wait_for_a_client_that_failed_before_it_joined() -> None:
    """A client that raised while it loaded its data cost every other client the whole start gate, round after round."""
    clock = Clock()
    barrier = StepBarrier[str](["a", "b", "c"], 3, LIMITS, together=True, clock=clock)
    barrier.withdraw("c")
    barrier.join("a")
    barrier.join("b")
    barrier.ask("a", "A")
    barrier.ask("b", "B")
    assert step_of(barrier) == ["A", "B"]
    barrier.join("c")  # its second try got through after all
    barrier.ask("c", "C")
    barrier.ask("a", "A2")
    barrier.ask("b", "B2")
    assert step_of(barrier) == ["A2", "B2", "C"]


# ---------------------------------------------------------------------------------------------- turns


def in_turns(members: str, clock: Clock) -> StepBarrier[str]:
    barrier: StepBarrier[str] = StepBarrier(members, len(members), LIMITS, clock=clock)
    for client in members:
        barrier.join(client)
    return barrier


def test_each_has_its_turn_in_the_order_of_names_and_as_soon_as_it_has_asked(clock: Clock, take: Take) -> None:
    """The tail computes a's batch while b's is on the way; c, who was first, waits for both."""
    barrier = in_turns("abc", clock)
    barrier.ask("c", "c0")
    turn = take(barrier)
    assert waits(turn)
    barrier.ask("a", "a0")
    assert turn.result(SOON_S) == ["a0"]
    turn = take(barrier)
    assert waits(turn)
    barrier.ask("a", "a1")  # a is early for the next step
    assert waits(turn)
    barrier.ask("b", "b0")
    assert turn.result(SOON_S) == ["b0"]
    assert barrier.take() == (["c0"], True)
    assert barrier.take() == (["a1"], False)


def test_a_batch_in_parts_is_one_turn(clock: Clock, take: Take) -> None:
    """All parts of a batch meet the same adapters: nobody's step is taken in between."""
    barrier = in_turns("ab", clock)
    barrier.ask("a", "a0.0", last=False)
    barrier.ask("b", "b0.0", last=False)
    assert barrier.take() == (["a0.0"], False)
    turn = take(barrier)
    assert waits(turn)
    barrier.ask("a", "a0.1")
    assert turn.result(SOON_S) == ["a0.1"]
    assert barrier.take() == (["b0.0"], False)
    barrier.ask("b", "b0.1")
    assert barrier.take() == (["b0.1"], True)


def test_joint_parts_are_taken_together_until_everybodys_last(clock: Clock, take: Take) -> None:
    barrier = joint("ab", 2, clock)
    for client in "ab":
        barrier.join(client)
    barrier.ask("a", "a0.0", last=False)
    barrier.ask("b", "b0.0")
    assert barrier.take() == (["a0.0", "b0.0"], False)
    barrier.ask("b", "b1.0")  # of the next step
    turn = take(barrier)
    assert waits(turn)
    barrier.ask("a", "a0.1")
    assert turn.result(SOON_S) == ["a0.1"]
    assert barrier.dropped == {}


def test_a_straggler_costs_its_own_turn(clock: Clock, take: Take) -> None:
    barrier = in_turns("abc", clock)
    barrier.ask("c", "c0")
    turn = take(barrier)
    clock.now += STRAGGLER_S - 1
    barrier.ask("b", "b0")
    assert waits(turn)
    clock.now += 1
    assert turn.result(SOON_S) == ["b0"]
    assert barrier.dropped == {"a": 1}
    barrier.ask("a", "a0")  # late, but the step is still under way
    assert barrier.take() == (["a0"], False)
    assert barrier.take() == (["c0"], True)


def test_the_limit_does_not_run_while_the_tail_computes(clock: Clock, take: Take) -> None:
    """A long step made those late who were still on their way with the next one."""
    barrier = in_turns("ab", clock)
    barrier.ask("a", "a0")
    assert barrier.take() == (["a0"], False)
    barrier.ask("a", "a1")
    clock.now += 2 * STRAGGLER_S  # the tail computes
    turn = take(barrier)
    assert waits(turn)
    barrier.ask("b", "b0")
    assert turn.result(SOON_S) == ["b0"]
    assert barrier.dropped == {}


@pytest.mark.parametrize("parts_left", [False, True], ids=["before its turn", "amid its turn"])
def test_a_step_ends_without_those_who_leave(parts_left: bool, clock: Clock, take: Take) -> None:
    barrier = in_turns("ab", clock)
    barrier.ask("a", "a0")
    assert barrier.take() == (["a0"], False)
    if parts_left:
        barrier.ask("b", "b0.0", last=False)
        assert barrier.take() == (["b0.0"], False)
    turn = take(barrier)
    assert waits(turn)
    barrier.leave("b")
    assert turn.result(SOON_S) == []
    barrier.ask("a", "a1")
    assert barrier.take() == (["a1"], True)


def test_who_is_late_amid_its_batch_goes_on_with_it_later(clock: Clock, take: Take) -> None:
    barrier = in_turns("ab", clock)
    barrier.ask("a", "a0.0", last=False)
    barrier.ask("b", "b0")
    assert barrier.take() == (["a0.0"], False)
    turn = take(barrier)
    assert waits(turn)
    clock.now += STRAGGLER_S
    assert turn.result(SOON_S) == ["b0"]
    assert barrier.dropped == {"a": 1}
    barrier.ask("a", "a0.1")
    barrier.ask("b", "b1")
    assert barrier.take() == (["a0.1"], False)
    assert barrier.take() == (["b1"], True)
