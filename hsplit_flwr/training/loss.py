"""Next-token loss: what batches are, how they are scored."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.training.batch import Batch

PARTS = ("input_ids", "attention_mask", "labels")
PART_BYTES = 32 << 20
"""of float32 logits that are formed at once: with V = 151,936, of 55 positions"""
NO_TARGETS = (
    "no target tokens. Labels must hold token ids, not only -100, after the first position of a row; "
    "give a list of batches, as an iterator is empty after its first use."
)


def target_tokens(labels: Tensor) -> int:
    """How many positions of `labels` (B, T) are predicted."""
    return int((labels[:, 1:] != -100).sum())


def tensors_of(batch: Batch, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` for `segment`, which holds the embeddings; on the CPU.

    What travels, and what is counted, is told by mask and labels, and a GPU would be waited for each time.

    Raises:
        ConfigError: one is missing, they are not of one shape (B, T), the mask has other values than 0 and 1, or the
            batch holds another tensor, which a model might use and nothing here does (other things in it may stay), or
            see `Segment.check_tokens`.
    """
    if missing := [name for name in PARTS if name not in batch]:
        raise ConfigError(f"Expected batches with {', '.join(PARTS)}, found none for {missing}.")
    if ignored := sorted(name for name, value in batch.items() if isinstance(value, Tensor) and name not in PARTS):
        raise ConfigError(
            f"Expected no tensors in a batch but {', '.join(PARTS)}, found {', '.join(ignored)}: neither head nor tail "
            "would use it. Put one document in a row, padded, and take it out of the batch."
        )
    input_ids, mask, labels = (batch[name].cpu() for name in PARTS)
    if not (input_ids.shape == mask.shape == labels.shape and input_ids.dim() == 2):
        raise ConfigError(
            f"Expected {', '.join(PARTS)} of one shape (B, T), "
            f"found {tuple(input_ids.shape)}, {tuple(mask.shape)}, {tuple(labels.shape)}."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ConfigError(
            f"Expected an attention_mask of 1 (token) and 0 (padding), found values {torch.unique(mask).tolist()[:5]}. "
            "Put one document in a row, padded."
        )
    segment.check_tokens(input_ids, labels)
    return input_ids, mask, labels


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss per position (B, T) of next-token prediction, float32; 0 where the label to predict is -100.

    Position t predicts label t+1, as in transformers' ``ForCausalLMLoss``. Of large vocabularies no float32 copy of all
    logits is made: some positions at a time, to the same bits.

    Args:
        logits: (B, T, V), any float dtype.
        labels: (B, T), on any device.
    """
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten().to(logits.device)
    flat = logits.flatten(0, 1)
    if len(flat) <= _positions_at_once(flat):
        return _losses(flat, shifted).view(labels.shape)
    losses: Tensor = _LossesByParts.apply(flat, shifted)  # type: ignore[no-untyped-call]
    return losses.view(labels.shape)


def _losses(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=-100, reduction="none")


def _positions_at_once(logits_NV: Tensor) -> int:
    return max(1, PART_BYTES // (4 * logits_NV.shape[1]))


class _LossesByParts(torch.autograd.Function):
    """`_losses`, some positions at a time; backward computes them again, instead of keeping V log probabilities each.

    Every row of a softmax is computed by itself, so losses and gradients have the bits of the whole.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, labels_N)
        size = _positions_at_once(logits_NV)
        parts = [torch.split(tensor, size) for tensor in (logits_NV, labels_N)]
        return torch.cat([_losses(logits, labels) for logits, labels in zip(*parts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, labels_N = ctx.saved_tensors
        size = _positions_at_once(logits_NV)
        gradient_NV = torch.empty_like(logits_NV)
        parts = [torch.split(tensor, size) for tensor in (logits_NV, labels_N, gradient_N, gradient_NV)]
        for logits, labels, gradient, found in zip(*parts, strict=True):
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                losses = _losses(leaf, labels)
            found.copy_(*torch.autograd.grad(losses, leaf, gradient))
        return gradient_NV, None


@dataclass(frozen=True)
class Score:
    """Loss over a set of batches."""

    nll: float
    """summed negative log-likelihood, nats"""
    tokens: int
    """target tokens"""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per target token, nats.

        Raises:
            ConfigError: no target tokens: nothing was measured.
        """
        if not self.tokens:
            raise ConfigError(f"Expected labels to score, found {NO_TARGETS}")
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(total NLL / total tokens). Raises `ConfigError` as `loss` does."""
        return math.exp(min(self.loss, 700.0))


def score_segment(segment: Segment, batches: Iterable[Batch]) -> Score:
    """Loss of a segment that holds the whole model on `batches`; its adapters count.

    Raises:
        ConfigError: no target tokens in all of `batches`, or see `tensors_of`.
    """
    nll, tokens, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            input_ids, mask, labels = tensors_of(batch, segment)
            nll += float(token_losses(segment(input_ids, mask), labels).double().sum())
            tokens += target_tokens(labels)
            count += 1
    if not tokens:
        raise ConfigError(f"Expected batches to score, found {count} with {NO_TARGETS}")
    return Score(nll, tokens)
