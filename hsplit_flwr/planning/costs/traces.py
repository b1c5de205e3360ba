"""Traces of steps, each made once in a process: a planner tries codecs and updates by the dozen, which change none."""

from dataclasses import dataclass, field
from functools import lru_cache

from transformers import PretrainedConfig

from hsplit_flwr.models.adaptable import layout_of
from hsplit_flwr.models.block_layout import build_skeleton
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.planning.costs.step_trace import StepTrace, trace_step
from hsplit_flwr.training.workload import Workload

KEPT = 64
"""traces, of a few kilobytes each"""


@dataclass(frozen=True)
class _Step:
    """A step of a model; two are alike whose models are built alike and whose batches are computed alike."""

    model: tuple[type[PretrainedConfig], str, str | None]
    """what it is built from: the config's class, its text, its implementation of attention"""
    workload: Workload
    config: PretrainedConfig = field(compare=False)


def traced(config: PretrainedConfig, workload: Workload) -> StepTrace:
    """The step of the model of `config` on batches of `workload` (errors as `trace_step`)."""
    model = type(config), config.to_json_string(use_diff=False), config._attn_implementation
    computed = Workload(
        batch_size=workload.batch_size,
        sequence_length=workload.sequence_length,
        dtype=workload.dtype,
        gradient_checkpointing=workload.gradient_checkpointing,
        lora_dropout=workload.lora_dropout,
        autocast=workload.autocast,
    )
    return _made(_Step(model, computed, config))


@lru_cache(KEPT)
def _made(step: _Step) -> StepTrace:
    skeleton = build_skeleton(step.config, DTYPES[step.workload.dtype])
    return trace_step(skeleton, layout_of(skeleton), step.workload)
