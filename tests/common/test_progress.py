import math

from hsplit_flwr.common.progress import Progress, format_duration, format_rate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_shows_rate_and_time_left() -> None:
    clock = Clock()
    progress = Progress(rounds=2, interval_seconds=0.0, clock=clock)
    progress.start_round(1, 20)
    clock.now += 2.0
    assert progress.step(1, 3.21, 2400) == "round 1/2  step 1/20  loss 3.21  1.2 k tok/s  eta 1:18"
    clock.now += 1.0
    assert progress.step(1, 3.0, 87) == "round 1/2  step 2/20  loss 3  87 tok/s  eta 0:57"
    clock.now += 600.0  # aggregation and evaluation
    progress.start_round(2, 20)
    clock.now += 1.5
    assert progress.step(20, 2.5, 150) == "round 2/2  step 20/20  loss 2.5  100 tok/s  eta 0:00"
    progress.start_round(2, 20, seconds_ago=2.0)  # it began before its first step was reported
    assert progress.step(5, 2.5, 100) == "round 2/2  step 5/20  loss 2.5  50 tok/s  eta 0:04"


def test_progress_speaks_once_per_interval_and_counts_what_it_did_not_show() -> None:
    clock = Clock()
    progress = Progress(rounds=1, interval_seconds=10.0, clock=clock)
    progress.start_round(1, 100)
    spoken = {}
    for step in range(1, 51):
        clock.now += 1.0
        line = progress.step(1, 3.0, 100 if step < 12 else 200)
        if line is not None:
            spoken[step] = line
    assert list(spoken) == [1, 11, 21, 31, 41]
    assert "100 tok/s" in spoken[11]
    assert "200 tok/s" in spoken[31]
    assert spoken[41].endswith("eta 0:59")


def test_progress_survives_a_clock_that_stands_still_and_more_steps_than_planned() -> None:
    progress = Progress(rounds=1, interval_seconds=0.0, clock=Clock())
    progress.start_round(1, 2)
    assert progress.step(3, math.nan, 10) == "round 1/1  step 3/2  loss nan  0 tok/s  eta 0:00"


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
