"""People's own data, from a source to a client's batches: read, recognised, held out, divided, tokenized, fitted."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hsplit_flwr.common.checks import is_at_least, require, require_whole
from hsplit_flwr.data.chat_template import ChatTemplate, chat_template
from hsplit_flwr.data.encoding import LOSSES, Asked, Encoder
from hsplit_flwr.data.fitting import Fit, Fitted, fit_rows
from hsplit_flwr.data.forms import Example, Form, read_examples
from hsplit_flwr.data.partitions import Partition, divide
from hsplit_flwr.data.row_batches import BatchOrder, RowBatches, padding_of
from hsplit_flwr.data.sources import read_rows
from hsplit_flwr.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("hsplit_flwr")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which data, and what becomes of it."""

    source: str
    """a file, a folder or a name of the hub (`sources.KINDS`)"""
    held_out_source: str = ""
    """the same for the examples to score; empty: a share of `source` is held out"""
    split: str = "train"
    """of `source`, where it is a folder or a data set of the hub"""
    held_out_split: str = ""
    """of `held_out_source`; empty: `split`"""
    validation_share: float = 0.1
    """of the examples of `source` that are held out where there is no `held_out_source`"""
    loss_on: str = ""
    """one of `LOSSES`; empty: what the form suggests"""
    chat_template: str = ""
    """empty: the tokenizer's; see `chat_template.chat_template`"""
    fit: Fit
    partition: Partition
    batch_size: int = 8
    seed: int = 0
    """of what is held out and of the order of batches"""

    def __post_init__(self) -> None:
        require(
            is_at_least(self.validation_share, 0) and self.validation_share < 1,
            *("validation_share", ">= 0 and below 1", self.validation_share),
        )
        require_whole("seed", self.seed, 0)
        require(self.loss_on in ("", *LOSSES), "loss_on", f"as one of {LOSSES} or empty", self.loss_on)


class OwnData:
    """The examples of a source, and batches of them.

    Args:
        settings: see there.
        tokenizer: the model's.

    Raises:
        ConfigError: no such data, an unknown form, or a row that is not of the form (named by its number).
    """

    def __init__(self, settings: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.settings = settings
        self._tokenizer = tokenizer
        self._divided: dict[int, list[list[Example]]] = {}
        """parts that were asked for last, by their number"""
        self.form, examples = self._read(settings.source, settings.split)
        if settings.held_out_source:
            split = settings.held_out_split or settings.split
            self.train, (_, self.held_out) = examples, self._read(settings.held_out_source, split)
        else:
            self.train, self.held_out = hold_out(examples, settings.validation_share, settings.seed)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """How chats are written."""
        return chat_template(self._tokenizer, self.settings.chat_template)

    def describe(self) -> str:
        """Form, loss and examples in one line."""
        held_out = f"{len(self.held_out)} held out" if self.held_out else "none held out"
        return f"{self.describe_form()}, {len(self.train)} examples to train on, {held_out}"

    def describe_form(self) -> str:
        """Source, form and loss in one line."""
        columns = ", ".join(self.form.required)
        return f"{self.settings.source}: {self.form.name} ({columns}), loss on {self._loss_on}"

    def part(self, number: int, parts: int) -> list[Example]:
        """The training examples of client `number` of `parts` (raises as `divide`)."""
        if parts not in self._divided:  # a simulation's process is many clients, one after another
            self._divided = {parts: divide(self.train, parts, self.settings.partition)}
        return self._divided[parts][number]

    def training_batches(self, examples: Sequence[Example]) -> RowBatches:
        """Shuffled batches, packed where the settings say so.

        Raises:
            ConfigError: nothing to learn in any of `examples`.
        """
        fitted = self._fitted(examples, self.settings.fit)
        if not fitted.rows:
            raise ConfigError(
                f"Expected a row to learn from within max-length={self.settings.fit.max_length} tokens, found {fitted}."
                " Raise max-length, take too-long=cut, or another loss-on."
            )
        _log.info("data: %s", fitted)
        return self._batches(fitted, self.settings.batch_size, shuffle=True)

    def scoring_batches(self, examples: Sequence[Example], batch_size: int | None = None) -> RowBatches | tuple[()]:
        """Batches in the order of `examples`, each in a row of its own; none where there is no target.

        Args:
            examples: to score.
            batch_size: rows at a time; None: as many as to train on.
        """
        fitted = self._fitted(examples, Fit(self.settings.fit.max_length, self.settings.fit.too_long))
        if fitted.first:
            _log.warning("not scored as they are in the file: %s", fitted)
        size = batch_size or self.settings.batch_size
        return self._batches(fitted, size, shuffle=False) if fitted.rows else ()

    def check(self, parts: int | None = None) -> None:
        """What clients would find out: tokenize all, divide into `parts` (None: not known yet); say what there is.

        Raises:
            ConfigError: a row that cannot be tokenized, no row to learn from, or parts that cannot be made.
        """
        _log.info("data: %s", self.describe())
        self.training_batches(self.train)
        if parts is not None:
            divide(self.train, parts, self.settings.partition)

    def asked(self, examples: Sequence[Example], longest: int | None = None) -> list[Asked]:
        """Those of `examples` that have an answer, as questions, if the prompt is of 1 to `longest` tokens."""
        found = (self._encoder.asked(example.document) for example in examples)
        return [one for one in found if one and one.ids and (longest is None or len(one.ids) <= longest)]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._tokenizer, self.template, self._loss_on)

    @property
    def _loss_on(self) -> str:
        return self.settings.loss_on or self.form.loss_on

    def _fitted(self, examples: Sequence[Example], fit: Fit) -> Fitted:
        return fit_rows(((example.place, self._encoder.row(example)) for example in examples), fit)

    def _batches(self, fitted: Fitted, batch_size: int, *, shuffle: bool) -> RowBatches:
        order = BatchOrder(batch_size, self.settings.seed, shuffle)
        return RowBatches(fitted.rows, order, padding_of(self._tokenizer))

    def _read(self, source: str, split: str) -> tuple[Form, list[Example]]:
        return read_examples(read_rows(source, split), source)


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to score, each in their order; which is which, `seed` decides.

    At least one is held out where `share` is above 0, and one is left to train on.
    """
    count = min(max(1, round(share * len(examples))), len(examples) - 1) if share else 0
    chosen = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    kept = [example for number, example in enumerate(examples) if number not in chosen]
    return kept, [examples[number] for number in sorted(chosen)]
