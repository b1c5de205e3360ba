"""Peak bytes of the tensors that a piece of code makes: exact and repeatable, unlike a process's resident size."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that an operator allocated, until its last tensor is gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._references: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._track(tensor, is_new=_storage(tensor) not in given)
        return result

    def _track(self, tensor: Tensor, is_new: bool) -> None:
        key, nbytes = _storage(tensor), tensor.untyped_storage().nbytes()
        if self._references[key] == 0 and not is_new:
            return  # a view of something that was there before
        if self._references[key] == 0:
            self._live += nbytes
            self.peak = max(self.peak, self._live)
        self._references[key] += 1
        weakref.finalize(tensor, self._release, key, nbytes)

    def _release(self, key: int, nbytes: int) -> None:
        self._references[key] -= 1
        if self._references[key] == 0:
            self._live -= nbytes


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def peak_bytes(action: Callable[[], object]) -> int:
    """The most bytes of new tensors alive at once while `action` ran, its result included.

    What a kernel allocates for itself (a BLAS packing buffer, say) is not a tensor and is not counted.
    """
    with _LiveStorages() as storages:
        result = action()
    del result
    return int(storages.peak)
