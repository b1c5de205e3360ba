"""What form rows have, recognised by their columns: chat, instruction, prompt and completion, plain text.

The names are those of transformers, TRL and Alpaca. Every row becomes a document: `Chat`, `Instruction`, `Pair` or
`Text`. What a document becomes as tokens stands in `encoding.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from hsplit_flwr.data.sources import Row
from hsplit_flwr.errors import ConfigError

ASSISTANT = "assistant"
Message = Mapping[str, Any]
"""``role`` and ``content``, and what else a template may use (``tool_calls``)"""


@dataclass(frozen=True)
class Chat:
    """Messages, of which the last ones are the completion."""

    messages: Sequence[Message]
    prompt_messages: int
    """how many of `messages` come before the completion; all of them where nobody answers"""
    tools: Any = None
    """for the template"""


@dataclass(frozen=True)
class Instruction:
    """An instruction with an input or without, and its answer."""

    instruction: str
    context: str
    """the input; empty: none"""
    output: str


@dataclass(frozen=True)
class Pair:
    """A text and what follows it, as they are."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text."""

    text: str


Document: TypeAlias = Chat | Instruction | Pair | Text


class Example(NamedTuple):
    """A row as a document."""

    place: str
    """where people find it"""
    document: Document
    columns: Mapping[str, Any]
    """of the row, for partitions"""


@dataclass(frozen=True)
class Form:
    """A form of data."""

    name: str
    required: tuple[str, ...]
    """columns by which it is recognised"""
    read: Callable[[Row], Document]
    loss_on: str
    """what the loss is taken on where nobody says"""


def read_examples(rows: Sequence[Row], source: str) -> tuple[Form, list[Example]]:
    """The form of `rows` (at least one) and every row as a document.

    Raises:
        ConfigError: no form has such columns, or a row is not of the form; it is named.
    """
    form = recognise(rows, source)
    return form, [Example(row.place, form.read(row), row.values) for row in rows]


def recognise(rows: Iterable[Row], source: str) -> Form:
    """The first form of `FORMS` whose columns are all there.

    Raises:
        ConfigError: there is none.
    """
    found = list(dict.fromkeys(str(column) for row in rows for column in row.values))
    for form in FORMS:
        if set(form.required) <= set(found):
            return form
    raise ConfigError(f"Expected in {source} the columns of one of these forms: {known_forms()}. Found {found}.")


def known_forms() -> str:
    """All forms and their columns, for people."""
    return "; ".join(f"{form.name} ({', '.join(form.required)})" for form in FORMS)


def _chat(row: Row) -> Chat:
    messages = _messages(row, "messages")
    answered = messages[-1]["role"] == ASSISTANT
    return Chat(messages, len(messages) - 1 if answered else len(messages), row.values.get("tools"))


def _instruction(row: Row) -> Instruction:
    context = "" if row.values.get("input") is None else _text(row, "input")
    return Instruction(_text(row, "instruction"), context, _text(row, "output"))


def _pair(row: Row) -> Document:
    if not isinstance(row.values.get("prompt"), list):
        return Pair(_text(row, "prompt"), _text(row, "completion"))
    prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
    return Chat([*prompt, *completion], len(prompt), row.values.get("tools"))


def _plain(row: Row) -> Text:
    return Text(_text(row, "text"))


FORMS = (
    Form("chat", ("messages",), _chat, "assistant"),
    Form("instruction", ("instruction", "output"), _instruction, "completion"),
    Form("prompt and completion", ("prompt", "completion"), _pair, "completion"),
    Form("text", ("text",), _plain, "all"),
)
"""by precedence: a set that has a whole `text` beside its instructions is taken by its instructions"""


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        raise ConfigError(f"Expected a text as {column!r} in {row.place}, found {_shown(value)}.")
    return _checked(value, column, row.place)


def _messages(row: Row, column: str) -> list[Message]:
    messages = row.values.get(column)
    if not isinstance(messages, list) or not messages:
        raise ConfigError(
            f'Expected a list of messages such as [{{"role": "user", "content": "..."}}] as {column!r} in {row.place}, '
            f"found {_shown(messages)}."
        )
    return [_message(item, f"message {number} of {row.place}") for number, item in enumerate(messages, start=1)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise ConfigError(f'Expected an object with "role" and "content" as {place}, found {_shown(item)}.')
    # Arrow gives every message the fields of all: an absent one is None there, and templates ask whether it is there.
    message = {name: value for name, value in item.items() if value is not None}
    if message.get("tool_calls"):
        message.setdefault("content", "")
    if not isinstance(message.get("content"), str):
        raise ConfigError(f"Expected a text as content of {place}, found {_shown(item.get('content'))}.")
    _checked(message["content"], "content", place)
    return message


def _checked(text: str, column: str, place: str) -> str:
    """`text`, unless it holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"Expected Unicode text as {column!r} in {place}, found {error}.") from error
    return text


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]
