"""Next-token loss: what batches are, how they are scored."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hsplit_flwr.models.segments import Segment


def target_tokens(labels: Tensor) -> int:
    """How many positions of `labels` (B, T) are predicted."""
    return int((labels[:, 1:] != -100).sum())


Batch = Mapping[str, Tensor]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss per position (B, T) of next-token prediction, float32; 0 where the label to predict is -100.

    Position t predicts label t+1, as in transformers' ``ForCausalLMLoss``.
    """
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    flat = F.cross_entropy(logits.float().flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction="none")
    return flat.view(labels.shape)


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
            segment.check_tokens(batch["input_ids"], batch["labels"])
            labels = batch["labels"].to(device)
            logits = segment(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            nll += float(token_losses(logits, labels).double().sum())
            tokens += target_tokens(labels)
    return Score(nll, tokens)
