"""Data-to-text as batches: a meaning representation is the prompt, its sentence is what the loss is taken on.

The form is that of GPT-2 on E2E NLG in LoRA (Hu et al. 2021, arXiv:2106.09685, section 5.4): ``<mr> =>
<ref><eos>``, with the loss on the reference and the end token only. A *batch* maps ``input_ids`` (B, T)
int64, ``attention_mask`` (B, T) int64 and ``labels`` (B, T) int64, -100 on the prompt and the padding. Labels
are not shifted: the loss shifts
them, as in transformers. Padding is on the right.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsplit_flwr.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a position that has no loss."""
SHOWN = 60
"""Characters of a prompt in a message"""
SEPARATOR = " =>"
"""Ends the prompt; the target follows after one space."""

_log = logging.getLogger("hsplit_flwr")


@dataclass(frozen=True)
class Example:
    """One meaning representation and one sentence that says it."""

    mr: str
    """The prompt, such as ``name[The Blue Otter], food[Thai]``"""
    ref: str
    """The target sentence(s)"""
    slots: Mapping[str, str] = field(default_factory=dict)
    """``mr`` as field -> value, for partitioning; not seen by the model"""


def prompt_text(mr: str) -> str:
    """The text a model is given to continue, for training and for generation alike."""
    return mr + SEPARATOR


class _Encoded(NamedTuple):
    """Token ids of one example: prompt, then target and end token (cut to the maximum length)."""

    ids: list[int]
    prompt_length: int


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` of `examples`, evenly spaced; all of them for 0."""
    return list(examples[:: max(1, len(examples) // count)][:count]) if count else list(examples)


class TextBatches:
    """Batches of ``examples``, each example once per epoch, in an order that ``(seed, epoch)`` alone decides.

    Iterating gives one epoch (the first pass is epoch 0, the next pass epoch 1, ...); the last batch of an
    epoch may be smaller. `stream` gives the endless sequence of all epochs from any step on and does not
    depend on earlier passes, so a client that is built anew in every round continues where it stopped.
    Tokenising happens once, here.

    Args:
        examples: at least one.
        tokenizer: a transformers tokenizer with an end token.
        batch_size: examples per batch.
        max_length: tokens of prompt, target and end token together. A target too long is cut (see ``truncated``); an
            example whose prompt alone is as long has nothing to learn from, and is left out (see ``dropped``).
        seed: of the shuffling.
        shuffle: False keeps the given order in every epoch (evaluation).
        pad_to_max_length: pad every batch to ``max_length`` instead of to its longest example.

    Raises:
        ConfigError: no example, a size below 1, no end token, or no prompt that leaves room for a target.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        batch_size: int,
        max_length: int,
        seed: int = 0,
        shuffle: bool = True,
        pad_to_max_length: bool = False,
    ) -> None:
        if not examples:
            raise ConfigError("Expected at least one example, found none. Give this client some data.")
        if batch_size < 1:
            raise ConfigError(f"Expected batch_size >= 1, found {batch_size}.")
        if seed < 0:
            raise ConfigError(f"Expected seed >= 0, found {seed}.")
        self.max_length = max_length
        self.truncated = 0
        """How many examples had their target cut to fit ``max_length``"""
        self.dropped = 0
        """How many examples are left out because their prompt fills ``max_length``"""
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._pad_to = max_length if pad_to_max_length else None
        self._passes = 0
        self._encoded = self._encode(examples, tokenizer)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self._pad_id = int(eos if pad is None else pad)  # any id will do: masked and without loss

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self._encoded) // self._batch_size)

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

    def _steps(self, step: int) -> Iterator[dict[str, Tensor]]:
        epoch, position = divmod(step, len(self))
        while True:
            order = self._order(epoch)
            for start in range(position * self._batch_size, len(order), self._batch_size):
                chosen = order[start : start + self._batch_size]
                yield collate([self._encoded[i] for i in chosen], self._pad_id, self._pad_to)
            epoch, position = epoch + 1, 0

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._encoded)))
        order: list[int] = np.random.default_rng((self._seed, epoch)).permutation(len(self._encoded)).tolist()
        return order

    def _encode(self, examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase") -> list[_Encoded]:
        if tokenizer.eos_token_id is None:
            raise ConfigError("Expected a tokenizer with an end token, found none. Set tokenizer.eos_token.")
        # Tokenised apart, so that a merge across the border cannot make the prompt depend on its target.
        prompts = tokenizer([prompt_text(example.mr) for example in examples])["input_ids"]
        targets = tokenizer([" " + example.ref for example in examples], add_special_tokens=False)["input_ids"]
        whole = [
            _Encoded([*prompt, *target, tokenizer.eos_token_id], len(prompt))
            for prompt, target in zip(prompts, targets, strict=True)
        ]
        too_long = [row for row, encoded in enumerate(whole) if encoded.prompt_length >= self.max_length]
        self._report_dropped(examples, whole, too_long)
        whole = [encoded for encoded in whole if encoded.prompt_length < self.max_length]
        self.truncated = sum(len(encoded.ids) > self.max_length for encoded in whole)
        return [_Encoded(encoded.ids[: self.max_length], encoded.prompt_length) for encoded in whole]

    def _report_dropped(self, examples: Sequence[Example], whole: Sequence[_Encoded], rows: Sequence[int]) -> None:
        self.dropped = len(rows)
        if not rows:
            return
        found = (
            f"{len(rows)} of {len(examples)} examples with longer prompts, the first of {whole[rows[0]].prompt_length} "
            f"tokens in row {rows[0]}: {examples[rows[0]].mr[:SHOWN]!r}"
        )
        if len(rows) == len(examples):
            raise ConfigError(
                f"Expected a prompt that leaves room for its target in max-length={self.max_length} tokens, found "
                f"{found}. Raise max-length or shorten the prompts."
            )
        _log.warning("Left out what has no room for a target in max-length=%d tokens: %s", self.max_length, found)


def collate(examples: Sequence[tuple[list[int], int]], pad_id: int, pad_to: int | None) -> dict[str, Tensor]:
    """Right-padded tensors of ``(ids, prompt_length)`` pairs, as wide as ``pad_to`` or the longest example."""
    width = pad_to or max(len(ids) for ids, _ in examples)
    input_ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for row, (ids, prompt_length) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        labels[row, prompt_length : len(ids)] = input_ids[row, prompt_length : len(ids)]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
