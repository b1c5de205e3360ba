"""The weights everyone agrees on: the base W_0 on disk plus the cumulative delta, in any segment of the model."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsplit_flwr.lora.aggregation import Increment
from hsplit_flwr.lora.delta_log import DeltaLog
from hsplit_flwr.lora.deltas import WeightDelta, merge_into
from hsplit_flwr.lora.segment_adapters import linear_shape
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import Segment, block_of, load_segment
from hsplit_flwr.training.session import target_tokens
from hsplit_flwr.training.tail import token_losses


def linear_shapes(segment: Segment) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear layer of the segment, by whole-model module name."""
    return {name: linear_shape(layer) for name, layer in segment.linear_modules().items()}


def merge_delta(segment: Segment, files: ModelFiles, delta: WeightDelta, names: Iterable[str]) -> None:
    """Form ``W = round(W_0 + delta)`` anew for the modules `names` of `segment`, reading W_0 from disk."""
    layers = segment.linear_modules()
    for name in names:
        layer = layers[name]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        merged = merge_into(
            files.read(f"{name}.weight"),
            delta.form(name),
            transposed=not isinstance(layer, nn.Linear),
            dtype=weight.dtype,
        )
        weight.data = merged.to(weight.device)


@dataclass(frozen=True)
class Score:
    """Loss over a set of batches."""

    nll: float
    """summed negative log-likelihood, nats"""
    tokens: int
    """target tokens"""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per target token, nats."""
        return self.nll / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(total NLL / total tokens)."""
        return math.exp(min(self.loss, 700.0))


def score_segment(segment: Segment, batches: Iterable[Mapping[str, Tensor]]) -> Score:
    """Loss of a segment that holds the whole model on `batches`; its adapters count."""
    device = next(segment.parameters()).device
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"].to(device)
            logits = segment(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            nll += float(token_losses(logits, labels).double().sum())
            tokens += target_tokens(labels)
    return Score(nll, tokens)


class GlobalModel:
    """The server's whole model, always at the newest version of the weights.

    Args:
        files: the base model.
        dtype: of the weights that train and serve; the delta itself is float32.
        device: where the model lives.
    """

    def __init__(self, files: ModelFiles, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.files = files
        self.segment = load_segment(files, dtype=dtype, device=device)
        self.log = DeltaLog()

    @property
    def num_blocks(self) -> int:
        """L, the number of blocks; a cut is 1..L-1."""
        return self.segment.num_blocks

    def head_names(self, cut: int) -> list[str]:
        """The linear layers of blocks 0..cut-1, in the order of the model."""
        return [name for name in self.segment.linear_modules() if block_of(name) < cut]

    def apply(self, increment: Increment) -> int:
        """Add a round's increment and merge it; returns the new version."""
        version = self.log.append(increment)
        merge_delta(self.segment, self.files, self.log.total, increment)
        return version

    def since(self, have: int, cut: int) -> tuple[int, bool, dict[str, Tensor]]:
        """What a head of `cut` blocks at version `have` lacks: (version, whether that is the whole, tensors)."""
        update = self.log.since(have, self.head_names(cut))
        return update.version, update.base is None, update.to_tensors()

    def score(self, batches: Iterable[Mapping[str, Tensor]]) -> Score:
        """Loss of the whole model on `batches` (adapters that are not merged yet count too)."""
        return score_segment(self.segment, batches)
