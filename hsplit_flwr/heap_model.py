"""How much more than its tensors a process' heap takes: glibc's `malloc(3)`, simulated.

glibc takes the smallest hole that is large enough and joins neighbouring holes, but torch asks for blocks aligned to 64
bytes, which glibc cuts out of holes `ALIGNMENT_BYTES` larger: a freed tensor makes no room for the next one of its
size. So the heap grows beyond what is alive at any moment, the more the more of it lives long. What is simulated is the
sequence of allocations of a few steps, as `step_trace` finds it, with `host_memory.CLIENT_TUNABLES` and `trim_heap`
after each step. Small objects and other threads' heaps are left out.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT_BYTES = 64 + 32
"""alignment and the smallest chunk (glibc 2.36, ``_int_memalign``)"""
GRANULE = 16
STEPS = 3
"""from the second on, adapters' gradients and AdamW's moments stand between the tensors of a step"""


@dataclass(frozen=True)
class Event:
    """A storage comes (`nbytes` of it) or goes (`nbytes` 0)."""

    key: int
    nbytes: int


@dataclass(frozen=True)
class StepEvents:
    """What one step of a head allocates, in order."""

    events: tuple[Event, ...]
    gradients: frozenset[int]
    """storages that stay until the next step begins: the adapters' gradients"""


class Heap:
    """Addresses of live blocks and holes; `top` is where the heap ends."""

    def __init__(self) -> None:
        self.live = 0
        self.top = 0
        self._blocks: dict[int, tuple[int, int]] = {}
        self._sizes: list[tuple[int, int]] = []
        """of the holes: (size, start), sorted"""
        self._starts: dict[int, int] = {}
        self._stops: dict[int, int] = {}

    def allocate(self, key: int, nbytes: int) -> None:
        """A new block."""
        size = -(-nbytes // GRANULE) * GRANULE + GRANULE
        found = bisect.bisect_left(self._sizes, (size + ALIGNMENT_BYTES, 0))
        if found < len(self._sizes):
            hole, start = self._sizes[found]
            self._remove_hole(start)
            self._add_hole(start + size, hole - size)
        else:
            start = self._stops.get(self.top, self.top)
            if start < self.top:
                self._remove_hole(start)
            self.top = start + size
        self._blocks[key] = (start, size)
        self.live += size

    def free(self, key: int) -> None:
        """That block is gone; unknown ones are none of this heap's."""
        if key not in self._blocks:
            return
        start, size = self._blocks.pop(key)
        self.live -= size
        self._add_hole(start, size)

    def trim(self) -> None:
        """Give back the end of the heap."""
        if (start := self._stops.get(self.top)) is not None:
            self._remove_hole(start)
            self.top = start

    def _add_hole(self, start: int, size: int) -> None:
        if start in self._stops:
            before = self._stops[start]
            size += start - before
            self._remove_hole(before)
            start = before
        if start + size in self._starts:
            after = start + size
            size += self._starts[after]
            self._remove_hole(after)
        if size:
            self._starts[start] = size
            self._stops[start + size] = start
            bisect.insort(self._sizes, (size, start))

    def _remove_hole(self, start: int) -> None:
        size = self._starts.pop(start)
        del self._stops[start + size]
        del self._sizes[bisect.bisect_left(self._sizes, (size, start))]


def heap_excess(step: StepEvents) -> int:
    """Bytes by which the heap exceeds the most that was alive in it, at its worst in a few steps like `step`."""
    heap = Heap()
    sizes = {event.key: event.nbytes for event in step.events if event.nbytes}
    top, live = 0, 0
    for number in range(STEPS):
        _free_all(heap, step.gradients)
        for event in step.events:
            if event.nbytes:
                heap.allocate(event.key, event.nbytes)
            else:
                heap.free(event.key)
            top, live = max(top, heap.top), max(live, heap.live)
        _free_all(heap, sizes.keys() - step.gradients)
        if number == 0:
            for moment in (1, 2):
                for key in step.gradients:
                    heap.allocate(-moment - 2 * key, sizes[key])
        heap.trim()
    return top - live


def _free_all(heap: Heap, keys: Iterable[int]) -> None:
    for key in keys:
        heap.free(key)


def extrapolate(known: Sequence[int], length: int) -> list[int]:
    """`known` values at 1, 2, .. continued to `length` along their mean slope, never downwards."""
    slope = max(0.0, (known[-1] - known[0]) / (len(known) - 1)) if len(known) > 1 else 0.0
    return [*known, *(known[-1] + int(slope * i) for i in range(1, length - len(known) + 1))][:length]
