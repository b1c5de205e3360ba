"""lm-evaluation-harness on a merged model and an adapter, offline, on a task and data of one's own."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hsplit_flwr.cli import main
from hsplit_flwr.lora.export import save_peft_adapter
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.trained import load_trained
from tests.helpers.chats import tokenizer, write_lines

BASE = str(tiny_checkpoint())
LAYER = "transformer.h.2.attn.c_attn"
ROWS: list[dict[str, Any]] = [
    {"question": "The sky is", "choices": ["blue", "seven", "the train"], "answer": 0},
    {"question": "He took the train to", "choices": ["green", "the city", "did"], "answer": 1},
    {"question": "The weather in spring is", "choices": ["warm", "a book", "Monday"], "answer": 0},
    {"question": "She reads a", "choices": ["seven", "green", "book"], "answer": 2},
]
CHOICES = """\
task: own_choices
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
WRITES = """\
task: own_texts
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs:
  until: ["<|endoftext|>"]
  max_gen_toks: 6
  do_sample: false
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(n, 2, generator=generator) for n in (288, 96))
    save_peft_adapter({LAYER: 0.2 * left @ right.T}, BASE, folder, fan_in_fan_out=True)
    return folder


def accuracy(model: PreTrainedModel) -> float:
    """Share of rows whose answer is the likeliest choice, by the logits of one row at a time."""
    own, right = tokenizer(), 0
    for row in ROWS:
        likelihoods = []
        for choice in row["choices"]:
            prompt, ids = own(row["question"])["input_ids"], own(f"{row['question']} {choice}")["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(logs[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    return right / len(ROWS)


def scored(tmp_path: Path, model: str, task: str, rows: list[dict[str, Any]], *options: str) -> dict[str, Any]:
    (tmp_path / "tasks").mkdir(exist_ok=True)
    data = write_lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tasks" / "own.yaml").write_text(task.format(data=data))
    name = task.splitlines()[0].removeprefix("task: ")
    given = ("--include-path", tmp_path / "tasks", "--json", tmp_path / "scores.json", *options)
    assert main([str(word) for word in ("evaluate", "--model", model, "--tasks", name, *given)]) == 0
    (score,) = json.loads((tmp_path / "scores.json").read_text())
    assert score["task"] == name
    return dict(score)


def test_tasks_need_the_harness(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", "--model", BASE, "--tasks", "own"]) == 2
    assert "Run: pip install 'hsplit_flwr[harness]'" in capsys.readouterr().err


def test_an_adapter_is_scored_as_its_logits_say(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    for model in (BASE, str(adapter)):
        score = scored(tmp_path, model, CHOICES, ROWS)
        assert (score["metric"], score["examples"]) == ("acc", len(ROWS))
        assert score["value"] == accuracy(load_trained(model)[0])
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.endswith(f"own_choices acc {score['value']:.4f} {score['stderr']:.4f} 4")
    changed = [accuracy(load_trained(model)[0]) for model in (BASE, str(adapter))]
    assert changed[0] != changed[1], "the adapter changes nothing: this test could not fail"


def test_texts_that_a_model_writes_are_compared(tmp_path: Path) -> None:
    """Of two rows one has the model's own continuation as its answer."""
    pytest.importorskip("lm_eval")
    model, own = AutoModelForCausalLM.from_pretrained(BASE).eval(), tokenizer()
    ids = own(ROWS[0]["question"], return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=own.eos_token_id)
    written = own.decode(out[0, ids.shape[1] :])
    rows = [{"question": ROWS[0]["question"], "written": written}, {"question": ROWS[1]["question"], "written": "no"}]
    score = scored(tmp_path, BASE, WRITES, rows)
    assert (score["metric"], score["value"], score["examples"]) == ("exact_match", 0.5, 2)
    assert scored(tmp_path, BASE, WRITES, rows, "--examples", "1")["value"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "no_such_task"], "Expected tasks that lm_eval knows, found no_such_task"),
        (["--tasks", "own", "--include-path", "nowhere"], "as --include-path, found nowhere"),
    ],
)
def test_what_the_harness_cannot_do_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    assert main(["evaluate", "--model", BASE, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hsplit-flwr: error: ")
    assert message in error


def test_data_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "own.yaml").write_text(CHOICES.format(data=tmp_path / "none.jsonl"))
    assert main(["evaluate", "--model", BASE, "--tasks", "own_choices", "--include-path", str(tmp_path)]) == 2
    assert "Expected lm_eval to run own_choices, found: FileNotFoundError" in capsys.readouterr().err
