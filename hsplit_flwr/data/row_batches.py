"""Tokenized rows as batches, in an order that seed and epoch alone decide.

A *batch* maps ``input_ids`` (B, T) int64, ``attention_mask`` (B, T) int64 and ``labels`` (B, T) int64, -100 where there
is no loss and on the padding. Labels are not shifted: the loss shifts them, as in transformers. Padding is on the
right.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hsplit_flwr.data.token_row import IGNORE, TokenRow
from hsplit_flwr.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


class BatchOrder(NamedTuple):
    """How rows become batches."""

    batch_size: int
    """rows per batch"""
    seed: int = 0
    """of the shuffling"""
    shuffle: bool = True
    """False keeps the given order in every epoch (evaluation)"""


class RowBatches:
    """Batches of ``rows``, each row once per epoch, in an order that ``(seed, epoch)`` alone decides.

    Iterating gives one epoch (the first pass is epoch 0, the next pass epoch 1, ...); the last batch of an
    epoch may be smaller. `stream` gives the endless sequence of all epochs from any step on and does not
    depend on earlier passes, so a client that is built anew in every round continues where it stopped.

    Args:
        rows: at least one.
        order: batch size, seed, shuffling.
        pad_id: the token that fills up short rows; any will do, since it is masked and without loss.
        pad_to: the width of every batch; None: that of its longest row.

    Raises:
        ConfigError: no rows, or a size or seed out of range.
    """

    def __init__(self, rows: Sequence[TokenRow], order: BatchOrder, pad_id: int, pad_to: int | None = None) -> None:
        if not rows:
            raise ConfigError("Expected at least one example, found none. Give this client some data.")
        if order.batch_size < 1:
            raise ConfigError(f"Expected batch_size >= 1, found {order.batch_size}.")
        if order.seed < 0:
            raise ConfigError(f"Expected seed >= 0, found {order.seed}.")
        self.rows = rows
        self._order, self._pad_id, self._pad_to = order, pad_id, pad_to
        self._passes = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.rows) // self._order.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The batches of the next epoch."""
        first = self._passes * len(self)
        self._passes += 1
        stream = self.stream(first)
        return (next(stream) for _ in range(len(self)))

    def stream(self, start_step: int = 0) -> Iterator[dict[str, Tensor]]:
        """All batches from step ``start_step`` on, endless; step k is batch ``k % len`` of epoch ``k // len``."""
        if start_step < 0:
            raise ConfigError(f"Expected start_step >= 0, found {start_step}.")
        return self._steps(start_step)

    def epoch(self, number: int) -> list[int]:
        """Positions of all rows in the order of epoch `number`."""
        if not self._order.shuffle:
            return list(range(len(self.rows)))
        order: list[int] = np.random.default_rng((self._order.seed, number)).permutation(len(self.rows)).tolist()
        return order

    def _steps(self, step: int) -> Iterator[dict[str, Tensor]]:
        size = self._order.batch_size
        epoch, position = divmod(step, len(self))
        while True:
            order = self.epoch(epoch)
            for start in range(position * size, len(order), size):
                yield collate([self.rows[i] for i in order[start : start + size]], self._pad_id, self._pad_to)
            epoch, position = epoch + 1, 0


def collate(rows: Sequence[TokenRow], pad_id: int, pad_to: int | None) -> dict[str, Tensor]:
    """Right-padded tensors of `rows`, as wide as ``pad_to`` or the longest row."""
    width = pad_to or max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for position, row in enumerate(rows):
        input_ids[position, : len(row.ids)] = torch.tensor(row.ids)
        attention_mask[position, : len(row.ids)] = 1
        labels[position, : len(row.ids)] = torch.tensor(row.labels)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of `items`, evenly spaced; all of them for 0."""
    return list(items[:: max(1, len(items) // count)][:count]) if count else list(items)


def padding_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that fills up short rows."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return int(eos if pad is None else pad or 0)
