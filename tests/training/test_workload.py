"""The workload: made from a run's settings, and refused where it differs from them."""

from typing import Any

import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.workload import Workload


def test_a_workload_is_made_from_the_settings() -> None:
    training = TrainingConfig(
        local_steps=7, activation_codec="bf16", gradient_codec="int4", importance_steps=3, importance_rows=0
    )
    made = Workload.of(training, batch_size=4, sequence_length=96, dtype="fp16", gradient_checkpointing=True)
    assert made == Workload(4, 96, 7, "fp16", "bf16", "int4", True, importance_steps=3, importance_rows=0)
    assert Workload.of(TrainingConfig()) == Workload()


@pytest.mark.parametrize(
    ("steps", "rows", "batch_size", "measured"), [(1, 2, 8, 2), (1, 2, 1, 1), (5, 0, 8, 8), (0, 2, 8, 0), (0, 0, 8, 0)]
)
def test_the_measured_rows(steps: int, rows: int, batch_size: int, measured: int) -> None:
    workload = Workload(batch_size, importance_steps=steps, importance_rows=rows)
    assert workload.measured_rows == measured


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"local_steps": 5}, "a workload of local_steps=5 as in training, found 20"),
        ({"activation_codec": "bf16"}, "a workload of activation_codec='bf16' as in training, found 'fp32'"),
        ({"gradient_codec": "bf16"}, "a workload of gradient_codec='bf16' as in training, found 'fp32'"),
        ({"importance_rows": 0}, "a workload of measured_rows=8 as in training, found 2"),
        ({"importance_steps": 0}, "a workload of measured_rows=0 as in training, found 2"),
    ],
)
def test_costs_of_another_training_are_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"Expected {message}\. .*Workload\.of"):
        Workload().check(TrainingConfig(**training))


def test_what_costs_the_same_is_no_difference() -> None:
    Workload(2).check(TrainingConfig(importance_rows=0, importance_steps=4, learning_rate=1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"batch_size as a whole number >= 1, found 0 \(run config: batch-size\)"),
        ({"batch_size": True}, "batch_size as a whole number >= 1, found True"),
        ({"sequence_length": 1.5}, r"sequence_length as a whole number >= 1, found 1\.5 \(run config: max-length\)"),
        ({"dtype": "int3"}, r"dtype as one of .*, found 'int3'\.$"),
        ({"activation_codec": "int3"}, r"activation_codec as one of .*, found 'int3' \(run config: activation-codec\)"),
    ],
)
def test_bad_values_name_field_value_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"Expected {message}"):
        Workload(**changes)
