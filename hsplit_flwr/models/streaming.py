"""A text as it is written: pieces, of which none is taken back.

transformers' `TextStreamer` decodes line by line, and what it prints need not be what the decoder makes of the whole
text: outer spaces, an end token that is no special one. Here the pieces are those of `Written.text`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""what a decoder makes of the first bytes of a character"""


class TextPieces(BaseStreamer):  # type: ignore[misc]
    """Says the new piece of a text after each token of ``generate``; a single prompt, greedy.

    Args:
        tokenizer: of the model.
        say: called with each piece.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", say: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._say = say
        self._tokens: list[int] | None = None
        self._said = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first, then every token."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.reshape(-1).tolist()
        self._say_rest(decoded(self._tokenizer, self._tokens).rstrip(_UNFINISHED).rstrip())

    def end(self) -> None:
        """Say what is left."""
        self._say_rest(decoded(self._tokenizer, self._tokens or []))

    def _say_rest(self, text: str) -> None:
        if text.startswith(self._said) and (piece := text[len(self._said) :]):
            self._said = text
            self._say(piece)


def decoded(tokenizer: "PreTrainedTokenizerBase", tokens: list[int]) -> str:
    """The text of tokens up to the end token, without special tokens and outer spaces.

    Cut by hand, because a pad token need not be one that the decoder skips.
    """
    if (eos := tokenizer.eos_token_id) in tokens:
        tokens = tokens[: tokens.index(eos)]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
