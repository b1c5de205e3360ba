"""Every form is recognised by its columns, and a row that is not of it is named."""

from typing import Any

import pytest

from hsplit_flwr.data.forms import Chat, Instruction, Pair, Text, read_examples, recognise
from hsplit_flwr.data.sources import Row
from hsplit_flwr.errors import ConfigError
from tests.helpers.chats import CHATS, INSTRUCTIONS, PAIRS, TEXTS

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(f"line {number} of own.jsonl", value) for number, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("values", "name", "loss_on", "first"),
    [
        (CHATS, "chat", "assistant", Chat(CHATS[0]["messages"], 1)),
        (INSTRUCTIONS, "instruction", "completion", Instruction("Name a fruit.", "", "An apple.")),
        (PAIRS, "prompt and completion", "completion", Pair("name[The Mill] =>", " The Mill is a pub.")),
        (
            [{"prompt": [USER], "completion": [ASSISTANT]}],
            "prompt and completion",
            "completion",
            Chat([USER, ASSISTANT], 1),
        ),
        (TEXTS, "text", "all", Text("The Mill is a pub by the river.")),
    ],
    ids=["chat", "instruction", "pair", "chat pair", "text"],
)
def test_forms_are_recognised(values: list[dict[str, Any]], name: str, loss_on: str, first: Any) -> None:
    form, examples = read_examples(rows(*values), "own.jsonl")
    assert (form.name, form.loss_on) == (name, loss_on)
    assert examples[0].document == first
    assert [example.place for example in examples] == [row.place for row in rows(*values)]


def test_other_columns_stay_for_partitions() -> None:
    _, (example,) = read_examples(rows({"text": "a", "label": 3, "user": "x"}), "own.jsonl")
    assert (example.columns["label"], example.columns["user"]) == (3, "x")


def test_instructions_come_before_the_whole_text_beside_them() -> None:
    """Alpaca's sets have both."""
    assert recognise(rows({"instruction": "a", "input": "", "output": "b", "text": "a b"}), "x").name == "instruction"


def test_arrows_empty_fields_are_absent() -> None:
    """Arrow gives each message the fields of all others, as None; templates ask whether a field is there."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    _, (example,) = read_examples(rows({"messages": [{**USER, "tool_calls": None}, call], "tools": None}), "own.jsonl")
    assert isinstance(example.document, Chat)
    assert example.document.messages == [USER, {**call, "content": ""}]


def test_a_chat_that_ends_with_a_question_has_no_completion() -> None:
    _, (example,) = read_examples(rows({"messages": [USER, ASSISTANT, USER]}), "own.jsonl")
    assert isinstance(example.document, Chat)
    assert example.document.prompt_messages == 3


def test_an_unknown_form_names_the_columns_and_the_forms() -> None:
    with pytest.raises(
        ConfigError,
        match=r"Expected in own\.csv the columns of one of these forms: chat \(messages\); instruction \(instruction, "
        r"output\); prompt and completion \(prompt, completion\); text \(text\)\. Found \['question', 'answer'\]\.",
    ):
        recognise(rows({"question": "a", "answer": "b"}), "own.csv")


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (TEXTS[0], {"text": None}, "Expected a text as 'text' in line 2 of own.jsonl, found nothing"),
        (TEXTS[0], {"other": "x"}, "Expected a text as 'text' in line 2 of own.jsonl, found nothing"),
        (TEXTS[0], {"text": 7}, "Expected a text as 'text' in line 2 of own.jsonl, found 7"),
        (TEXTS[0], {"text": "half \ud800"}, "Expected Unicode text as 'text' in line 2 of own.jsonl"),
        (PAIRS[0], {"prompt": "a"}, "Expected a text as 'completion' in line 2 of own.jsonl, found nothing"),
        (PAIRS[0], {"prompt": [USER], "completion": "a"}, "Expected a list of messages .* 'completion' in line 2"),
        (INSTRUCTIONS[0], {"instruction": "a", "output": ["b"]}, r"Expected a text as 'output' in line 2 .*\['b'\]"),
        (INSTRUCTIONS[0], {"instruction": "a", "input": 1, "output": "b"}, "Expected a text as 'input' in line 2"),
        (
            CHATS[0],
            {"messages": []},
            r"Expected a list of messages .* as 'messages' in line 2 of own\.jsonl, found \[\]",
        ),
        (CHATS[0], {"messages": "hi"}, "Expected a list of messages .* in line 2 of own.jsonl, found 'hi'"),
        (CHATS[0], {"messages": ["hi"]}, 'Expected an object with "role" and "content" as message 1 of line 2'),
        (CHATS[0], {"messages": [USER, {"content": "x"}]}, 'Expected an object with "role" .* message 2 of line 2'),
        (CHATS[0], {"messages": [{"role": "user"}]}, "Expected a text as content of message 1 of line 2 .*nothing"),
        (CHATS[0], {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content of message 1 of line 2"),
    ],
)
def test_a_malformed_row_is_named(good: dict[str, Any], bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_examples(rows(good, bad), "own.jsonl")
