import logging

import pytest

from hsplit_flwr.reports.step_log import log_progress
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.step import StepReport


def test_lines_count_the_steps_of_a_round(caplog: pytest.LogCaptureFixture) -> None:
    on_step = log_progress(TrainingConfig(rounds=3, local_steps=20), interval_s=0.0)
    with caplog.at_level(logging.INFO, "hsplit_flwr"):
        for step in (19, 20, 21):
            on_step(StepReport(step, ("a", "b"), 2.0, 10, (0.5, 0.5), 2))
    assert [record.getMessage().split("  loss")[0] for record in caplog.records] == [
        "round 1/3  step 20/20 (2 of 40 client steps)",
        "round 2/3  step 1/20 (2 of 40 client steps)",
        "round 2/3  step 2/20 (4 of 40 client steps)",
    ]
