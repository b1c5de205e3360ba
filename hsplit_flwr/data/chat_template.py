"""A chat as tokens, and which of them the assistant wrote, by the tokenizer's chat template.

A template may mark what the assistant writes (``{% generation %}``); transformers then says which tokens these are. For
one that does not, each turn of the assistant is what lies between the chat before it, written with the prompt to
answer, and the chat up to it: right where both texts are beginnings of the whole, and refused where not.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsplit_flwr.data.forms import ASSISTANT, Chat, Message
from hsplit_flwr.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_NAME = "plain"
PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{{ 'Assistant:' }}{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.role | capitalize + ': ' + message.content + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""for tokenizers without a template, under the name `PLAIN_NAME`"""
_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's way to write chats."""

    tokenizer: "PreTrainedTokenizerBase"
    source: str
    """Jinja"""

    @property
    def marks_turns(self) -> bool:
        """Whether the template itself says what the assistant writes."""
        return _MARKS.search(self.source) is not None

    def ids(self, messages: Sequence[Message], tools: Any = None, *, to_answer: bool = False) -> list[int]:
        """Token ids of a chat; `to_answer` adds what comes before an answer.

        Raises:
            ConfigError: the template does not take such a chat.
        """
        ids: list[int] = self._rendered(messages, tools, add_generation_prompt=to_answer)["input_ids"]
        return ids

    def turns(self, chat: Chat) -> tuple[list[int], list[bool]]:
        """Token ids of the chat, and for each whether the assistant wrote it (its end token included).

        Raises:
            ConfigError: the template does not take such a chat, or does not tell what the assistant wrote.
        """
        if self.marks_turns:
            rendered = self._rendered(chat.messages, chat.tools, return_assistant_tokens_mask=True)
            return rendered["input_ids"], [bool(one) for one in rendered["assistant_masks"]]
        text = self._text(chat.messages, chat.tools)
        answers = [number for number, message in enumerate(chat.messages) if message["role"] == ASSISTANT]
        return self._covered(text, [self._span(chat, number, text) for number in answers])

    def _span(self, chat: Chat, number: int, text: str) -> tuple[int, int]:
        """Where in `text`, the whole chat, message `number` begins and ends, with what ends it."""
        before = self._text(chat.messages[:number], chat.tools, to_answer=True)
        after = self._text(chat.messages[: number + 1], chat.tools)
        if not text.startswith(before) or not text.startswith(after):
            raise ConfigError(
                "Expected a chat template that marks what the assistant writes ({% generation %}), or whose chats "
                "begin as their first messages do, found neither. Give such a template (chat-template), or take "
                "loss-on=completion or all."
            )
        return len(before), len(after)

    def _covered(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Tokens of `text`, and whether each has a character within `spans`: what transformers says of marks, too."""
        if not self.tokenizer.is_fast:
            raise ConfigError(
                "Expected a tokenizer that says where its tokens are, found a slow one. Take loss-on=completion or all."
            )
        options: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        tokens = self.tokenizer(text, **options)
        places: list[tuple[int, int]] = tokens["offset_mapping"]
        return tokens["input_ids"], [any(a < last and first < b for first, last in spans) for a, b in places]

    def prompt_text(self, chat: Chat) -> str:
        """The prompt of the chat, up to the answer, as a text of which the tokenizer makes the same tokens."""
        text = self._text(chat.messages[: chat.prompt_messages], chat.tools, to_answer=True)
        begin = self.tokenizer.bos_token
        adds_it = bool(begin) and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(str(begin)) if adds_it else text

    def _text(self, messages: Sequence[Message], tools: Any, *, to_answer: bool = False) -> str:
        text: str = self._apply(messages, tools, tokenize=False, add_generation_prompt=to_answer)
        return text

    def _rendered(self, messages: Sequence[Message], tools: Any, **options: Any) -> Any:
        quiet = {"verbose": False}  # about rows longer than a model takes: they are made to fit
        return self._apply(messages, tools, tokenize=True, return_dict=True, tokenizer_kwargs=quiet, **options)

    def _apply(self, messages: Sequence[Message], tools: Any, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=self.source, tools=tools, **options)
        except ImportError as error:
            raise ConfigError(
                f"Expected the package jinja2 for chat templates, found none: {error} "
                "Run: pip install 'hsplit_flwr[finetune]'."
            ) from error
        except Exception as error:  # Jinja's own errors, and whatever a template raises of a chat it does not take
            roles = [message["role"] for message in messages]
            raise ConfigError(
                f"Expected a chat that the template takes, found the roles {roles} and: {error} "
                "Change the rows, or give another template (chat-template)."
            ) from error


def chat_template(tokenizer: "PreTrainedTokenizerBase", choice: str = "") -> ChatTemplate | None:
    """The template to use; None where the tokenizer has none and nobody chose one.

    Args:
        tokenizer: whose template it is by default.
        choice: empty, `PLAIN_NAME`, or a Jinja file.

    Raises:
        ConfigError: no such file.
    """
    if choice == PLAIN_NAME:
        return ChatTemplate(tokenizer, PLAIN)
    if choice:
        path = Path(choice).expanduser()
        if not path.is_file():
            raise ConfigError(f"Expected chat-template as {PLAIN_NAME!r} or a Jinja file, found {choice!r}.")
        return ChatTemplate(tokenizer, path.read_text(encoding="utf-8"))
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return ChatTemplate(tokenizer, own) if own else None
