"""From a file to batches: what is held out, what is said, what is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit_flwr.data import own_data as own_data_module
from hsplit_flwr.data.fitting import Fit
from hsplit_flwr.data.forms import Example, Text
from hsplit_flwr.data.own_data import DataSettings, OwnData, hold_out
from hsplit_flwr.data.partitions import Partition, divide
from hsplit_flwr.data.row_batches import RowBatches
from hsplit_flwr.data.token_row import IGNORE
from hsplit_flwr.errors import ConfigError
from tests.helpers.chats import CHATML, CHATS, INSTRUCTIONS, PAIRS, TEXTS, tokenizer, write_lines

FORMS = {"chat": CHATS, "instruction": INSTRUCTIONS, "pairs": PAIRS, "text": TEXTS}


def own_data(source: str, max_length: int = 128, **options: Any) -> OwnData:
    fit = Fit(max_length, options.pop("too_long", "cut"), options.pop("packing", "none"))
    settings = {"validation_share": 0.0, "batch_size": 2, "partition": Partition(), **options}
    return OwnData(DataSettings(source=source, fit=fit, **settings), tokenizer(CHATML))


def learned(batches: Any) -> str:
    """All that the batches learn, as text, row after row."""
    own = tokenizer()
    rows = [row for batch in batches for row in batch["labels"]]
    return "|".join(own.decode(row[row != IGNORE]) for row in rows)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_batches(name: str, tmp_path: Path) -> None:
    data = own_data(write_lines(tmp_path / "own.jsonl", FORMS[name]))
    batches = data.training_batches(data.part(0, 1))
    assert len(batches.rows) == len(FORMS[name])
    for batch in batches:
        assert {key: tensor.dtype for key, tensor in batch.items()} == dict.fromkeys(
            ("input_ids", "attention_mask", "labels"), torch.int64
        )
        assert bool((batch["labels"][batch["attention_mask"] == 0] == IGNORE).all())
        shown = batch["labels"] != IGNORE
        assert bool(shown[:, 1:].any(dim=1).all())
        assert torch.equal(batch["labels"][shown], batch["input_ids"][shown])


def test_what_was_recognised_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "own.jsonl", [*CHATS, {"messages": [{"role": "user", "content": "far " * 99}]}])
    data = own_data(path, max_length=48, validation_share=0.25)
    with caplog.at_level(logging.INFO, "hsplit_flwr"):
        data.check(2)
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"data: {path}: chat (messages), loss on assistant, 3 examples to train on, 1 held out"
    assert said[1].startswith("data: 3 documents, ")
    assert len(said) == 2


@pytest.mark.parametrize(
    ("too_long", "said"), [("cut", "1 with nothing to learn left out"), ("drop", "1 too long and left out")]
)
def test_one_long_prompt_does_not_end_a_run(
    too_long: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "own.jsonl", [PAIRS[0], {"prompt": "far " * 500, "completion": "x"}])
    data = own_data(path, too_long=too_long)
    with caplog.at_level(logging.INFO, "hsplit_flwr"):
        data.check()
    assert caplog.messages[-1].startswith("data: 2 documents, 1 rows, ")
    assert caplog.messages[-1].endswith(f"{said} (the first: line 2 of own.jsonl)")
    assert learned(data.training_batches(data.train)) == " The Mill is a pub.<|endoftext|>"


def test_nothing_but_long_prompts_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "own.jsonl", [{"prompt": "far " * 500, "completion": "x"}])
    with pytest.raises(
        ConfigError, match=r"Expected a row to learn from within max-length=128 .*1 with nothing to learn"
    ):
        own_data(path).check()


def test_one_example_trains_and_nothing_is_held_out(tmp_path: Path) -> None:
    data = own_data(write_lines(tmp_path / "own.jsonl", TEXTS[:1]), validation_share=0.5)
    assert (len(data.train), data.held_out) == (1, [])
    assert next(data.training_batches(data.train).stream(5))["input_ids"].shape[0] == 1
    assert data.scoring_batches(data.held_out) == ()


def test_examples_are_divided_once_for_all_clients_of_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1,000 clients a simulation's process spent 0.6 s on each of them, dividing the examples anew."""
    data = own_data(write_lines(tmp_path / "own.jsonl", [{"text": f"number {n}"} for n in range(12)]))
    expected = {parts: divide(data.train, parts, Partition()) for parts in (3, 4)}
    divisions: list[int] = []

    def noted(examples: Any, parts: int, partition: Partition) -> Any:
        divisions.append(parts)
        return divide(examples, parts, partition)

    monkeypatch.setattr(own_data_module, "divide", noted)
    for parts in (4, 3):
        assert [data.part(number, parts) for number in range(parts)] == expected[parts]
    assert divisions == [4, 3]


def test_what_is_held_out_is_scored_in_rows_of_its_own_and_in_order(tmp_path: Path) -> None:
    """Packed training rows cut documents anywhere; a score is of whole ones."""
    train, held_out = write_lines(tmp_path / "a.jsonl", TEXTS * 9), write_lines(tmp_path / "b.jsonl", TEXTS)
    data = own_data(train, max_length=16, packing="wrapped", held_out_source=held_out)
    assert {len(row.ids) for row in data.training_batches(data.train).rows[:-1]} == {16}
    scored = data.scoring_batches(data.held_out)
    assert learned(scored) == "|".join(f"{row['text']}<|endoftext|>" for row in TEXTS)


def test_what_is_not_scored_whole_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = own_data(write_lines(tmp_path / "own.jsonl", [*TEXTS, {"text": "far " * 200}]), max_length=64)
    assert data.scoring_batches(data.train[:3])
    assert not caplog.messages
    assert data.scoring_batches(data.train)
    (said,) = caplog.messages
    assert said.startswith("not scored as they are in the file: 4 documents, 4 rows")
    assert said.endswith("1 too long and cut (the first: line 4 of own.jsonl)")


def test_the_files_of_training_and_scoring_may_have_two_forms(tmp_path: Path) -> None:
    train, held_out = write_lines(tmp_path / "a.jsonl", CHATS), write_lines(tmp_path / "b.jsonl", PAIRS)
    data = own_data(train, held_out_source=held_out, loss_on="completion")
    assert learned(data.scoring_batches(data.held_out[:1])) == " The Mill is a pub.<|endoftext|>"


def test_one_source_may_have_a_split_for_each(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {
        name: datasets.Dataset.from_list([{"text": f"{name} {n}"} for n in range(3)]) for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    source = str(tmp_path / "both")
    data = own_data(source, held_out_source=source, held_out_split="test")
    assert [example.columns["text"] for example in data.train] == ["train 0", "train 1", "train 2"]
    assert [example.columns["text"] for example in data.held_out] == ["test 0", "test 1", "test 2"]


def test_what_is_asked_leaves_out_long_prompts_and_texts(tmp_path: Path) -> None:
    data = own_data(write_lines(tmp_path / "own.jsonl", PAIRS))
    found = data.asked(data.train)
    assert [(asked.prompt, asked.answer) for asked in found] == [(p["prompt"], p["completion"]) for p in PAIRS[:3]]
    assert [asked.prompt for asked in data.asked(data.train, longest=5)] == ["Say: ", "two words"]


@pytest.mark.parametrize(
    ("share", "count", "expected"), [(0.1, 40, 4), (0.1, 3, 1), (0.9, 2, 1), (0.5, 1, 0), (0, 9, 0)]
)
def test_a_share_is_held_out(share: float, count: int, expected: int) -> None:
    examples = [Example(f"line {n}", Text(str(n)), {}) for n in range(count)]
    kept, held_out = hold_out(examples, share, seed=0)
    assert len(held_out) == expected
    assert kept
    assert sorted([*kept, *held_out], key=lambda e: int(e.place[5:])) == examples
    assert (kept, held_out) == hold_out(examples, share, seed=0)
    if count > 9:
        assert held_out != hold_out(examples, share, seed=1)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_share": 1.0}, "Expected validation_share >= 0 and below 1, found 1.0"),
        ({"validation_share": -0.1}, "Expected validation_share >= 0 and below 1"),
        ({"seed": -1}, "Expected seed as a whole number >= 0, found -1"),
        ({"loss_on": "answers"}, "Expected loss_on as one of .*found 'answers' .run config: loss-on"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        own_data("x.jsonl", **options)


def test_batches_go_on_where_a_client_stopped(tmp_path: Path) -> None:
    data = own_data(write_lines(tmp_path / "own.jsonl", PAIRS))
    batches: RowBatches = data.training_batches(data.train)
    stream = batches.stream()
    for step in range(5):
        assert torch.equal(next(stream)["input_ids"], next(batches.stream(step))["input_ids"])
