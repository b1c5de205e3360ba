"""The virtual clock against hand-computed rounds, a recursion without events, and what must hold for any round."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.evidence.timeline_plot import COLOURS, draw_timeline, timeline_figure
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.clock import SERVER, ClientWork, Interval, RoundTimeline, play_round
from hsplit_flwr.training.workload import Workload

JOINT = Workload(joint_steps=True)
ROUNDING = 1e-9
"""relative, for sums of the same terms in another order"""
Spans = list[tuple[str, int | None, float, float]]
Round = tuple[list[ClientWork], dict[str, Budget], Budget, float, float]


def device(flops: float, up: float, down: float, latency: float = 0.0) -> Budget:
    return Budget(1, flops, up, down, latency)


def server(flops: float) -> Budget:
    return device(flops, 1, 1)


def spans(timeline: RoundTimeline, who: str) -> Spans:
    return [(i.what, i.step, i.start_s, i.end_s) for i in timeline.of(who)]


def test_one_client_with_latency() -> None:
    # forward 20/10 = 2 s, send 0.5 + 10/5 = 2.5 s, tail 30/15 = 2 s, receive 0.5 + 5/10 = 1 s, backward 40/10 = 4 s;
    # download 0.5 + 20/10 = 2.5 s, upload 0.5 + 15/5 = 3.5 s, aggregate 30/15 = 2 s
    work = ClientWork("0", 2, 20, 40, 10, 5, 30, 20, 15)
    timeline = play_round([work], {"0": device(10, 5, 10, 0.5)}, server(15), start_s=100, aggregate_flops=30)
    assert spans(timeline, "0") == [
        ("download", None, 100, 102.5),
        ("forward", 0, 102.5, 104.5),
        ("send", 0, 104.5, 107),
        ("wait", 0, 107, 109),
        ("receive", 0, 109, 110),
        ("backward", 0, 110, 114),
        ("forward", 1, 114, 116),
        ("send", 1, 116, 118.5),
        ("wait", 1, 118.5, 120.5),
        ("receive", 1, 120.5, 121.5),
        ("backward", 1, 121.5, 125.5),
        ("upload", None, 125.5, 129),
        ("wait", None, 129, 131),
    ]
    assert spans(timeline, SERVER) == [
        ("wait", 0, 100, 107),
        ("tail", 0, 107, 109),
        ("wait", 1, 109, 118.5),
        ("tail", 1, 118.5, 120.5),
        ("wait", None, 120.5, 129),
        ("aggregate", None, 129, 131),
    ]
    assert (timeline.start_s, timeline.end_s, timeline.duration_s) == (100, 131, 31)
    assert timeline.wait_s("0") == 2 + 2 + 2
    assert timeline.busy_s("0") == 31 - 6
    assert timeline.busy_s(SERVER) == 2 + 2 + 2
    assert timeline.idle_share == pytest.approx(6 / 31)


def test_two_unequal_clients_share_every_step() -> None:
    # a: forward, backward 10/10 = 1 s, send, receive, upload 4/4 = 1 s; b: all of it 2 s; tail (6 + 6)/12 = 1 s
    work = [ClientWork(client, 2, 10, 10, 4, 4, 6, 0, 4) for client in ("b", "a")]
    timeline = play_round(work, {"a": device(10, 4, 4), "b": device(5, 2, 2)}, server(12), workload=JOINT)
    assert spans(timeline, "a") == [
        ("forward", 0, 0, 1),
        ("send", 0, 1, 2),
        ("wait", 0, 2, 5),  # b arrives at 2 + 2 = 4, the tail computes until 5
        ("receive", 0, 5, 6),
        ("backward", 0, 6, 7),
        ("forward", 1, 7, 8),
        ("send", 1, 8, 9),
        ("wait", 1, 9, 14),  # b: receive 5-7, backward 7-9, forward 9-11, send 11-13; tail 13-14
        ("receive", 1, 14, 15),
        ("backward", 1, 15, 16),
        ("upload", None, 16, 17),
        ("wait", None, 17, 20),  # b: receive 14-16, backward 16-18, upload 18-20
    ]
    assert [span for span in spans(timeline, "b") if span[0] == "wait"] == [("wait", 0, 4, 5), ("wait", 1, 13, 14)]
    assert [span for span in spans(timeline, SERVER) if span[0] == "tail"] == [("tail", 0, 4, 5), ("tail", 1, 13, 14)]
    assert timeline.parties == ("a", "b", SERVER)
    assert timeline.end_s == 20
    assert timeline.idle_share == pytest.approx((11 / 20 + 2 / 20) / 2)


def test_a_client_with_fewer_steps_leaves_the_barrier() -> None:
    # all: forward 1 s, send 1 s, receive 1 s, backward 1 s; slow takes 3 s for each; tail 8/8 = 1 s per client in it
    work = [
        ClientWork("slow", 1, 1, 1, 1, 1, 8, 0, 1),
        ClientWork("2", 2, 1, 1, 1, 1, 8, 0, 1),
        ClientWork("10", 3, 1, 1, 1, 1, 8, 0, 1),
    ]
    devices = {"slow": device(1 / 3, 1 / 3, 1 / 3), "2": device(1, 1, 1), "10": device(1, 1, 1)}
    timeline = play_round(work, devices, server(8), workload=JOINT)
    # step 0: slow arrives at 3 + 3 = 6, all three: 6-9. Step 1: receive, backward, forward, send 9-13, two: 13-15.
    # Step 2: 15-19, one: 19-20; receive, backward, upload of "10": 20-23.
    # slow meanwhile: receive 9-12, backward 12-15, upload 15-18.
    tails = [span for span in spans(timeline, SERVER) if span[0] == "tail"]
    assert tails == [("tail", 0, 6, 9), ("tail", 1, 13, 15), ("tail", 2, 19, 20)]
    assert spans(timeline, "slow")[-2:] == [("upload", None, 15, 18), ("wait", None, 18, 23)]
    assert spans(timeline, "2")[-2:] == [("upload", None, 17, 18), ("wait", None, 18, 23)]
    assert spans(timeline, "10")[-1] == ("upload", None, 22, 23)
    assert timeline.parties == ("2", "10", "slow", SERVER)
    assert timeline.wait_s("2") == (9 - 2) + (15 - 13) + (23 - 18)


def test_the_tail_answers_one_after_another_and_goes_over_the_step_again() -> None:
    # both: forward 1 s, send 1 s, receive 1 s, backward 1 s, upload 1 s; tail 8/8 = 1 s for each, in every pass
    work = [ClientWork(client, 2, 1, 1, 1, 1, 8, 0, 1) for client in ("a", "b")]
    timeline = play_round(
        work, {"a": device(1, 1, 1), "b": device(1, 1, 1)}, server(8), workload=Workload(tail_passes=3)
    )
    tails = [span for span in spans(timeline, SERVER) if span[0] == "tail"]
    assert tails == [
        ("tail", 0, 2, 3),  # a's
        ("tail", 0, 3, 4),  # b's
        ("tail", 0, 4, 8),  # both, twice more, while the clients go on
        ("tail", 1, 8, 9),  # both wait for it since 7 and 8
        ("tail", 1, 9, 10),
        ("tail", 1, 10, 14),
    ]
    assert [span for span in spans(timeline, "a") if span[0] == "wait"] == [
        ("wait", 0, 2, 3),
        ("wait", 1, 7, 9),  # receive 3-4, backward 4-5, forward 5-6, send 6-7
        ("wait", None, 12, 14),  # receive 9-10, backward 10-11, upload 11-12; the tail has passes left
    ]
    assert [span for span in spans(timeline, "b") if span[0] == "wait"] == [
        ("wait", 0, 2, 4),
        ("wait", 1, 8, 10),
        ("wait", None, 13, 14),
    ]


def test_the_tail_computes_while_others_are_on_the_way() -> None:
    # a: forward 1 s, send 1 s; b three times as slow; tail 2 s each. a's turn is 2-4, b's 6-8.
    work = [ClientWork(client, 1, 1, 1, 1, 1, 16, 0, 0) for client in ("a", "b")]
    timeline = play_round(work, {"a": device(1, 1, 1), "b": device(1 / 3, 1 / 3, 1 / 3)}, server(8))
    assert [span for span in spans(timeline, SERVER) if span[0] == "tail"] == [("tail", 0, 2, 4), ("tail", 0, 6, 8)]
    assert timeline.end_s == 8 + 3 + 3


PIPELINE = ClientWork("0", 1, 2, 2, 4, 2, 2, 0, 0)
"""in two parts: forward 1, send 2, tail 1, receive 1, backward 1 each"""


def test_parts_in_flight_overlap() -> None:
    workload = Workload(micro_batches=2, micro_batches_in_flight=2)
    timeline = play_round([PIPELINE], {"0": device(1, 1, 1)}, server(1), workload=workload)
    assert spans(timeline, "0") == [
        ("forward", 0, 0, 1),
        ("forward", 0, 1, 2),
        ("send", 0, 1, 3),
        ("send", 0, 3, 5),  # the link is taken until 3
        ("receive", 0, 4, 5),
        ("backward", 0, 5, 6),
        ("receive", 0, 6, 7),
        ("backward", 0, 7, 8),
    ]
    assert [span for span in spans(timeline, SERVER) if span[0] == "tail"] == [("tail", 0, 3, 4), ("tail", 0, 5, 6)]
    assert (timeline.end_s, timeline.wait_s("0")) == (8, 0)


def test_one_part_in_flight_does_not_overlap() -> None:
    workload = Workload(micro_batches=2, micro_batches_in_flight=1)
    timeline = play_round([PIPELINE], {"0": device(1, 1, 1)}, server(1), workload=workload)
    assert timeline.end_s == 2 * (1 + 2 + 1 + 1 + 1)


def test_the_second_clients_gradients_wait_for_the_first_ones_last_part() -> None:
    """All parts of a batch meet the same adapters; with a step per part the two take turns part by part."""
    work, devices = [replace(PIPELINE, client=client) for client in "ab"], {client: device(1, 1, 1) for client in "ab"}
    workload = Workload(micro_batches=2)
    timeline = play_round(work, devices, server(1), workload=workload)
    assert [i.start_s for i in timeline.of("b") if i.what == "receive"] == [7, 8]  # a's turn is 3-4 and 5-6
    micro = play_round(work, devices, server(1), workload=replace(workload, micro_steps=True))
    assert [i.start_s for i in micro.of("b") if i.what == "receive"] == [5, 7]
    joint = play_round(work, devices, server(1), workload=replace(workload, joint_steps=True))
    assert [i.start_s for i in joint.of("b") if i.what == "receive"] == [5, 7]  # two seconds for both, from 3 and 5


def test_micro_steps_go_on_over_the_end_of_a_batch() -> None:
    """The next batch's first part is computed while the last one's gradient is on its way; else it waits for it."""
    workload = Workload(micro_batches=2)
    ends = {}
    for micro in (False, True):
        config = replace(workload, micro_steps=micro)
        two = play_round([replace(PIPELINE, steps=2)], {"0": device(1, 1, 1)}, server(1), workload=config)
        ends[micro] = two.end_s
    assert ends == {False: 16, True: 14}


def test_latency_does_not_keep_the_link() -> None:
    # one second of latency: parts arrive at 1 + 2 + 1 = 4 and, sent from 3 on, at 6; gradients at 4 + 1 + 2 = 7 and 9
    workload = Workload(micro_batches=2)
    timeline = play_round([PIPELINE], {"0": device(1, 1, 1, 1.0)}, server(1), workload=workload)
    assert [(i.start_s, i.end_s) for i in timeline.of("0") if i.what == "send"] == [(1, 4), (3, 6)]
    assert timeline.end_s == 10


def test_without_a_tail_nobody_waits_for_anybody() -> None:
    # a: download 6/2 = 3 s, three steps of (2 + 4)/2 = 3 s, upload 4/4 = 1 s: 13 s; b at twice the compute: 8.5 s
    work = [ClientWork(client, 3, 2, 4, 0, 0, 0, 6, 4) for client in ("a", "b")]
    timeline = play_round(work, {"a": device(2, 4, 2), "b": device(4, 4, 2)}, server(5), aggregate_flops=10)
    assert spans(timeline, "b") == [
        ("download", None, 0, 3),
        ("forward", 0, 3, 3.5),
        ("backward", 0, 3.5, 4.5),
        ("forward", 1, 4.5, 5),
        ("backward", 1, 5, 6),
        ("forward", 2, 6, 6.5),
        ("backward", 2, 6.5, 7.5),
        ("upload", None, 7.5, 8.5),
        ("wait", None, 8.5, 15),
    ]
    assert timeline.wait_s("a") == 2
    assert spans(timeline, SERVER) == [("wait", None, 0, 13), ("aggregate", None, 13, 15)]
    assert timeline.idle_share == pytest.approx((6.5 + 2) / (2 * 15))


def test_an_upload_in_the_middle_of_a_step_does_not_disturb_the_tail() -> None:
    # alone uploads at 1 + 1 + 1 = 3, while the tail computes the step of split: forward 1, send 1, tail 2-12
    work = [ClientWork("alone", 1, 1, 1, 0, 0, 0, 0, 1), ClientWork("split", 1, 1, 1, 1, 1, 10, 0, 1)]
    timeline = play_round(work, {"alone": device(1, 1, 1), "split": device(1, 1, 1)}, server(1))
    assert [span for span in spans(timeline, SERVER) if span[0] != "wait"] == [("tail", 0, 2, 12)]
    assert spans(timeline, "alone")[-1] == ("wait", None, 3, 15)
    assert timeline.end_s == 15


def test_nothing_to_do_takes_no_time() -> None:
    timeline = play_round([ClientWork("0", 3, 0, 0, 0, 0, 0, 0, 0)], {"0": device(1, 1, 1, 9)}, server(1))
    assert (timeline.duration_s, timeline.intervals, timeline.idle_share) == (0, (), 0)


def test_the_server_alone_computes_by_itself() -> None:
    timeline = play_round([], {"0": device(1, 1, 1)}, server(5), start_s=4, aggregate_flops=30)
    assert spans(timeline, SERVER) == [("aggregate", None, 4, 10)]
    assert (timeline.parties, timeline.idle_share) == ((SERVER,), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "Expected steps of client '0' as a whole number >= 1, found 0"),
        ({"forward_flops": -1.0}, "FLOPs and bytes >= 0 for client '0', found {'forward_flops': -1.0}"),
        ({"upload_bytes": math.inf}, "found {'upload_bytes': inf}"),
        ({"tail_flops": 0.0}, "Expected no step bytes for client '0', which has no tail, found 1 up and 1 down"),
    ],
)
def test_work_out_of_range_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(ClientWork("0", 1, 1, 1, 1, 1, 1, 1, 1), **change)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_rounds_that_cannot_be_are_refused() -> None:
    work, devices = ClientWork("0", 1, 1, 1, 1, 1, 1, 1, 1), {"0": device(1, 1, 1), SERVER: device(1, 1, 1)}
    with pytest.raises(ConfigError, match="Expected every client once"):
        play_round([work, work], devices, server(1))
    with pytest.raises(ConfigError, match="none named 'server'"):
        play_round([replace(work, client=SERVER)], devices, server(1))
    with pytest.raises(ConfigError, match="found none for 1"):
        play_round([work, replace(work, client="1")], devices, server(1))
    with pytest.raises(ConfigError, match=r"start_s and aggregate_flops >= 0, found 0\.0 and -1"):
        play_round([work], devices, server(1), aggregate_flops=-1)
    with pytest.raises(ConfigError, match="one of 0, server, found '1'"):
        play_round([work], devices, server(1)).busy_s("1")


positive = st.floats(0.01, 100)
amounts = st.one_of(st.just(0.0), positive)
budgets = st.builds(
    Budget, st.just(1), st.floats(0.1, 100), st.floats(0.1, 100), st.floats(0.1, 100), st.sampled_from([0.0, 0.3])
)


@st.composite
def works(draw: st.DrawFn, client: str, amounts: st.SearchStrategy[float]) -> ClientWork:
    tail = draw(st.one_of(st.just(0.0), positive))
    up, down = (draw(amounts), draw(amounts)) if tail else (0.0, 0.0)
    steps = draw(st.integers(1, 4))
    return ClientWork(client, steps, draw(amounts), draw(amounts), up, down, tail, draw(amounts), draw(amounts))


@st.composite
def rounds(draw: st.DrawFn, amounts: st.SearchStrategy[float] = amounts) -> Round:
    clients = [str(client) for client in range(draw(st.integers(1, 4)))]
    work = [draw(works(client, amounts)) for client in clients]
    return work, {client: draw(budgets) for client in clients}, draw(budgets), draw(amounts), draw(amounts)


def play(drawn: Round, joint: bool = True, passes: int = 1) -> RoundTimeline:
    work, devices, at, start, aggregate = drawn
    workload = Workload(joint_steps=joint, tail_passes=passes)
    return play_round(work, devices, at, start_s=start, aggregate_flops=aggregate, workload=workload)


def expected_end(drawn: Round, joint: bool, passes: int) -> float:
    """The end of a round as a recursion over steps: joint ones start when the last client arrives, others in turn."""
    work, devices, at, start, aggregate = drawn

    def transfer(count: float, rate: float, latency: float) -> float:
        return latency + count / rate if count else 0.0

    ready, free = {}, start
    for w in work:
        d = devices[w.client]
        ready[w.client] = start + transfer(w.download_bytes, d.downlink_bytes_per_s, d.latency_s)
    for step in range(max(w.steps for w in work)):
        here = [w for w in work if w.steps > step]
        for w in here:
            d = devices[w.client]
            ready[w.client] += w.forward_flops / d.flops_per_s
            ready[w.client] += transfer(w.step_bytes_up, d.uplink_bytes_per_s, d.latency_s)
        members = sorted((w for w in here if w.tail_flops), key=lambda w: w.client)
        whole = sum(w.tail_flops for w in members) / at.flops_per_s
        begin = max([free, *(ready[w.client] for w in members)])
        done = {}
        for w in members:
            free = max(free, ready[w.client]) + w.tail_flops / at.flops_per_s
            done[w.client] = free
        if members:
            free = begin + passes * whole if joint else free + (passes - 1) * whole
        for w in here:
            d = devices[w.client]
            base = (begin + whole if joint else done[w.client]) if w.tail_flops else ready[w.client]
            received = base + transfer(w.step_bytes_down, d.downlink_bytes_per_s, d.latency_s)
            ready[w.client] = received + w.backward_flops / d.flops_per_s
    for w in work:
        d = devices[w.client]
        ready[w.client] += transfer(w.upload_bytes, d.uplink_bytes_per_s, d.latency_s)
    return max(free, *ready.values()) + aggregate / at.flops_per_s


@given(rounds(), st.booleans(), st.integers(1, 3))
def test_the_end_is_that_of_the_recursion(drawn: Round, joint: bool, passes: int) -> None:
    assert play(drawn, joint, passes).end_s == pytest.approx(expected_end(drawn, joint, passes), rel=ROUNDING)


@given(rounds(), st.booleans(), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_what_is_computed_does_not_depend_on_the_parts(
    drawn: Round, joint: bool, parts: int, in_flight: int, micro: bool
) -> None:
    """Everybody's seconds of compute and transfer, latency apart, are the same; only when they fall is not."""
    work, devices, at, start, aggregate = drawn
    devices = {client: replace(budget, latency_s=0.0) for client, budget in devices.items()}
    config = Workload(joint_steps=joint, micro_batches=parts, micro_batches_in_flight=in_flight, micro_steps=micro)
    timeline = play_round(work, devices, at, start_s=start, aggregate_flops=aggregate, workload=config)
    whole = play((work, devices, at, start, aggregate), joint)
    for who in timeline.parties:
        for what in COLOURS:
            if what != "wait":
                seconds = [math.fsum(i.seconds for i in t.of(who) if i.what == what) for t in (timeline, whole)]
                assert seconds[0] == pytest.approx(seconds[1], rel=1e-6, abs=1e-9)
    if len(work) == 1 or (joint and in_flight >= parts):  # else the others may wait for a part that waits for another
        assert timeline.end_s <= whole.end_s * (1 + ROUNDING)  # overlap never makes a round longer


@given(rounds(), st.booleans(), st.integers(1, 3))
def test_every_party_tiles_the_round(drawn: Round, joint: bool, passes: int) -> None:
    timeline = play(drawn, joint, passes)
    for who in timeline.parties:
        own = timeline.of(who)
        assert all(i.start_s < i.end_s for i in own)
        ends = [timeline.start_s, *(i.end_s for i in own)]
        assert [i.start_s for i in own] == ends[:-1]  # no overlap, no gap
        assert ends[-1] == timeline.end_s
        whole = timeline.busy_s(who) + timeline.wait_s(who)
        assert whole == pytest.approx(timeline.duration_s, rel=ROUNDING)
    assert 0 <= timeline.idle_share <= 1 + ROUNDING


@given(rounds(positive))
def test_the_tail_starts_a_step_when_the_last_client_arrives_and_answers_all_at_once(drawn: Round) -> None:
    timeline = play(drawn)
    for tail in (i for i in timeline.of(SERVER) if i.what == "tail"):
        members = [w for w in drawn[0] if w.tail_flops and w.steps > (tail.step or 0)]
        waits = [i for w in members for i in timeline.of(w.client) if (i.what, i.step) == ("wait", tail.step)]
        assert len(waits) == len(members)
        assert max(i.start_s for i in waits) == tail.start_s
        assert {i.end_s for i in waits} == {tail.end_s}


@given(rounds(), st.data())
def test_a_faster_device_never_makes_the_round_longer(drawn: Round, data: st.DataObject) -> None:
    work, devices, at, start, aggregate = drawn
    party = data.draw(st.sampled_from([*devices, SERVER]))
    factor = st.floats(1, 10)
    compute, link, latency = data.draw(factor), data.draw(factor), data.draw(st.floats(0, 1))
    old = at if party == SERVER else devices[party]
    new = replace(old.scaled(compute=compute, link=link), latency_s=old.latency_s * latency)
    changed = (work, {**devices, party: new}, new if party == SERVER else at, start, aggregate)
    assert play(changed).end_s <= play(drawn).end_s  # exactly: every step of the arithmetic is monotone


@given(rounds(), st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_the_work_does_not_matter(drawn: Round, random: object, joint: bool) -> None:
    shuffle: Callable[[list[ClientWork]], None] = random.shuffle  # type: ignore[attr-defined]
    shuffled = list(drawn[0])
    shuffle(shuffled)
    assert play((shuffled, *drawn[1:]), joint) == play(drawn, joint)


def some_round(scale: float = 1.0) -> RoundTimeline:
    amounts = [scale * amount for amount in (10, 20, 4, 4, 6, 8, 4)]
    work = [ClientWork(client, 3, *amounts) for client in ("0", "1")]
    devices = {"0": device(10, 4, 8), "1": device(5, 2, 4)}
    return play_round(work, devices, server(12), start_s=7 * scale, aggregate_flops=10 * scale)


def bars(figure: object, timeline: RoundTimeline) -> list[list[Interval]]:
    """The intervals that a figure shows, by row, read off its rectangles."""
    (axes,) = figure.axes  # type: ignore[attr-defined]
    rows: list[list[Interval]] = [[] for _ in timeline.parties]
    kinds = list(COLOURS)
    for number, collection in enumerate(axes.collections):
        row, what = divmod(number, len(kinds))
        for path in collection.get_paths():
            (left, low), (right, high) = path.vertices.min(axis=0), path.vertices.max(axis=0)
            assert (low + high) / 2 == pytest.approx(row)
            rows[row].append(Interval(timeline.parties[row], kinds[what], None, left, right))
    return rows


def in_order(intervals: Sequence[Interval]) -> list[tuple[str, float, float]]:
    return [(i.what, round(i.start_s, 6), round(i.end_s, 6)) for i in sorted(intervals, key=lambda i: i.start_s)]


def test_the_picture_shows_every_interval(tmp_path: Path) -> None:
    timeline = some_round()
    figure = timeline_figure(timeline)
    for who, shown in zip(timeline.parties, bars(figure, timeline), strict=True):
        assert in_order(shown) == in_order(timeline.of(who))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["client 0", "client 1", "server"]
    assert axes.get_xlabel() == "virtual time (s)"
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["download", "forward", "send", "tail (server)", "receive", "backward", "upload",
                     "aggregate (server)", "wait"]  # fmt: skip
    draw_timeline(timeline, tmp_path / "new" / "round.png")
    assert (tmp_path / "new" / "round.png").read_bytes().startswith(b"\x89PNG")


def test_short_rounds_have_a_finer_axis(tmp_path: Path) -> None:
    (axes,) = timeline_figure(some_round(1e-4)).axes
    assert axes.get_xlabel() == "virtual time (ms)"
    nothing = play_round([ClientWork("0", 1, 0, 0, 0, 0, 0, 0, 0)], {"0": device(1, 1, 1)}, server(1))
    draw_timeline(nothing, tmp_path / "nothing.png")
    assert (tmp_path / "nothing.png").exists()
