"""What training changed goes into the weights, rounded once."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.factors import LoraFactors, stack
from hsplit_flwr.lora.places import MEMORY
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.quantized import QuantizedLayer
from hsplit_flwr.models.segments import Segment

MERGE_ROWS = 128


def merge_into(base: Tensor, delta: Tensor | LoraFactors, *, transposed: bool, dtype: torch.dtype) -> Tensor:
    """``W = round(W_0 + delta)``: a new tensor in `dtype`, rounded once; `base` stays as it is.

    Args:
        base: W_0 as stored, (d_out, d_in), or (d_in, d_out) if `transposed` (transformers' ``Conv1D``).
        delta: (d_out, d_in), float32, dense or as factors (`WeightDelta.form`).
        transposed: whether `base` is stored the other way round.
        dtype: the dtype to train or serve in.

    Raises:
        AggregationError: the shapes disagree.
    """
    d_out, d_in = (delta.B.shape[0], delta.A.shape[1]) if isinstance(delta, LoraFactors) else delta.shape
    if tuple(base.shape) != ((d_in, d_out) if transposed else (d_out, d_in)):
        raise AggregationError(
            f"Expected a delta of (d_out, d_in) = {tuple(base.T.shape if transposed else base.shape)} for this "
            f"base weight (transposed={transposed}), found {(d_out, d_in)}. "
            f"Check that the delta belongs to this base model."
        )
    merged = torch.empty(base.shape, dtype=dtype, device=base.device)
    # A few rows at a time: a chunk stays in cache and no float32 copy of the matrix is made, neither of the base nor
    # of the product of the factors.
    for start in range(0, base.shape[0], MERGE_ROWS):
        rows = slice(start, start + MERGE_ROWS)
        if isinstance(delta, LoraFactors):
            left, right = (delta.A.T, delta.B.T) if transposed else (delta.B, delta.A)
            merged[rows] = torch.addmm(base[rows].float(), left[rows], right, alpha=delta.scaling)
        else:
            merged[rows] = base[rows].float() + (delta.T if transposed else delta)[rows]
    return merged


def merge_delta(segment: Segment, files: ModelFiles, delta: WeightDelta, names: Iterable[str]) -> None:
    """Form ``W = round(W_0 + delta)`` anew for the modules `names` of `segment`, reading W_0 from disk.

    Beside a quantised W_0 the delta stands as it is.
    """
    layers = segment.linear_modules()
    for name in names:
        layer = layers[name]
        if isinstance(layer, QuantizedLayer):
            layer.stand(*_matrices(delta.form(name)))
            continue
        weight = layer.weight
        assert isinstance(weight, Tensor)
        merged = merge_into(
            files.read(f"{name}.weight"),
            delta.form(name),
            transposed=not isinstance(layer, nn.Linear),
            dtype=weight.dtype,
        )
        weight.data = merged.to(weight.device)


def merge_beneath(
    segment: Segment, files: ModelFiles, delta: WeightDelta, adapters: Mapping[str, LoraFactors], names: Iterable[str]
) -> None:
    """As `merge_delta`, under `adapters` that bring a part of `delta` themselves: ``W = round(W_0 + delta - c B A)``.

    With those adapters on it the segment computes what ``W_0 + delta`` does.
    """
    for name in names:
        beneath = delta.restricted([name])
        if name in adapters:
            beneath.place = MEMORY
            beneath.add({name: replace(adapters[name], scaling=-adapters[name].scaling)})
        merge_delta(segment, files, beneath, [name])


def _matrices(form: Tensor | LoraFactors) -> tuple[Tensor, ...]:
    """The matrices that inputs go through one after the other, where the weight is left alone."""
    if isinstance(form, Tensor):
        return (form,)
    factors = stack([form])
    return factors.A, factors.B
