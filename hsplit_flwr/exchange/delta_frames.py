"""Which tensors of a delta share a frame."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

DELTA_FRAME_BYTES = 4 << 20


class Sized(Protocol):
    """A tensor, or what is known of it."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""


Part = TypeVar("Part", bound=Sized)


def packed(tensors: Mapping[str, Part]) -> list[dict[str, Part]]:
    """Small tensors share a frame, a large one gets its own; at least one (possibly empty) frame."""
    parts: list[dict[str, Part]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > DELTA_FRAME_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts
