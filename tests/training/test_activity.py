"""What a tail did so far: every second counts once, under what it was spent on."""

import pytest

from hsplit_flwr.training.activity import ActivityLog, Standing


def test_all_time_is_accounted_for() -> None:
    now = 100.0
    log = ActivityLog(lambda: now)
    for doing, seconds in (("waiting", 2.0), ("computing", 3.0), ("waiting", 5.0), ("computing", 7.0)):
        log.begin(doing)  # type: ignore[arg-type]
        now += seconds
    activity = log.now(Standing(3, 2, 1))
    assert (activity.doing, activity.doing_s) == ("computing", 7.0)
    assert activity.seconds == {"idle": 0.0, "waiting": 7.0, "computing": 10.0}
    assert sum(activity.seconds.values()) == pytest.approx(now - 100.0)
    assert activity.clients == Standing(to_come=3, joined=2, waiting=1)


def test_turns_are_counted() -> None:
    log = ActivityLog()
    log.count(1, 30, ends_step=False)
    log.count(1, 12, ends_step=True)
    activity = log.now(Standing())
    assert (activity.steps, activity.batches, activity.tokens, activity.failure) == (1, 2, 42, "")
    log.fail("MemoryError()")
    assert log.now(Standing()).failure == "MemoryError()"
