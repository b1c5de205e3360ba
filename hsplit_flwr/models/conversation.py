"""A chat with a model: what was said stays in the prompt as long as there is room for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsplit_flwr.data.chat_template import ChatTemplate
from hsplit_flwr.data.forms import ASSISTANT, Message
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.generation import write_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says to a message."""

    text: str
    ended: bool
    """by its end token; False: cut at the number of tokens that an answer may have"""
    left_out: int
    """oldest exchanges (a message and its answer) of the chat that were left out for it, for lack of room"""


class Conversation:
    """The messages and answers of a chat so far.

    Args:
        model: a causal language model with its head.
        tokenizer: its own.
        template: how chats are written.
        max_new_tokens: where an answer is cut.
        system: a message of the system before all others; empty: none.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        template: ChatTemplate,
        *,
        max_new_tokens: int,
        system: str = "",
    ) -> None:
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._max_new_tokens = max_new_tokens
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._exchanges: list[tuple[Message, Message]] = []
        self.positions: int | None = getattr(model.config, "max_position_embeddings", None)
        """what prompt and answer fit into; None: no limit"""

    def forget(self) -> None:
        """Begin anew."""
        self._exchanges.clear()

    def ask(self, text: str, say: Callable[[str], None] | None = None) -> Answer:
        """The model's answer, greedily; message and answer are kept.

        Args:
            text: the message.
            say: called with each piece of the answer as it is written.

        Raises:
            ConfigError: a message that the template does not take, or that leaves no room for an answer; nothing
                is kept of it.
        """
        message: Message = {"role": "user", "content": text}
        left_out, ids = self._prompt(message)
        (written,) = write_texts(self._model, self._tokenizer, [ids], max_new_tokens=self._max_new_tokens, say=say)
        self._exchanges = [*self._exchanges[left_out:], (message, {"role": ASSISTANT, "content": written.text})]
        return Answer(text=written.text, ended=written.ended, left_out=left_out)

    def _prompt(self, message: Message) -> tuple[int, list[int]]:
        """How many of the oldest exchanges have to go, and the prompt without them, (tokens)."""
        for left_out in range(len(self._exchanges) + 1):
            ids = self._ids(self._exchanges[left_out:], message)
            if self.positions is None or len(ids) + self._max_new_tokens <= self.positions:
                return left_out, ids
        raise ConfigError(
            f"Expected a message that leaves room for an answer of {self._max_new_tokens} tokens in the model's "
            f"{self.positions} positions, found one of {len(ids)} tokens. Shorten it, or lower --max-new-tokens."
        )

    def _ids(self, exchanges: Sequence[tuple[Message, Message]], message: Message) -> list[int]:
        said = [one for exchange in exchanges for one in exchange]
        return self._template.ids([*self._system, *said, message], to_answer=True)
