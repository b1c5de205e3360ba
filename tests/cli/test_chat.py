"""``hsplit-flwr chat``: what was said stays in the prompt, within the model's positions, and limits are said."""

import io
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hsplit_flwr.cli import main
from hsplit_flwr.data.chat_template import ChatTemplate, chat_template
from hsplit_flwr.data.text_batches import prompt_text
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.conversation import Conversation
from hsplit_flwr.models.generation import write_texts
from hsplit_flwr.models.streaming import TextPieces
from tests.helpers.chats import CHATML, tokenizer

BASE = str(tiny_checkpoint())
NEW = 12


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(BASE).eval()
    return found


def reference(model: PreTrainedModel, text: str, new: int = NEW) -> tuple[str, bool]:
    """Greedy continuation of a prompt that is written out here, token by token, and whether it ended by itself."""
    own = tokenizer()
    written: list[int] = []
    ids = own(text)["input_ids"]
    while len(written) < new:
        with torch.no_grad():
            token = int(model(torch.tensor([[*ids, *written]])).logits[0, -1].argmax())
        if token == own.eos_token_id:
            return str(own.decode(written, skip_special_tokens=True)).strip(), True
        written.append(token)
    return str(own.decode(written, skip_special_tokens=True)).strip(), False


def plain(messages: Sequence[tuple[str, str]]) -> str:
    """The template "plain", written out: the prompt of a chat."""
    lines = [f"{role.capitalize()}: {text}{'<|endoftext|>' if role == 'assistant' else ''}" for role, text in messages]
    return "\n".join([*lines, "Assistant:"])


def chat(monkeypatch: pytest.MonkeyPatch, lines: Sequence[str], *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", "--model", BASE, "--max-new-tokens", str(NEW), *options])


def test_a_chat_keeps_what_was_said(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["Where is the mill?", "And the river?"]
    assert chat(monkeypatch, [asked[0], "", asked[1], "/forget", asked[1]], "--chat-template", "plain") == 0
    first, _ = reference(model, plain([("user", asked[0])]))
    second, _ = reference(model, plain([("user", asked[0]), ("assistant", first), ("user", asked[1])]))
    alone, _ = reference(model, plain([("user", asked[1])]))
    assert second != alone, "the history changes nothing: this test could not fail"
    shown = [line.removeprefix("> ") for line in capsys.readouterr().out.splitlines()]
    assert shown[0] == f"chat and answer within 192 tokens, answers of up to {NEW}; /forget begins anew, /end ends"
    said = [line.replace("> ", "") for line in shown[1:] if "--max-new-tokens" not in line]
    assert [line for line in said if line] == [first, second, "(begun anew)", alone]


def test_a_message_of_the_system_comes_first(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(CHATML)
    lines = ["Hello", "/end", "never asked"]
    assert chat(monkeypatch, lines, "--system", "Be brief.", "--chat-template", str(own)) == 0
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    answer, ended = reference(model, prompt)
    shown = capsys.readouterr().out
    assert f"> {answer}\n" in shown
    assert (f"(cut at {NEW} tokens, see --max-new-tokens)" in shown) is not ended
    assert shown.count("> ") == 2


def test_a_chat_that_grows_too_long_loses_its_oldest_messages(model: PreTrainedModel) -> None:
    """192 positions: the answers stay what the model says to the messages that are left."""
    own = tokenizer()
    template = chat_template(own, "plain")
    assert template
    talk = Conversation(model, own, template, max_new_tokens=NEW)
    exchanges: list[tuple[str, str]] = []
    left_out = []
    for number in range(6):
        message = f"Message {number}: " + "one two three four five six seven eight nine ten " * 3
        answer = talk.ask(message)
        exchanges = [*exchanges[2 * answer.left_out :], ("user", message)]
        text, ended = reference(model, plain(exchanges))
        assert (answer.text, answer.ended) == (text, ended)
        exchanges.append(("assistant", text))
        left_out.append(answer.left_out)
    assert left_out[0] == 0
    assert sum(left_out) >= 2


def test_a_message_that_leaves_no_room_is_refused_and_forgotten(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, ["far " * 200, "Hello"], "--chat-template", "plain") == 0
    shown = capsys.readouterr().out
    refusal = f"(Expected a message that leaves room for an answer of {NEW} tokens in the model's 192 positions"
    assert refusal in shown
    assert f"> {reference(model, plain([('user', 'Hello')]))[0]}\n" in shown


def test_without_a_template_nobody_can_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, ["Hello"]) == 2
    assert "Expected a chat template in the tokenizer of" in capsys.readouterr().err


def test_a_template_that_refuses_a_chat_keeps_nothing(model: PreTrainedModel) -> None:
    own = tokenizer()
    strict = ChatTemplate(own, "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}User:")
    talk = Conversation(model, own, strict, max_new_tokens=2)
    talk.ask("first")
    with pytest.raises(ConfigError, match="one only"):
        talk.ask("second")
    talk.forget()
    talk.ask("third")


def test_a_text_is_said_as_it_is_written(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is out before the next token is made, and together they are the text."""
    prompt = prompt_text("name[The Salt Clock], eatType[tea room], food[Lebanese]")
    expected, _ = reference(model, prompt)
    made: list[int] = []
    monkeypatch.setattr(model, "forward", counted(model.forward, made))
    heard: list[tuple[str, int]] = []
    (written,) = write_texts(
        model, tokenizer(), [prompt], max_new_tokens=NEW, say=lambda piece: heard.append((piece, len(made)))
    )
    assert "".join(piece for piece, _ in heard) == written.text == expected
    passes = [number for _, number in heard]
    assert len(passes) > 5
    assert passes[0] == 1
    assert all(later > earlier for earlier, later in pairwise(passes))


def counted(forward: Callable[..., object], made: list[int]) -> Callable[..., object]:
    """`forward`, which notes that it was called."""

    @wraps(forward)  # generate looks at its arguments
    def noting(*args: object, **options: object) -> object:
        made.append(len(made))
        return forward(*args, **options)

    return noting


def test_pieces_of_a_text_are_whole_characters_and_never_taken_back() -> None:
    """Bytes of one character come in several tokens; the end token and what follows it are not said."""
    own = tokenizer()
    text = "café 🚲 naïve \n\n two  spaces, do n't  "
    ids = own(text)["input_ids"]
    assert len(ids) > len(text) / 4
    said: list[str] = []
    pieces = TextPieces(own, said.append)
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in [*ids, own.eos_token_id, *ids[:2]]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert "".join(said) == text.strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in said)


def test_only_one_text_is_said_as_it_is_written(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"Expected a single prompt and num_beams = 1 .* found 2 and 1"):
        write_texts(model, tokenizer(), ["a", "b"], max_new_tokens=2, say=print)
