"""One training step of a model without weights: what each block keeps, needs for a moment and computes.

The step runs on fake tensors (`torch._subclasses.FakeTensorMode`): shapes and kernels are the CPU's, memory is not
touched. All linear layers carry an adapter of rank 1. Blocks that are built alike cost alike: only the first are run.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from hsplit_flwr.errors import HSplitError, UnsupportedModelError
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.block_layout import BlockLayout
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.planning.costs.grouped_products import GroupedProducts
from hsplit_flwr.planning.costs.step_recorder import BlockTrace, StepRecorder
from hsplit_flwr.training.workload import Workload


@dataclass(frozen=True)
class StepTrace:
    """The step of the whole model."""

    prelude: BlockTrace
    blocks: tuple[BlockTrace, ...]
    """one per block of the whole model"""
    postlude: BlockTrace
    """final norm, LM head and loss"""


def trace_step(skeleton: PreTrainedModel, layout: BlockLayout, workload: Workload) -> StepTrace:
    """Runs the step. `skeleton` is used up.

    Raises:
        UnsupportedModelError: the step does not run without data (as in mixtures of experts, or rotary embeddings that
            grow with the batch); the message names the module and what it does.
    """
    kinds = _block_kinds(skeleton, layout)
    later = range(1, layout.num_blocks)
    num_run = max((kinds.index(kinds[b], 1) + 1 for b in later), default=1)
    num_run = min(layout.num_blocks, max(num_run, 2))
    blocks = list(skeleton.get_submodule(layout.blocks).children())[:num_run]
    skeleton.set_submodule(layout.blocks, nn.ModuleList(blocks))
    segment = Segment(skeleton, replace(layout, num_blocks=num_run), 0, num_run)
    segment.gradient_checkpointing = workload.gradient_checkpointing
    adapters = SegmentAdapters(segment, LoraSpec(1, 1.0))
    recorder = StepRecorder(num_run)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fake, GroupedProducts(), _quiet():
            _fill_with_fakes(segment.model)
            for parameter in adapters.parameters():
                # Their gradients are counted apart, for their real ranks.
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
            _run(segment, blocks, recorder, workload)
    except HSplitError:
        raise
    except Exception as error:  # whatever a model's code raises
        raise UnsupportedModelError(
            f"Expected a step of {type(skeleton).__name__} to run on shapes alone, found {_cause(error)}. "
            "Configure its cuts and ranks instead of planning them (run config: cuts, ranks), or choose another model."
        ) from error
    traces = recorder.traces()
    run = traces[1:-1]
    return StepTrace(
        prelude=traces[0],
        blocks=tuple(run[b] if b < num_run else run[kinds.index(kinds[b], 1)] for b in range(layout.num_blocks)),
        postlude=traces[-1],
    )


def _cause(error: Exception) -> str:
    """What stopped the step, and the innermost module that it happened in."""
    module, frame = "the step", error.__traceback__
    while frame:
        owner = frame.tb_frame.f_locals.get("self")
        module = type(owner).__name__ if isinstance(owner, nn.Module) else module
        frame = frame.tb_next
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return f"that {module} looks at its data ({error})"
    return f"an error in {module}: {type(error).__name__}: {str(error)[:200]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own report of what fake tensors cannot do: the error says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _block_kinds(skeleton: PreTrainedModel, layout: BlockLayout) -> list[tuple[Any, ...]]:
    """What tells one block from another: its class, its parameters' shapes and its entries in per-layer settings."""
    config: PretrainedConfig = skeleton.config.get_text_config()
    lists = [v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == layout.num_blocks]
    return [
        (type(block), tuple(p.shape for p in block.parameters()), tuple(repr(values[index]) for values in lists))
        for index, block in enumerate(skeleton.get_submodule(layout.blocks).children())
    ]


def _fill_with_fakes(model: nn.Module) -> None:
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                blank = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[leaf] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _run(segment: Segment, blocks: list[nn.Module], recorder: StepRecorder, workload: Workload) -> None:
    input_ids = torch.zeros(workload.batch_size, workload.sequence_length, dtype=torch.int64)
    attention_mask, labels = torch.ones_like(input_ids), torch.zeros_like(input_ids)
    with recorder.attached(segment, blocks), recorder:
        logits = segment(input_ids, attention_mask)
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        del logits
        loss = losses.sum()
        recorder.start_backward()
        loss.backward()  # type: ignore[no-untyped-call]
