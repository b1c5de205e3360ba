"""Follows one training step operator by operator: what is alive, what is kept, what is computed, block by block."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from hsplit_flwr.models.block_layout import block_of
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.models.views import hidden_of
from hsplit_flwr.planning.costs.grouped_products import GROUPED, grouped_flops

aten = torch.ops.aten
CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = 2.5
"""scores and output forward; scores again and four gradients backward, as `torch.utils.flop_counter` counts them"""
HEAP_BELOW_BYTES = 32 << 20
"""glibc maps larger storages on their own (``DEFAULT_MMAP_THRESHOLD_MAX``)"""
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
    """what the input of each matrix depends on, in the order of the model"""
    adapter_inputs: tuple[tuple[int, int], ...]
    """(bytes, marks) of what is kept for the gradients of the marked matrices' A alone"""
    heap_peak: int
    """most alive at once over both passes, above what was alive before, of storages below `HEAP_BELOW_BYTES`"""


class StepRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows a step operator by operator. Sections: 0 the prelude, 1.. the blocks, the last one the postlude."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_sections = num_blocks + 2
        self._section = 0
        self._backward = False
        self._live = 0
        self._alive: set[int] = set()
        self._heap = 0
        self._heap_before = [0]
        self._heap_peaks: dict[int, int] = defaultdict(int)
        self._live_before = [0]
        self._peaks: dict[tuple[bool, int], int] = defaultdict(int)
        self._marks: dict[int, int] = {}
        self._in_adapter = 0
        """mark of the matrix whose adapter computes; 0 outside of adapters"""
        self._kept: dict[int, dict[int, tuple[int, int]]] = defaultdict(dict)
        """section -> key of a storage kept for the backward pass -> its bytes, the adapters it is kept for alone"""
        self._operations: dict[int, list[Operation]] = defaultdict(list)
        self._input_marks: dict[int, dict[int, int]] = defaultdict(dict)

    def traces(self) -> list[BlockTrace]:
        """One per section."""
        before = [*self._live_before, self._peaks[False, self._num_sections - 1]]
        return [
            BlockTrace(
                grown=before[s + 1] - before[s],
                forward_peak=self._peaks[False, s] - before[s],
                backward_peak=self._peaks[True, s] - before[s + 1],
                operations=tuple(self._operations[s]),
                input_marks=tuple(marks for _, marks in sorted(self._input_marks[s].items())),
                adapter_inputs=self._kept_for_adapters(s),
                heap_peak=self._heap_peaks[s] - self._heap_before[s],
            )
            for s in range(self._num_sections)
        ]

    @contextmanager
    def attached(self, segment: Segment, blocks: Sequence[nn.Module]) -> Iterator[None]:
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
            base: Any = layer.get_base_layer()
            mark = 2 << positions[block_index]
            positions[block_index] += 1
            hooks += [
                layer.register_forward_pre_hook(self._in_adapter_of(mark)),
                base.register_forward_pre_hook(self._in_adapter_of(0)),
                base.register_forward_hook(self._in_adapter_of(mark)),
                layer.register_forward_hook(self._leaving_adapter(mark)),
            ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
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
            hidden_of(output).register_hook(lambda _: self._start(section))  # type: ignore[no-untyped-call]
            if section == self._num_sections - 2:
                self._start(section + 1)

        return hook

    def _in_adapter_of(self, mark: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], *_output: Tensor) -> None:
            entering = self._in_adapter == 0 and mark and not _output
            if entering and not self._backward:
                self._input_marks[self._section][mark] = self._marks.get(_key(inputs[0]), 0)
            self._in_adapter = mark

        return hook

    def _keep(self, tensor: Tensor) -> Tensor:
        key, kept = _key(tensor), self._kept[self._section]
        # Weights are not followed; what ends in 1 is the output of an adapter's A.
        if not self._backward and key in self._alive and tensor.shape[-1:] != (1,):
            nbytes, marks = kept.get(key, (tensor.untyped_storage().nbytes(), self._in_adapter))
            kept[key] = nbytes, marks | self._in_adapter if marks and self._in_adapter else 0
        return tensor

    def _kept_for_adapters(self, section: int) -> tuple[tuple[int, int], ...]:
        return tuple((nbytes, marks) for nbytes, marks in self._kept[section].values() if marks)

    def _leaving_adapter(self, mark: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._in_adapter = 0
            self._marks[_key(output)] = self._marks.get(_key(output), 0) | mark

        return hook

    def start_backward(self) -> None:
        """The forward pass is over."""
        self._backward = True
        self._start(self._num_sections - 1)

    def _start(self, section: int) -> None:
        self._section = section
        self._note_peak()
        if not self._backward:
            self._live_before.append(self._live)
            self._heap_before.append(self._heap)
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
        self._alive.add(key)
        self._add(storage.nbytes(), 1)
        self._note_peak()
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, nbytes: int) -> None:
        self._alive.discard(key)
        self._marks.pop(key, None)
        self._add(nbytes, -1)

    def _add(self, nbytes: int, sign: int) -> None:
        self._live += sign * nbytes
        if nbytes < HEAP_BELOW_BYTES:
            self._heap += sign * nbytes

    def _note_peak(self) -> None:
        at = (self._backward, self._section)
        self._peaks[at] = max(self._peaks[at], self._live)
        self._heap_peaks[self._section] = max(self._heap_peaks[self._section], self._heap)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        is_attention = "scaled_dot_product" in packet.__name__
        formula = flop_registry.get(aten._scaled_dot_product_flash_attention if is_attention else packet)
        if packet is GROUPED:
            args = args[:2]  # not where each expert's rows end, which has no gradient
            flops = grouped_flops(args[0].shape, args[1].shape)
        elif formula is None:
            return
        else:
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
