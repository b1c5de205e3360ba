"""What a batch and a gradient are on the wire: codecs for what is float, checks for all of it.

A wire codec is one row of `CODECS`, chosen by ``activation_dtype``. It alone knows how activations and their gradients
are packed: frames, their sizes and their checks ask it. Shapes: B batch, T sequence, H hidden.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.frames import short
from hsplit_flwr.training.workload import Workload

Shape = tuple[int, ...]


class Part(NamedTuple):
    """One tensor of a frame, without its values."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


Layout = Mapping[str, Part]
"""tensor name -> what it is"""


class Codec(Protocol):
    """How a float tensor becomes named tensors of a frame, and comes back.

    ``name`` says whose parts they are (``activations``, ``gradient``): a codec of one part calls it so, one of several
    adds to it (``activations.scale``). The names do not depend on the shape.
    """

    def layout(self, name: str, shape: Shape) -> Layout:
        """What `encode` makes of a tensor of `shape`."""

    def encode(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """The parts that travel."""

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The values of `parts`, in any float dtype.

        `parts` have the names, shapes and dtypes of `layout`; their values are the peer's. Whether the result is finite
        is checked afterwards.
        """


@dataclass(frozen=True)
class Cast:
    """The values in another dtype, one part."""

    dtype: torch.dtype

    def layout(self, name: str, shape: Shape) -> Layout:
        """See `Codec`."""
        return {name: Part(shape, self.dtype)}

    def encode(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """See `Codec`."""
        return {name: values.to(self.dtype)}

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Codec`; the part itself, in its wire dtype."""
        return parts[name]


CODECS: Mapping[str, Codec] = {
    "fp32": Cast(torch.float32),
    "bf16": Cast(torch.bfloat16),
    "fp16": Cast(torch.float16),
}
"""The codecs by the names that people type; `training.config.ACTIVATION_DTYPES` repeats them."""


def batch_layout(codec: Codec, shape: Shape) -> Layout:
    """The tensors of a ``train`` or ``evaluate`` frame of activations of `shape` (B, T, H)."""
    activations = codec.layout("activations", shape)
    return {**activations, "mask": Part(shape[:2], torch.uint8), "labels": Part(shape[:2], torch.int32)}


def batch_tensors(activations: Tensor, attention_mask: Tensor, labels: Tensor, codec: Codec) -> dict[str, Tensor]:
    """The tensors of a ``train`` or ``evaluate`` frame: (B, T, H) activations, (B, T) mask and labels."""
    return {
        **codec.encode("activations", activations),
        "mask": attention_mask.to(torch.uint8),
        "labels": labels.to(torch.int32),
    }


def check_batch(
    tensors: Mapping[str, Tensor],
    *,
    codec: Codec,
    hidden_size: int,
    vocab_size: int,
    workload: Workload | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The activations, mask and labels in a ``train`` or ``evaluate`` frame, checked before anything is computed.

    Args:
        tensors: of the frame.
        codec: the run's.
        hidden_size: H.
        vocab_size: labels are below it.
        workload: the largest batch that was planned; None: any size.

    Raises:
        ExchangeError: ``wrong_tensors``, ``wrong_dtype``, ``wrong_shape``, ``batch_too_large``, ``non_finite``,
            ``wrong_mask`` or ``wrong_labels``.
    """
    _check_names(tensors, batch_layout(codec, (1, 1, hidden_size)))
    mask, labels = tensors["mask"], tensors["labels"]
    if labels.dim() != 2 or 0 in labels.shape:
        raise ExchangeError("wrong_shape", f"Expected labels of shape (B, T), found {tuple(labels.shape)}.")
    rows, width = labels.shape
    if workload and (rows > workload.batch_size or width > workload.sequence_length):
        raise ExchangeError(
            "batch_too_large",
            f"Expected batches of at most {workload.batch_size} x {workload.sequence_length} tokens, as this round was "
            f"planned for, found {rows} x {width}. Raise the strategy's workload (batch-size, max-length), or use "
            "smaller batches.",
        )
    shape = (rows, width, hidden_size)
    _check_parts(tensors, batch_layout(codec, shape))
    activations = _decoded(codec, "activations", tensors)
    if mask.max() > 1:
        raise ExchangeError("wrong_mask", f"Expected an attention mask of 0 and 1, found {int(mask.max())}.")
    if ((labels != -100) & ((labels < 0) | (labels >= vocab_size))).any():
        raise ExchangeError("wrong_labels", f"Expected labels to be -100 or in 0..{vocab_size - 1}, found others.")
    return activations, mask, labels


def check_gradient(tensors: Mapping[str, Tensor], like: Tensor, codec: Codec) -> Tensor:
    """The gradient in a ``gradient`` frame, checked against the activations (B, T, H) it belongs to.

    Raises:
        ExchangeError: ``wrong_tensors``, ``wrong_dtype``, ``wrong_shape`` or ``non_finite``.
    """
    layout = codec.layout("gradient", tuple(like.shape))
    _check_names(tensors, layout)
    _check_parts(tensors, layout)
    return _decoded(codec, "gradient", tensors)


def _decoded(codec: Codec, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    values = codec.decode(name, tensors)
    if not torch.isfinite(values).all():
        raise ExchangeError(
            "non_finite",
            f"Expected finite {name}, found NaN or Inf. Lower the learning rate, or use bf16 instead of fp16.",
        )
    return values


def _check_names(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    if tensors.keys() != layout.keys():
        raise ExchangeError("wrong_tensors", f"Expected the tensors {sorted(layout)}, found {short(sorted(tensors))}.")


def _check_parts(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    for name, part in layout.items():
        if tensors[name].dtype != part.dtype:
            raise ExchangeError("wrong_dtype", f"Expected {name} as {part.dtype}, found {tensors[name].dtype}.")
    for name, part in layout.items():
        if tensors[name].shape != part.shape:
            found = tuple(tensors[name].shape)
            raise ExchangeError("wrong_shape", f"Expected {name} of shape {part.shape}, found {found}.")
