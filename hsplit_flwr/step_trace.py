"""One training step of a model without weights: what each block keeps, needs for a moment and computes.

The step runs on fake tensors (`torch._subclasses.FakeTensorMode`): shapes and kernels are the CPU's, memory is not
touched. All linear layers carry an adapter of rank 1, so that every matrix's part can be told from the rest. Blocks
built alike cost alike: only the first few are run, one of each kind at least.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig, PreTrainedModel

from hsplit_flwr.adapters import SegmentAdapters
from hsplit_flwr.block_layout import BlockLayout, block_of
from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.heap_model import Event, StepEvents
from hsplit_flwr.lora import LoraSpec
from hsplit_flwr.segments import Segment
from hsplit_flwr.workload import Workload

aten = torch.ops.aten
CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = 2.5
"""scores and output forward; scores again and four gradients backward, as `torch.utils.flop_counter` counts them"""
TRACED_RANK = 8
LEAST_RUN = 4
"""blocks that are run, so that trends over blocks show"""
EARLIER = 1
"""the mark of what depends on adapters of earlier blocks; the j-th matrix of a block marks with ``2 << j``"""


@dataclass(frozen=True)
class Operation:
    """A matrix product of a block, adapters' own ones apart."""

    flops: float
    gradients: tuple[tuple[int, float], ...]
    """(marks, factor): if an adapter among the marks trains, the backward pass takes `factor` times the FLOPs more"""


@dataclass(frozen=True)
class BlockTrace:
    """One block of the step. Bytes; those of the adapters' own tensors are in them, at rank 1."""

    grown: int
    """more alive after its forward pass than before it"""
    forward_peak: int
    """above what was alive before it"""
    backward_peak: int
    """of its backward pass, above what was alive after its forward pass"""
    operations: tuple[Operation, ...]
    input_marks: tuple[int, ...]
    """what each matrix's input depends on"""
    forward_events: tuple[Event, ...]
    """allocations in order"""
    backward_events: tuple[Event, ...]


@dataclass(frozen=True)
class StepTrace:
    """The step of the whole model."""

    prelude: BlockTrace
    blocks: tuple[BlockTrace, ...]
    """one per block of the whole model"""
    postlude: BlockTrace
    """final norm, LM head and loss"""
    num_run: int
    """blocks that were run: the first ones. The others repeat one of their kind"""
    gradients: frozenset[int]
    """storages of the adapters' gradients in the events"""

    def head_events(self, cut: int, gradient_bytes: int) -> StepEvents:
        """The allocations of a head of `cut` blocks, at most `num_run`, with a gradient of that size coming in."""
        sections = (self.prelude, *self.blocks[:cut])
        forward = [event for section in sections for event in section.forward_events]
        backward = [event for section in reversed(sections) for event in section.backward_events]
        kept = {event.key for event in forward if event.nbytes}
        kept -= {event.key for event in (*forward, *backward) if not event.nbytes}
        unwound = [Event(key, 0) for key in kept]  # only what comes after this head would have used them
        events = (*forward, *unwound, Event(0, gradient_bytes), *backward)
        return StepEvents(events, self.gradients.intersection(event.key for event in backward))


def trace_step(skeleton: PreTrainedModel, layout: BlockLayout, workload: Workload) -> StepTrace:
    """Runs the step. `skeleton` is used up.

    Raises:
        UnsupportedModelError: what the model computes depends on its weights' values (as in mixtures of experts).
    """
    kinds = _block_kinds(skeleton, layout)
    later = range(1, layout.num_blocks)
    num_run = max((kinds.index(kinds[b], 1) + 1 for b in later), default=1)
    num_run = min(layout.num_blocks, max(num_run, LEAST_RUN))
    blocks = list(skeleton.get_submodule(layout.blocks).children())[:num_run]
    skeleton.set_submodule(layout.blocks, nn.ModuleList(blocks))
    segment = Segment(skeleton, replace(layout, num_blocks=num_run), 0, num_run)
    segment.gradient_checkpointing = workload.gradient_checkpointing
    adapters = SegmentAdapters(segment, LoraSpec(TRACED_RANK, 1.0))
    recorder = _Recorder(num_run)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fake:
            _fill_with_fakes(segment.model)
            for parameter in adapters.parameters():  # their gradients are counted apart, for their real ranks
                parameter.register_post_accumulate_grad_hook(recorder.drop_gradient)
            _run(segment, blocks, recorder, workload)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnsupportedModelError(
            f"Expected costs that depend on shapes alone, found {type(skeleton).__name__}, which computes "
            f"{error.func} on its data. Choose a model without mixtures of experts."
        ) from error
    traces = recorder.traces()
    run = traces[1:-1]
    return StepTrace(
        prelude=traces[0],
        blocks=tuple(run[b] if b < num_run else run[kinds.index(kinds[b], 1)] for b in range(layout.num_blocks)),
        postlude=traces[-1],
        num_run=num_run,
        gradients=frozenset(recorder.gradients),
    )


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


def _run(segment: Segment, blocks: list[nn.Module], recorder: "_Recorder", workload: Workload) -> None:
    input_ids = torch.zeros(workload.batch_size, workload.sequence_length, dtype=torch.int64)
    attention_mask, labels = torch.ones_like(input_ids), torch.zeros_like(input_ids)
    with recorder.attached(segment, blocks), recorder:
        logits = segment(input_ids, attention_mask)
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        del logits
        loss = losses.sum()
        recorder.start_backward()
        loss.backward()  # type: ignore[no-untyped-call]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows a step operator by operator. Sections: 0 the prelude, 1.. the blocks, the last one the postlude."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_sections = num_blocks + 2
        self._section = 0
        self._backward = False
        self._live = 0
        self._alive: dict[int, int] = {}
        """key of a storage -> its number in the events"""
        self._followed = 0
        self._events: dict[tuple[bool, int], list[Event]] = defaultdict(list)
        self.gradients: set[int] = set()
        self._live_before = [0]
        self._peaks: dict[tuple[bool, int], int] = defaultdict(int)
        self._marks: dict[int, int] = {}
        self._in_adapter = False
        self._operations: dict[int, list[Operation]] = defaultdict(list)
        self._input_marks: dict[int, list[int]] = defaultdict(list)

    def traces(self) -> list[BlockTrace]:
        """One per section."""
        before = [*self._live_before, self._peaks[False, self._num_sections - 1]]
        return [
            BlockTrace(
                grown=before[s + 1] - before[s],
                forward_peak=self._peaks[False, s] - before[s],
                backward_peak=self._peaks[True, s] - before[s + 1],
                operations=tuple(self._operations[s]),
                input_marks=tuple(self._input_marks[s]),
                forward_events=tuple(self._events[False, s]),
                backward_events=tuple(self._events[True, s]),
            )
            for s in range(self._num_sections)
        ]

    @contextmanager
    def attached(self, segment: Segment, blocks: list[nn.Module]) -> Iterator[None]:
        """Listens to the blocks and their linear layers."""
        hooks = []
        for index, block in enumerate(blocks):
            hooks += [
                block.register_forward_pre_hook(self._entering(index + 1)),
                block.register_forward_hook(self._leaving(index + 1)),
            ]
        positions: dict[int, int] = defaultdict(int)
        for name in segment.linear_modules():
            block_index = block_of(name)
            layer = segment.model.get_submodule(segment.local_name(name))
            base: Any = layer.get_base_layer()  # type: ignore[operator]
            mark = 2 << positions[block_index]
            positions[block_index] += 1
            hooks += [
                layer.register_forward_pre_hook(self._entering_adapter),
                base.register_forward_pre_hook(self._entering_base),
                base.register_forward_hook(self._leaving_base),
                layer.register_forward_hook(self._leaving_adapter(mark)),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, section: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not self._backward:
                self._start(section)

        return hook

    def _leaving(self, section: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._backward:
                return  # computed again under gradient checkpointing
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(lambda _: self._start(section))
            if section == self._num_sections - 2:
                self._start(section + 1)

        return hook

    def _entering_adapter(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self._backward:
            self._input_marks[self._section].append(self._marks.get(_key(inputs[0]), 0))
        self._in_adapter = True

    def _entering_base(self, *_: Any) -> None:
        self._in_adapter = False

    def _leaving_base(self, *_: Any) -> None:
        self._in_adapter = True

    def _leaving_adapter(self, mark: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._in_adapter = False
            self._marks[_key(output)] = self._marks.get(_key(output), 0) | mark

        return hook

    def start_backward(self) -> None:
        """The forward pass is over."""
        self._backward = True
        self._start(self._num_sections - 1)

    def drop_gradient(self, parameter: Tensor) -> None:
        """A gradient of an adapter has come; its bytes are counted apart, for the real rank."""
        assert parameter.grad is not None
        self.gradients.add(self._alive[_key(parameter.grad)])
        parameter.grad = None

    def _start(self, section: int) -> None:
        self._section = section
        self._note_peak()
        if not self._backward:
            self._live_before.append(self._live)
            self._marks = {key: EARLIER for key, marks in self._marks.items() if marks}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        marks = 0
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                marks |= self._marks.get(_key(tensor), 0)
        outputs = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        given = {_key(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in outputs:
            if marks:
                self._marks[_key(tensor)] = self._marks.get(_key(tensor), 0) | marks
            if _key(tensor) not in given:
                self._follow(tensor)
        if not self._backward and not self._in_adapter:
            self._count(func, args, kwargs or {}, result)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._alive:
            return
        self._followed += 1
        self._alive[key] = self._followed
        self._events[self._backward, self._section].append(Event(self._followed, storage.nbytes()))
        self._live += storage.nbytes()
        self._note_peak()
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, nbytes: int) -> None:
        number = self._alive.pop(key)
        if number not in self.gradients:
            self._events[self._backward, self._section].append(Event(number, 0))
        self._marks.pop(key, None)
        self._live -= nbytes

    def _note_peak(self) -> None:
        at = (self._backward, self._section)
        self._peaks[at] = max(self._peaks[at], self._live)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        is_attention = "scaled_dot_product" in packet.__name__
        formula = flop_registry.get(aten._scaled_dot_product_flash_attention if is_attention else packet)
        if formula is None:
            return
        flops = float(formula(*args, **kwargs, out_val=result))
        operands = [self._marks.get(_key(tensor), 0) for tensor in args if isinstance(tensor, Tensor)]
        if is_attention:
            q, k, v = operands[:3]
            gradients: tuple[tuple[int, float], ...] = ((q | k | v, ATTENTION_BACKWARD),)
        else:
            gradients = tuple((marks, 1.0) for marks in operands if marks)
        self._operations[self._section].append(Operation(flops, gradients))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
