"""One training step of a model without weights: what each block keeps, needs for a moment and computes.

The step runs on fake tensors (`torch._subclasses.FakeTensorMode`): shapes and kernels are the CPU's, memory is not
touched. All linear layers carry an adapter of rank 1. Blocks that are built alike cost alike: only the first are run.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from hsplit_flwr.errors import HSplitError, UnsupportedModelError
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.block_layout import BlockLayout, block_kinds
from hsplit_flwr.models.failures import cause, innermost_module
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.planning.costs.grouped_products import GroupedProducts
from hsplit_flwr.planning.costs.step_recorder import BlockTrace, StepRecorder
from hsplit_flwr.training.loss import token_losses
from hsplit_flwr.training.passes import training_pass
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
        UnsupportedModelError: the step does not run without data (as in mixtures whose experts look who is chosen); the
            message names the module and what it does.
    """
    kinds = block_kinds(skeleton, layout)
    later = range(1, layout.num_blocks)
    num_run = max((kinds.index(kinds[b], 1) + 1 for b in later), default=1)
    num_run = min(layout.num_blocks, max(num_run, 2))
    blocks = list(skeleton.get_submodule(layout.blocks).children())[:num_run]
    skeleton.set_submodule(layout.blocks, nn.ModuleList(blocks))
    segment = Segment(skeleton, replace(layout, num_blocks=num_run), 0, num_run)
    _with_fixed_angles(segment.model)
    segment.gradient_checkpointing = workload.gradient_checkpointing
    adapters = SegmentAdapters(segment, LoraSpec(1, 1.0))
    recorder = StepRecorder(num_run)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    grouped: TorchDispatchMode = GroupedProducts()  # type: ignore[no-untyped-call]
    try:
        with fake, grouped, _quiet():
            _fill_with_fakes(segment.model)
            for parameter in adapters.parameters():
                # Their gradients are counted apart, for their real ranks.
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
            _run(segment, adapters, blocks, recorder, workload)
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
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return f"that {innermost_module(error)} looks at its data ({error})"
    return cause(error)


def _with_fixed_angles(model: nn.Module) -> None:
    """Rotary embeddings that look how long the rows are, to form other angles for longer ones, form the usual ones.

    It costs the same, and shapes alone do not say how long a row is (``dynamic`` and ``longrope``).
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.__dict__["rope_type"] = "default"
        elif isinstance(kind, dict):
            module.__dict__["rope_type"] = dict.fromkeys(kind, "default")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own report of what fake tensors cannot do: the error says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


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


def _run(
    segment: Segment,
    adapters: SegmentAdapters,
    blocks: list[nn.Module],
    recorder: StepRecorder,
    workload: Workload,
) -> None:
    input_ids = torch.zeros(workload.batch_size, workload.sequence_length, dtype=torch.int64)
    attention_mask, labels = torch.ones_like(input_ids), torch.zeros_like(input_ids)
    with recorder.attached(segment, blocks), recorder:
        with training_pass(adapters, torch.device("cpu"), workload.lora_dropout, workload.autocast):
            logits = segment(input_ids, attention_mask)
        losses = token_losses(logits, labels)
        del logits
        loss = losses.sum()
        recorder.start_backward()
        with adapters.dropping_out(workload.lora_dropout):  # where blocks are computed again, with their masks
            loss.backward()  # type: ignore[no-untyped-call]
