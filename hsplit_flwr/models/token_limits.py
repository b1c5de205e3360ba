"""What token ids a model takes: how many in a row, and which. Beyond that torch says "index out of range in self"."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn
from transformers import PreTrainedModel

from hsplit_flwr.errors import ConfigError

IGNORE = -100
"""the label of a position without loss"""
_PADDING_ROWS = 2
"""of a position table, beyond its positions (OPT has them)"""
_log = logging.getLogger("hsplit_flwr")


@dataclass(frozen=True)
class TokenLimits:
    """The limits of one model."""

    kind: str
    """its model type"""
    vocabulary: int
    """V: token ids lie in 0..V-1"""
    positions: int | None
    """the longest row; None where no table of positions ends, as with rotary embeddings or ALiBi"""
    trained_positions: int | None
    """the longest row the config speaks of"""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "TokenLimits":
        """The limits of a whole model or of one that holds its embeddings; parameters may be on the meta device."""
        config = model.config.get_text_config()
        stated = getattr(config, "max_position_embeddings", None)
        limit = stated if isinstance(stated, int) and stated > 0 else None
        ends = limit is not None and any(limit <= rows <= limit + _PADDING_ROWS for rows in _table_rows(model))
        return cls(config.model_type, int(config.vocab_size), limit if ends else None, limit)

    def check(self, input_ids: Tensor, labels: Tensor | None = None) -> None:
        """Looks at `input_ids` and `labels` (B, T) before a model does; warns of rows that rotary models may not know.

        Raises:
            ConfigError: a row is longer than the positions, or an id or a label is none of the vocabulary's.
        """
        width = input_ids.shape[1]
        if self.positions is not None and width > self.positions:
            raise ConfigError(
                f"Expected rows of at most {self.positions} tokens, the positions that this {self.kind} model has, "
                f"found rows of {width}. Lower max-length, or choose a model with more positions."
            )
        if self.trained_positions is not None and width > self.trained_positions:
            _warn(self.kind, self.trained_positions, width)
        self._check_ids("token ids", input_ids)
        if labels is not None:
            self._check_ids(f"labels that are {IGNORE} or", labels[labels != IGNORE])

    def _check_ids(self, what: str, ids: Tensor) -> None:
        if ids.numel() == 0:
            return
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self.vocabulary:
            raise ConfigError(
                f"Expected {what} in 0..{self.vocabulary - 1}, the vocabulary of this {self.kind} model, found "
                f"{lowest if lowest < 0 else highest}. Use the tokenizer that belongs to the model."
            )


def _table_rows(model: PreTrainedModel) -> Iterator[int]:
    """Rows of everything that may be a table of positions: embeddings but that of the tokens, and 2-D buffers."""
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            yield module.num_embeddings
        yield from (buffer.shape[0] for buffer in module.buffers(recurse=False) if buffer.ndim == 2)


@lru_cache(maxsize=64)
def _warn(kind: str, trained: int, width: int) -> None:
    _log.warning(
        "Rows of %d tokens: config.json of this %s model speaks of %d positions. Longer rows run, but the model was "
        "not trained on them.",
        width,
        kind,
        trained,
    )
