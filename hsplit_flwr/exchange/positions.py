"""Which positions of a batch travel, and how those that are marked are told: as spans, or as bits.

Only what the loss depends on travels: tokens after which a target comes in their row. What stands behind the last
target is seen by nothing that predicts one, since the decoder is causal. Padding does not travel either: attention
gives a padded key no weight at all, so that what stands there changes nothing, and a padded query that predicts no
target gives no gradient. In place of both the tail puts zeros, and the head takes zeros for their gradient. Where
padding does predict a target (labels on the first token of a left-padded row), such a query sees keys as its
architecture likes, padded and later ones too, and the row travels whole.

Shapes: B rows, T width, N positions that travel.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.codecs import Layout, Part

IGNORED = -100
"""the label of what is no target"""
_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


class BatchForm(NamedTuple):
    """What the bytes of a batch and of its gradient depend on, beside the model and the codecs."""

    rows: int
    width: int
    """positions of a row, padding included"""
    positions: int
    """that travel"""
    targets: int
    """labels that are none of `IGNORED`"""
    mask_in_spans: bool = True
    """the tokens of every row are contiguous"""
    labels_in_spans: bool = True
    """the targets of every row are contiguous"""
    kept_rows: int = 0
    """that the tail has, and the frame refers to (`row_references.py`)"""
    kept_positions: int = 0
    """of `positions`, those of these rows: their activations are not in the frame"""

    @classmethod
    def of(cls, attention_mask: Tensor, labels: Tensor) -> Self:
        """The form of a batch of this mask and these labels, (B, T) each."""
        rows, width = attention_mask.shape
        targets = labels != IGNORED
        return cls(
            rows,
            width,
            int(traveling(attention_mask, labels).sum()),
            int(targets.sum()),
            in_spans(attention_mask != 0),
            in_spans(targets),
        )

    @classmethod
    def largest(cls, rows: int, width: int) -> Self:
        """The form of a batch all of whose positions travel, and all of whose labels are targets.

        No batch of contiguous rows takes more bytes. It has padding that predicts a target in every row; one without
        padding has one position less in each, for its last token predicts nothing.
        """
        return cls(rows, width, rows * width, rows * width)


def traveling(attention_mask: Tensor, labels: Tensor) -> Tensor:
    """(B, T) bool: the positions whose activations and gradients travel, by (B, T) mask and labels."""
    return traveling_of(attention_mask != 0, labels != IGNORED)


def traveling_of(tokens: Tensor, targets: Tensor) -> Tensor:
    """As `traveling`, by marks (B, T)."""
    predicts = F.pad(targets[:, 1:], (0, 1))  # position t predicts label t + 1
    before_target = predicts.flip(1).cumsum(1).flip(1) > 0
    return (tokens & before_target) | (predicts & ~tokens).any(1, keepdim=True)


def gathered(values: Tensor, positions: Tensor) -> Tensor:
    """(N, H) of `values` (B, T, H) at `positions` (B, T), row by row; a view where that is all of them."""
    rows = values.flatten(0, 1)
    if bool(positions.all()):
        return rows
    places = positions.to(values.device).flatten().nonzero().squeeze(1)
    return rows.index_select(0, places)  # a quarter of the time that a mask as index takes


def scattered(values: Tensor, positions: Tensor) -> Tensor:
    """(B, T, H) of `values` (N, H) at `positions` (B, T) and zeros elsewhere; a view where that is all of them."""
    shape = (*positions.shape, values.shape[-1])
    if len(values) == positions.numel():
        return values.view(shape)
    whole = values.new_zeros(shape)
    whole[positions] = values
    return whole


def in_spans(marked: Tensor) -> bool:
    """Are the marks of every row of `marked` (B, T) contiguous?"""
    begins = F.pad(marked, (1, 0))[:, :-1] < marked
    return bool((begins.sum(1) <= 1).all())


def marks_layout(name: str, rows: int, width: int, spans: bool) -> Layout:
    """What `encode_marks` makes of marks (B, T): first and count of every row, or bits, the first one lowest."""
    if spans:
        return {f"{name}.spans": Part((rows, 2), torch.int32)}
    return {f"{name}.bits": Part((rows, -(-width // 8)), torch.uint8)}


def encode_marks(name: str, marked: Tensor) -> dict[str, Tensor]:
    """The one tensor that tells which of (B, T) are marked."""
    marked = marked.cpu()
    if in_spans(marked):
        spans = torch.stack([marked.to(torch.uint8).argmax(1), marked.sum(1)], 1)
        return {f"{name}.spans": spans.to(torch.int32)}
    rows, width = marked.shape
    octets = F.pad(marked, (0, -width % 8)).view(rows, -(-width // 8), 8)
    return {f"{name}.bits": (octets * _BITS).sum(-1, dtype=torch.uint8)}


def decode_marks(name: str, tensors: Mapping[str, Tensor], width: int) -> Tensor:
    """(B, T) bool, from a peer's tensors of the right dtype and shape.

    Raises:
        ExchangeError: ``wrong_<name>``, marks outside of the rows.
    """
    if (spans := tensors.get(f"{name}.spans")) is not None:
        first, count = spans.long().unsqueeze(-1).unbind(1)
        if ((first < 0) | (count < 0) | (first + count > width)).any():
            raise ExchangeError(
                f"wrong_{name}", f"Expected spans of {name} within rows of {width} positions, found others."
            )
        place = torch.arange(width)
        return (place >= first) & (place < first + count)
    marked = (tensors[f"{name}.bits"].unsqueeze(-1) & _BITS).ne(0).flatten(1)
    if marked[:, width:].any():
        raise ExchangeError(f"wrong_{name}", f"Expected bits of {name} for {width} positions a row, found more.")
    return marked[:, :width]
