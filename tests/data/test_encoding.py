"""What is learned of every form, said in text; equality to TRL stands in `test_against_trl.py`."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hsplit_flwr.data.chat_template import PLAIN_NAME, chat_template
from hsplit_flwr.data.encoding import Encoder
from hsplit_flwr.data.forms import Chat, Example, Instruction, Pair, Text
from hsplit_flwr.data.token_row import IGNORE
from hsplit_flwr.errors import ConfigError
from tests.helpers.chats import CHATML, CHATS, FORGETFUL, MARKED, tokenizer

SHORT = Chat(CHATS[0]["messages"], 1)
LONG = Chat(CHATS[1]["messages"], 4)
PAIR = Pair("name[Mill] =>", " A mill.")
END = "<|endoftext|>"


def encoded(document: Any, loss_on: str, own: PreTrainedTokenizerFast, choice: str = "") -> tuple[str, str]:
    """The whole row and what is learned of it, as texts."""
    row = Encoder(own, chat_template(own, choice), loss_on).row(Example("line 7 of own.jsonl", document, {}))
    assert len(row.ids) == len(row.labels)
    assert all(label in (IGNORE, token) for token, label in zip(row.ids, row.labels, strict=True))
    return own.decode(row.ids), own.decode([label for label in row.labels if label != IGNORE])


@pytest.mark.parametrize(
    ("document", "loss_on", "learned"),
    [
        (SHORT, "assistant", "By the river.<|im_end|>\n"),
        (SHORT, "completion", "By the river.<|im_end|>\n"),
        (LONG, "assistant", "Yes.<|im_end|>\n Until ten, 日本 time. <|im_end|>\n"),
        (LONG, "completion", " Until ten, 日本 time. <|im_end|>\n"),
        (Chat(LONG.messages[:4], 4), "completion", ""),
        (PAIR, "completion", f" A mill.{END}"),
        (PAIR, "all", f"name[Mill] => A mill.{END}"),
        (Text("It is old."), "all", f"It is old.{END}"),
        (Text(f"ended{END}"), "all", f"ended{END}"),
        (Instruction("Add.", "2 and 3", "5"), "completion", "5<|im_end|>\n"),
        (Instruction("Add.", "2 and 3", "5"), "assistant", "5<|im_end|>\n"),
    ],
)
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["unmarked", "marked"])
def test_what_is_learned(document: Any, loss_on: str, learned: str, template: str) -> None:
    assert encoded(document, loss_on, tokenizer(template))[1] == learned


def test_an_instruction_is_a_chat_where_there_is_a_template() -> None:
    whole, _ = encoded(Instruction("Add.", "2 and 3", "5"), "all", tokenizer(CHATML))
    assert whole == "<|im_start|>user\nAdd.\n\n2 and 3<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (
            "{2} and 3",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n"
            "{2} and 3\n\n### Response:\n",
        ),
        (
            "",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd.\n\n### Response:\n",
        ),
    ],
)
def test_an_instruction_is_alpacas_text_where_there_is_no_template(context: str, expected: str) -> None:
    whole, learned = encoded(Instruction("Add.", context, "5"), "completion", tokenizer())
    assert (whole, learned) == (f"{expected}5{END}", f"5{END}")


def test_the_plain_template_writes_chats_for_tokenizers_without() -> None:
    whole, learned = encoded(LONG, "assistant", tokenizer(), PLAIN_NAME)
    assert whole == (
        f"System: Be brief.\nUser: Is it open? 🙂\nAssistant: Yes.{END}\nUser: Until when?\nToday, I mean.\n"
        f"Assistant:  Until ten, 日本 time. {END}\n"
    )
    assert learned == f" Yes.{END}  Until ten, 日本 time. {END}"


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m.role[0] + '>' + m.content + '\n' }}{% endfor %}")
    assert encoded(SHORT, "all", tokenizer(CHATML), str(path))[0] == "u>Where is the café?\na>By the river.\n"
    with pytest.raises(ConfigError, match=r"Expected chat-template as 'plain' or a Jinja file, found 'none\.jinja'"):
        chat_template(tokenizer(), "none.jinja")


@pytest.mark.parametrize(
    ("document", "loss_on", "template", "message"),
    [
        (SHORT, "all", None, 'Expected a tokenizer with a chat template .* found none.*chat-template="plain"'),
        (LONG, "assistant", FORGETFUL, "Expected a chat template that marks what the assistant writes"),
        (Text("a"), "completion", CHATML, "Expected a completion for loss-on=completion, found plain text"),
        (Text("a"), "assistant", CHATML, "Expected chats for loss-on=assistant, found another form"),
        (PAIR, "assistant", CHATML, "Expected chats for loss-on=assistant"),
        (
            SHORT,
            "all",
            "{{ raise_exception('no such roles') }}",
            r"Expected a chat that the template takes, found the roles \['user', 'assistant'\] and: no such",
        ),
        (SHORT, "all", "{% for", "Expected a chat that the template takes"),
    ],
)
def test_what_does_not_go_together_is_refused_by_row(document: Any, loss_on: str, template: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"In line 7 of own\.jsonl: {message}"):
        encoded(document, loss_on, tokenizer(template))


def test_the_forgetful_template_is_right_where_it_forgets_nothing() -> None:
    assert encoded(SHORT, "assistant", tokenizer(FORGETFUL))[1] == "By the river.<|im_end|>\n"
    assert encoded(LONG, "completion", tokenizer(FORGETFUL))[1] == " Until ten, 日本 time. <|im_end|>\n"


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"Expected loss-on as one of \('all', 'completion', 'assistant'\), found 'x'"
    ):
        Encoder(tokenizer(), None, "x")


def test_a_prompt_whose_tokens_merge_with_the_answer_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    own = tokenizer()
    encoder = Encoder(own, None, "completion")
    with caplog.at_level(logging.WARNING, "hsplit_flwr"):
        for place in ("line 1", "line 2"):
            row = encoder.row(Example(place, Pair("The restau", "rant is old."), {}))
    (record,) = caplog.records
    assert "first in line 1" in record.getMessage()
    assert own.decode([label for label in row.labels if label != IGNORE]).endswith(f" is old.{END}")


# --- prompts to answer ---


@pytest.mark.parametrize(
    ("source", "begins"),
    [(CHATML, False), ("{{ bos_token }}" + CHATML, False), ("{{ bos_token }}" + CHATML, True)],
    ids=["without", "written by the template", "written by both"],
)
def test_a_prompt_as_text_gives_the_tokens_that_were_learned_after(source: str, begins: bool) -> None:
    """Templates write the begin token, and tokenizers add one to every text: twice is another prompt."""
    own = tokenizer(source, begins=begins)
    asked = Encoder(own, chat_template(own), "completion").asked(LONG)
    assert asked
    assert own(asked.prompt)["input_ids"] == asked.ids
    assert own.decode(asked.ids).endswith("Today, I mean.<|im_end|>\n<|im_start|>assistant\n")
    assert asked.answer == " Until ten, 日本 time. "


def test_prompts_and_answers_of_every_form() -> None:
    own = tokenizer(CHATML)
    encoder = Encoder(own, chat_template(own), "all")
    assert encoder.asked(PAIR) == ("name[Mill] =>", own("name[Mill] =>")["input_ids"], " A mill.")
    assert encoder.asked(Text("a")) is None
    assert encoder.asked(Chat(LONG.messages[:2], 2)) is None
    prompt = "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"
    assert encoder.asked(Instruction("Add.", "", "5")) == (prompt, own(prompt)["input_ids"], "5")
