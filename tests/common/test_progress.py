import math

import pytest

from hsplit_flwr.common.progress import Progress, describe_participants, format_duration, format_rate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_shows_rate_and_time_left() -> None:
    clock = Clock()
    progress = Progress(rounds=2, interval_seconds=0.0, clock=clock)
    progress.start_round(1, 1, 20)
    clock.now += 2.0
    assert progress.step(1, 1, 3.21, 2400) == "round 1/2  step 1/20  loss 3.21  1.2 k tok/s  eta 1:18"
    clock.now += 1.0
    assert progress.step(2, 1, 3.0, 87) == "round 1/2  step 2/20  loss 3  87 tok/s  eta 0:57"
    clock.now += 600.0  # aggregation and evaluation
    progress.start_round(2, 1, 20)
    clock.now += 1.5
    assert progress.step(20, 20, 2.5, 150) == "round 2/2  step 20/20  loss 2.5  100 tok/s  eta 0:00"
    progress.start_round(2, 5, 4, seconds_ago=2.0)  # it began before its first step was reported
    assert progress.step(1, 5, 2.5, 100) == "round 2/2  step 1/4 (5 of 20 client steps)  loss 2.5  50 tok/s  eta 0:04"


def test_progress_speaks_once_per_interval_and_counts_what_it_did_not_show() -> None:
    clock = Clock()
    progress = Progress(rounds=1, interval_seconds=10.0, clock=clock)
    progress.start_round(1, 1, 100)
    spoken = {}
    for step in range(1, 51):
        clock.now += 1.0
        line = progress.step(step, 1, 3.0, 100 if step < 12 else 200)
        if line is not None:
            spoken[step] = line
    assert list(spoken) == [1, 11, 21, 31, 41]
    assert "100 tok/s" in spoken[11]
    assert "200 tok/s" in spoken[31]
    assert spoken[41].endswith("eta 0:59")


def test_progress_survives_a_clock_that_stands_still_and_more_steps_than_planned() -> None:
    progress = Progress(rounds=1, interval_seconds=0.0, clock=Clock())
    progress.start_round(1, 1, 2)
    assert progress.step(3, 3, math.nan, 10) == "round 1/1  step 3/2  loss nan  0 tok/s  eta 0:00"


def line(progress: Progress, step: int, clients: int) -> str:
    spoken = progress.step(step, clients, 2.0, 100)
    assert spoken is not None
    return spoken.split("  loss")[0]


def test_steps_are_those_of_a_client_and_client_steps_those_of_all() -> None:
    """``step 41/100`` against local-steps 20 left people to guess that five clients were counted together."""
    progress = Progress(rounds=5, interval_seconds=0.0, clock=Clock())
    progress.start_round(2, clients=5, local_steps=20)
    assert [line(progress, step, 5) for step in (1, 2)] == [
        "round 2/5  step 1/20 (5 of 100 client steps)",
        "round 2/5  step 2/20 (10 of 100 client steps)",
    ]
    assert line(progress, 3, 4) == "round 2/5  step 3/20 with 4 of 5 clients (14 of 100 client steps)"


def test_a_wave_of_clients_begins_at_its_first_step() -> None:
    progress = Progress(rounds=1, interval_seconds=0.0, clock=Clock())
    progress.start_round(1, clients=5, local_steps=2)
    spoken = [line(progress, step, clients) for clients in (3, 2) for step in (1, 2)]
    assert spoken == [
        "round 1/1  step 1/2 with 3 of 5 clients (3 of 10 client steps)",
        "round 1/1  step 2/2 with 3 of 5 clients (6 of 10 client steps)",
        "round 1/1  step 1/2 with 2 of 5 clients (8 of 10 client steps)",
        "round 1/1  step 2/2 with 2 of 5 clients (10 of 10 client steps)",
    ]


@pytest.mark.parametrize(
    ("clients", "nodes", "text"),
    [
        (5, 2, '5 clients on 2 nodes (Flower logs "sampled 5 clients (out of 2)": those 2 are nodes)'),
        (3, 1, '3 clients on 1 node (Flower logs "sampled 3 clients (out of 1)": that 1 is a node)'),
        (5, 5, "5 clients on 5 nodes"),
        (1, 1, "1 client on 1 node"),
    ],
)
def test_clients_and_nodes_are_told_apart(clients: int, nodes: int, text: str) -> None:
    assert describe_participants(clients, nodes) == text


def test_format_rate_and_duration() -> None:
    assert [format_rate(v) for v in (0.4, 999.0, 999.6, 1234.0, 2.5e6)] == [
        "0",
        "999",
        "1.0 k",
        "1.2 k",
        "2.5 M",
    ]
    assert [format_duration(v) for v in (0, 34.4, 59.6, 725, 3725)] == [
        "0:00",
        "0:34",
        "1:00",
        "12:05",
        "1:02:05",
    ]
