"""The quantised layers of bitsandbytes as layers of a segment. Imported only where a base is quantised.

Two things are other than bitsandbytes does by itself, so that a pass computes the same whether it trains or scores:
in 4 bits the weights are not repacked for bf16 at the first pass without gradients; in 8 bits a CPU dequantises the
weight for every pass, as bitsandbytes does in training, instead of quantising the activations, too.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.quantized import INT8, Quantization, QuantizedLayer
from hsplit_flwr.models.segments import linear_shape

INT8_LEVELS = 127


def empty(quantization: Quantization, plain: nn.Module, dtype: torch.dtype) -> QuantizedLayer:
    """A layer in place of `plain` that computes in `dtype`; on the meta device until it is loaded."""
    d_out, d_in = linear_shape(plain)
    settings = quantization.transformers_config(dtype)
    kind: Any = EightBit
    options = {"has_fp16_weights": False, "threshold": settings.llm_int8_threshold}
    if quantization.method != INT8:
        kind = FourBit
        options = {
            "compute_dtype": dtype,
            "compress_statistics": settings.bnb_4bit_use_double_quant,
            "quant_type": quantization.method,
        }
    with torch.device("meta"):
        layer: QuantizedLayer = kind(d_in, d_out, plain.bias is not None, **options)
    layer.quantization = quantization
    layer.transposed = not isinstance(plain, nn.Linear)
    return layer.requires_grad_(False)


class FourBit(QuantizedLayer, bnb.nn.Linear4bit):  # type: ignore[misc]
    """A layer of nf4 or fp4."""

    weight: Any
    """a `Params4bit`"""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.support_avx512bf16_for_cpu = False  # see above

    def load(self, weight: Tensor, statistics: Mapping[str, Tensor], device: torch.device | str) -> None:
        """See `QuantizedLayer`."""
        if statistics:
            self._take(weight, statistics, device)
            return
        self.weight = bnb.nn.Params4bit(
            weight.T if self.transposed else weight,
            requires_grad=False,
            compress_statistics=self.weight.compress_statistics,
            quant_type=self.weight.quant_type,
            module=self,
        ).to(device)

    def stored_weight(self) -> Tensor:
        """See `QuantizedLayer`."""
        weight: Tensor = dequantize_4bit(self.weight.data, self.weight.quant_state)
        return weight.float()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output (..., d_out)."""
        return self.with_beside(super().forward(x), x)

    def _take(self, codes: Tensor, statistics: Mapping[str, Tensor], device: torch.device | str) -> None:
        take = bnb.nn.Params4bit.from_prequantized
        try:
            self.weight = take(codes, dict(statistics), device=device, module=self)
            state = self.weight.quant_state
            found = tuple(state.shape), state.quant_type, codes.numel()
        # Whatever bitsandbytes makes of the JSON in a tensor of a checkpoint.
        except Exception as error:
            raise _unfit(self, error) from error
        shape = self.out_features, self.in_features
        expected = shape, self.quantization.method, -(-math.prod(shape) // 2)
        if found != expected:
            raise _unfit(self, f"(shape, type, bytes) {found} where {expected} belong")


class EightBit(QuantizedLayer, bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """A layer of LLM.int8()."""

    weight: Any
    """an `Int8Params`"""
    state: Any
    """weight and scales, as bitsandbytes multiplies by them"""

    def load(self, weight: Tensor, statistics: Mapping[str, Tensor], device: torch.device | str) -> None:
        """See `QuantizedLayer`."""
        kind = bnb.nn.Int8Params
        if statistics:
            codes, scales = weight.to(device), self._scales(weight, statistics).to(device)
            self.weight = kind(codes, requires_grad=False, CB=codes, SCB=scales)
        else:
            self.weight = kind(weight.T if self.transposed else weight, requires_grad=False).to(device)
        self.init_8bit_state()  # type: ignore[operator]

    def stored_weight(self) -> Tensor:
        """See `QuantizedLayer`."""
        weight: Tensor = self.state.CB.float()
        return weight.mul_(self.state.SCB[:, None] / INT8_LEVELS)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output (..., d_out)."""
        return self.with_beside(super().forward(x), x)

    def train(self, mode: bool = True) -> Self:
        """Always in training mode, which here says how a CPU computes, see above; there is no dropout in it."""
        return super().train(True)

    def _scales(self, codes: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        shape, scales = (self.out_features, self.in_features), statistics.get("SCB")
        if tuple(codes.shape) != shape or codes.dtype != torch.int8:
            raise _unfit(self, f"{codes.dtype} {tuple(codes.shape)}")
        if scales is None or scales.shape != shape[:1]:
            raise _unfit(self, "scales (SCB) of another shape, or none")
        return scales.float()


def _unfit(layer: QuantizedLayer, found: object) -> ConfigError:
    return ConfigError(
        f"Expected a weight quantised by {layer.quantization.method} for a layer of (d_out, d_in) = "
        f"{(layer.out_features, layer.in_features)}, found {found!s:.300}. Quantise the checkpoint again, or take the "
        "one that it was made from."
    )
