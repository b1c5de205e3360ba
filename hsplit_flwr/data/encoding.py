"""Documents as rows of tokens, and where their loss is.

Ids and labels are those that TRL's ``SFTTrainer`` (1.16) makes of the same examples, which is tested: a chat through
the template, a prompt and its completion as one text that ends with the end token, split where the tokens of the prompt
alone cease to be a beginning. What is ours: the last message of the assistant is the completion of a chat; an
instruction is a chat of two messages, or without a chat template Alpaca's text (Taori et al. 2023).
"""

import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from hsplit_flwr.data.chat_template import PLAIN_NAME, ChatTemplate
from hsplit_flwr.data.forms import ASSISTANT, Chat, Document, Example, Instruction, Pair, Text
from hsplit_flwr.data.token_row import TokenRow
from hsplit_flwr.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSSES = ("all", "completion", "assistant")
"""every token; the completion and its end; every turn of the assistant"""
_log = logging.getLogger("hsplit_flwr")
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
)


class Asked(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    ids: list[int]
    """of the prompt, as training has them"""
    answer: str
    """what a person wrote"""


class Encoder:
    """Makes rows of documents.

    Args:
        tokenizer: with an end token.
        template: how chats are written; None: chats are refused.
        loss_on: one of `LOSSES`.

    Raises:
        ConfigError: no end token, or an unknown `loss_on`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate | None, loss_on: str) -> None:
        if loss_on not in LOSSES:
            raise ConfigError(f"Expected loss-on as one of {LOSSES}, found {loss_on!r}.")
        if tokenizer.eos_token_id is None:
            raise ConfigError("Expected a tokenizer with an end token, found none. Set tokenizer.eos_token.")
        self.template = template
        self._tokenizer, self._loss_on = tokenizer, loss_on
        self._end = str(tokenizer.eos_token)
        self._warned = False

    def row(self, example: Example) -> TokenRow:
        """The row of an example, as long as it is; without a target where there is nothing of what the loss is on.

        Raises:
            ConfigError: a form that does not go with the loss or the template; the row is named.
        """
        try:
            return self._row(resolved(example.document, self.template), example.place)
        except ConfigError as error:
            raise ConfigError(f"In {example.place}: {error}") from error

    def asked(self, document: Document) -> Asked | None:
        """The document as a question; None for plain text and for chats that nobody answers."""
        document = resolved(document, self.template)
        if isinstance(document, Pair):
            return Asked(document.prompt, self._ids(document.prompt), document.completion)
        if not isinstance(document, Chat) or document.prompt_messages == len(document.messages):
            return None
        template, prompt = _required(self.template), document.messages[: document.prompt_messages]
        ids = template.ids(prompt, document.tools, to_answer=True)
        return Asked(template.prompt_text(document), ids, str(document.messages[-1]["content"]))

    def _row(self, document: Document, place: str) -> TokenRow:
        if isinstance(document, Chat):
            return self._chat(document, place)
        if self._loss_on == "assistant":
            raise ConfigError(
                "Expected chats for loss-on=assistant, found another form. Take loss-on=completion or all."
            )
        if isinstance(document, Pair):
            return self._pair(document, place)
        assert isinstance(document, Text)
        if self._loss_on == "completion":
            raise ConfigError("Expected a completion for loss-on=completion, found plain text. Take loss-on=all.")
        ids = self._ids(self._ended(document.text))
        return TokenRow(ids, list(ids))

    def _chat(self, chat: Chat, place: str) -> TokenRow:
        template = _required(self.template)
        if self._loss_on == "assistant":
            return TokenRow.masked(*template.turns(chat))
        ids = template.ids(chat.messages, chat.tools)
        if self._loss_on == "all":
            return TokenRow(ids, list(ids))
        if chat.prompt_messages == len(chat.messages):
            return TokenRow.masked(ids, [False] * len(ids))
        return self._after(template.ids(chat.messages[: chat.prompt_messages], chat.tools, to_answer=True), ids, place)

    def _pair(self, pair: Pair, place: str) -> TokenRow:
        ids = self._ids(pair.prompt + self._ended(pair.completion))
        return TokenRow(ids, list(ids)) if self._loss_on == "all" else self._after(self._ids(pair.prompt), ids, place)

    def _after(self, prompt: Sequence[int], ids: list[int], place: str) -> TokenRow:
        """The row of `ids` that learns what comes after `prompt`."""
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
        if shared < len(prompt) and not self._warned:
            self._warned = True
            _log.warning(
                "The prompt's tokens are not the first ones of prompt and completion together, first in %s: tokens "
                "merge across the border, or the template writes the prompt otherwise. The completion begins where "
                "they part, and the model is asked with other tokens than it learned after. End prompts before a space "
                "or a line feed.",
                place,
            )
        return TokenRow.masked(ids, [position >= shared for position in range(len(ids))])

    def _ended(self, text: str) -> str:
        return text if text.endswith(self._end) else text + self._end

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]  # says of long rows what is not so: they fit
        return ids


def resolved(document: Document, template: ChatTemplate | None) -> Document:
    """An instruction as a chat or, without a template, as a prompt and its completion; all others as they are."""
    if not isinstance(document, Instruction):
        return document
    if template is None:
        context = f"### Input:\n{document.context}\n\n" if document.context else ""
        paired = ", paired with an input that provides further context" if document.context else ""
        prompt = _ALPACA.format(paired=paired, instruction=document.instruction, context=context)
        return Pair(prompt, document.output)
    asked = "\n\n".join(part for part in (document.instruction, document.context) if part)
    return Chat([{"role": "user", "content": asked}, {"role": ASSISTANT, "content": document.output}], 1)


def _required(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        raise ConfigError(
            "Expected a tokenizer with a chat template for chats, found none. Take an instruct model, or set "
            f'chat-template="{PLAIN_NAME}" (or a Jinja file).'
        )
    return template
