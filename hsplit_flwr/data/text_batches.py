"""Data-to-text as batches: a meaning representation is the prompt, its sentence is what the loss is taken on.

The form is that of GPT-2 on E2E NLG in LoRA (Hu et al. 2021, arXiv:2106.09685, section 5.4): ``<mr> =>
<ref><eos>``, with the loss on the reference and the end token only. What a batch is stands in `row_batches.py`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hsplit_flwr.data.row_batches import BatchOrder, RowBatches, padding_of
from hsplit_flwr.data.token_row import IGNORE, TokenRow
from hsplit_flwr.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


class TextBatches(RowBatches):
    """Batches of ``examples`` (see `RowBatches`). Tokenizing happens once, here.

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
        self.max_length = max_length
        self.truncated = 0
        """How many examples had their target cut to fit ``max_length``"""
        self.dropped = 0
        """How many examples are left out because their prompt fills ``max_length``"""
        rows = [_row(encoded) for encoded in self._encode(examples, tokenizer)] if examples else []
        order, pad_to = BatchOrder(batch_size, seed, shuffle), max_length if pad_to_max_length else None
        super().__init__(rows, order, padding_of(tokenizer), pad_to)

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


def _row(encoded: _Encoded) -> TokenRow:
    ids, prompt = encoded.ids, encoded.prompt_length
    return TokenRow(ids, [IGNORE] * prompt + ids[prompt:])
