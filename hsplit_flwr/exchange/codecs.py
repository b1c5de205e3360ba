"""How float tensors travel: a codec is a row of `CODECS`, chosen by ``activation_codec`` and ``gradient_codec``.

A codec alone knows how values are packed: frames, their sizes and their checks ask it. Shapes: N positions, H hidden.

    name              bytes per value       worst error of a value
    fp32              4                     0
    bf16              2                     2^-8 of the value
    fp16              2                     2^-11 of the value, or 2^-25; beyond 65504 it is infinite, and refused
    int8              1 + 4/H               1/254 of the position's largest value
    int4              9/16                  1/13.8 of the largest of its block of 32 values
    int4_stochastic   9/16                  1/6.9 of the largest of its block, unbiased
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hsplit_flwr.common.finite import all_finite
from hsplit_flwr.errors import ConfigError, ExchangeError

Shape = tuple[int, ...]
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""so that nothing is divided by zero, or by a number that has lost digits"""
LARGEST = torch.finfo(torch.float32).max
LEVELS8, LEVELS4 = 127, 7
"""whole numbers on either side of zero"""
BLOCK = 32
"""values along H that share a scale in int4"""


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
    """How a float tensor (..., H) becomes named tensors of a frame, and comes back.

    ``name`` says whose parts they are (``activations``, ``gradient``): a codec of one part calls it so, one of several
    adds to it (``activations.scale``). The names do not depend on the shape.
    """

    @property
    def float_copies(self) -> int:
        """How many copies of the values in float32 are alive while they are packed or unpacked; 0: none is made."""

    def layout(self, name: str, shape: Shape) -> Layout:
        """What `encode` makes of a tensor of `shape`."""

    def encode(self, name: str, values: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """The parts that travel; `seed` decides on what is rounded by chance."""

    def decode(self, name: str, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """The values (..., H) of `shape`, in any float dtype.

        `parts` have the names, shapes and dtypes of `layout`; their values are the peer's. Whether the result is finite
        is checked afterwards.

        Raises:
            ExchangeError: ``wrong_scale``.
        """


@dataclass(frozen=True)
class Cast:
    """The values in another dtype, one part."""

    dtype: torch.dtype
    float_copies: ClassVar[int] = 0

    def layout(self, name: str, shape: Shape) -> Layout:
        """See `Codec`."""
        return {name: Part(shape, self.dtype)}

    def encode(self, name: str, values: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """See `Codec`."""
        return {name: values.to(self.dtype)}

    def decode(self, name: str, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """See `Codec`; the part itself, in its wire dtype."""
        return parts[name]


@dataclass(frozen=True)
class Int8:
    """A byte a value, and a float32 scale per position: its largest absolute value becomes 127.

    No value is wrong by more than 1/254 of the position's largest absolute value (and rounding, or 1e-38).
    """

    float_copies: ClassVar[int] = 2

    def layout(self, name: str, shape: Shape) -> Layout:
        """See `Codec`."""
        return {name: Part(shape, torch.int8), f"{name}.scale": Part((*shape[:-1], 1), torch.float32)}

    def encode(self, name: str, values: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """See `Codec`. What is not finite has a scale that is not, and is refused at the other end."""
        scale = _scale(values.float(), LEVELS8)
        return {name: (values.float() / scale).round_().to(torch.int8), f"{name}.scale": scale}

    def decode(self, name: str, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """See `Codec`; float32."""
        scale = _checked_scale(name, parts)
        return (parts[name] * scale).clamp_(-LARGEST, LARGEST)


@dataclass(frozen=True)
class Int4:
    """Half a byte a value, and a bfloat16 scale per block of 32 values along H, the last of which may be shorter.

    The scale is a seventh of the block's largest absolute value, rounded up. No value is wrong by more than half of it
    (1/13.8 of the block's largest absolute value), or by all of it (1/6.9) where chance decides which of its two
    neighbors a value is rounded to, so that it is right on average.
    """

    stochastic: bool = False
    float_copies: ClassVar[int] = 3

    def layout(self, name: str, shape: Shape) -> Layout:
        """See `Codec`. A byte holds the values i and i + 16 of a block, each as 1 to 15."""
        blocks = -(-shape[-1] // BLOCK)
        return {
            name: Part((*shape[:-1], blocks * BLOCK // 2), torch.uint8),
            f"{name}.scale": Part((*shape[:-1], blocks), torch.bfloat16),
        }

    def encode(self, name: str, values: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """See `Codec`. What is not finite has a scale that is not, and is refused at the other end."""
        count = -(-values.shape[-1] // BLOCK)
        whole = F.pad(values.float(), (0, count * BLOCK - values.shape[-1]))
        blocks = whole.reshape(*values.shape[:-1], count, BLOCK)
        scale = _rounded_up(_scale(blocks, LEVELS4))
        levels = blocks / scale.float()
        if self.stochastic:
            chance = torch.Generator().manual_seed(seed)
            levels = levels.add_(torch.rand(levels.shape, generator=chance).to(levels.device)).floor_()
        else:
            levels = levels.round_()
        digits = levels.clamp_(-LEVELS4, LEVELS4).add_(LEVELS4 + 1).to(torch.uint8)
        low, high = digits[..., : BLOCK // 2], digits[..., BLOCK // 2 :]
        return {name: (low | high << 4).flatten(-2), f"{name}.scale": scale.squeeze(-1)}

    def decode(self, name: str, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """See `Codec`; float32."""
        scale = _checked_scale(name, parts).float().unsqueeze(-1)
        packed = parts[name].reshape(*scale.shape[:-1], BLOCK // 2)
        levels = torch.cat([packed & 15, packed >> 4], -1).float().sub_(LEVELS4 + 1)
        return levels.mul_(scale).clamp_(-LARGEST, LARGEST).flatten(-2)[..., : shape[-1]]


CODECS: Mapping[str, Codec] = {
    "fp32": Cast(torch.float32),
    "bf16": Cast(torch.bfloat16),
    "fp16": Cast(torch.float16),
    "int8": Int8(),
    "int4": Int4(),
    "int4_stochastic": Int4(stochastic=True),
}
"""The codecs by the names that people type; `training.config.WIRE_CODECS` repeats them."""


def codec_named(name: str) -> Codec:
    """The codec that a run's settings ask for.

    Raises:
        ConfigError: this version has none of that name.
    """
    if name not in CODECS:
        raise ConfigError(
            f"Expected a codec that this side has, one of {', '.join(CODECS)}, found {name!r}. "
            "Install the same hsplit_flwr version on server and clients, or set activation-codec and gradient-codec."
        )
    return CODECS[name]


def _scale(values: Tensor, levels: int) -> Tensor:
    """What a level is worth, along the last dimension (kept); NaN where a value is."""
    return (values.abs().amax(-1, keepdim=True) / levels).clamp_min_(SMALLEST_SCALE)


def _rounded_up(scale: Tensor) -> Tensor:
    """The bfloat16 number that is `scale` (> 0) or next above it."""
    nearest = scale.to(torch.bfloat16)
    above = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(nearest.float() < scale, above, nearest)


def _checked_scale(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    scale = parts[f"{name}.scale"]
    if not all_finite(scale):
        raise ExchangeError(
            "non_finite", f"Expected finite {name}, found a scale of NaN or Inf. Lower the learning rate."
        )
    if not (scale > 0).all():
        raise ExchangeError("wrong_scale", f"Expected scales of {name} > 0, found {float(scale.min())}.")
    return scale
