"""``hsplit-flwr generate`` and ``evaluate``: merged models and adapters are asked and scored as by transformers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hsplit_flwr.cli import main
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.export import save_peft_adapter
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.trained import load_trained
from tests.helpers.chats import CHATML, PAIRS, TEXTS, tokenizer, write_lines

BASE = str(tiny_checkpoint())
LAYER = "transformer.h.2.attn.c_attn"
PROMPTS = ["The weather in spring is", "He took the train to"]


def base() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(BASE)
    return model


@pytest.fixture(scope="module")
def delta() -> torch.Tensor:
    """What training changed in one layer, (d_out, d_in): large enough to change texts."""
    weight = base().get_submodule(LAYER).weight
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(n, 2, generator=generator) for n in (weight.shape[1], weight.shape[0]))
    return 0.2 * left @ right.T


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, delta: torch.Tensor) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    model = base()
    with torch.no_grad():
        model.get_submodule(LAYER).weight += delta.T  # GPT-2 keeps its weights transposed
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, delta: torch.Tensor) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_peft_adapter({LAYER: delta}, BASE, folder, fan_in_fan_out=True)
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(5, 25)[None]).logits
    return found


def test_an_adapter_is_the_merged_model(merged: Path, adapter: Path) -> None:
    by_adapter, _ = load_trained(str(adapter))
    by_merging, own = load_trained(str(merged))
    assert (logits(by_adapter) - logits(by_merging)).abs().max() < 1e-3
    assert (logits(by_merging) - logits(base())).abs().max() > 1
    assert own.eos_token == "<|endoftext|>"
    assert not by_merging.training


def test_an_adapter_may_be_given_its_base(adapter: Path, tmp_path: Path) -> None:
    """A client's path of the base is another than the server's."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/not/here"}))
    with pytest.raises(ConfigError, match="found nothing under '/not/here'"):
        load_trained(str(folder))
    model, _ = load_trained(str(folder), base=BASE)
    assert torch.equal(logits(model), logits(load_trained(str(adapter))[0]))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"Expected adapter_config\.json in .* to name its base model"):
        load_trained(str(folder))


def reference_text(model: PreTrainedModel, prompt: str, new: int) -> str:
    """Greedy, one token at a time, by the model's logits alone."""
    own = tokenizer()
    ids: list[int] = own(prompt)["input_ids"]
    written: list[int] = []
    while len(written) < new:
        with torch.no_grad():
            token = int(model(torch.tensor([[*ids, *written]])).logits[0, -1].argmax())
        if token == own.eos_token_id:
            break
        written.append(token)
    return str(own.decode(written, skip_special_tokens=True)).strip()


def test_generate_answers_as_the_models_logits_say(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "--model", merged, "--max-new-tokens", 12, "--prompt", *PROMPTS) == 0
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    expected = "".join(f"> {prompt}\n{reference_text(model, prompt, 12)}\n\n" for prompt in PROMPTS)
    assert capsys.readouterr().out == expected
    assert reference_text(model, PROMPTS[0], 12) != reference_text(base().eval(), PROMPTS[0], 12)


def test_generate_writes_prompts_as_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(CHATML)
    given = ("generate", "--model", BASE, "--max-new-tokens", 12, "--chat-template", template, "--prompt", "Hello")
    assert run(*given) == 0
    expected = reference_text(base().eval(), "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 12)
    assert capsys.readouterr().out == f"> Hello\n{expected}\n\n"
    assert run(*given, "--raw") == 0
    assert capsys.readouterr().out == f"> Hello\n{reference_text(base().eval(), 'Hello', 12)}\n\n"


def by_transformers(model: PreTrainedModel, rows: list[dict[str, Any]]) -> tuple[float, int]:
    """Loss by transformers' own shift and mean over the completions' tokens, one row at a time."""
    own, nll, tokens = tokenizer(), 0.0, 0
    for row in rows:
        end = "" if row["completion"].endswith("<|endoftext|>") else "<|endoftext|>"
        prompt, ids = own(row["prompt"])["input_ids"], own(row["prompt"] + row["completion"] + end)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = float(model(torch.tensor([ids]), labels=labels).loss)
        count = int((labels[:, 1:] != -100).sum())
        nll, tokens = nll + loss * count, tokens + count
    return nll / tokens, tokens


def test_evaluate_scores_as_transformers_does(merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two answers are the model's own, one of them changed by a word: one is exact."""
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    own = [{"prompt": prompt, "completion": f" {reference_text(model, prompt, 8)}"} for prompt in PROMPTS]
    rows = [own[0], {**own[1], "completion": own[1]["completion"] + " not"}]
    data = write_lines(tmp_path / "held-out.jsonl", rows)
    assert run("evaluate", "--model", merged, "--data", data, "--max-new-tokens", 8, "--json", tmp_path / "s.json") == 0
    score = json.loads((tmp_path / "s.json").read_text())
    loss, tokens = by_transformers(model, rows)
    assert score["loss"] == pytest.approx(loss, rel=1e-5)
    assert score["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert {key: score[key] for key in ("examples", "tokens", "asked", "exact")} == {
        "examples": 2,
        "tokens": tokens,
        "asked": 2,
        "exact": 1,
    }
    shown = capsys.readouterr().out
    assert "prompt and completion (prompt, completion), loss on completion, 2 of 2 examples" in shown
    assert "exact answers 1 of 2" in " ".join(shown.split())


def test_evaluate_without_answers_and_on_a_part(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "held-out.jsonl", TEXTS)
    assert run("evaluate", "--model", adapter, "--data", data, "--max-new-tokens", 0, "--examples", 2) == 0
    shown = capsys.readouterr().out
    assert "text (text), loss on all, 2 of 3 examples" in shown
    assert "exact answers not measured" in " ".join(shown.split())


def test_prompts_that_cannot_be_answered_do_not_end_a_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One is empty, one leaves no room in the model's positions; they are scored where they have targets."""
    rows = [*PAIRS[:2], {"prompt": "", "completion": "from nothing"}, {"prompt": "far " * 180, "completion": " away"}]
    data = write_lines(tmp_path / "held-out.jsonl", rows)
    assert run("evaluate", "--model", BASE, "--data", data, "--max-length", 192, "--max-new-tokens", 8) == 0
    shown = capsys.readouterr().out
    assert "exact answers 0 of 2" in " ".join(shown.split())


def test_answers_are_compared_word_by_word(merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One answer is the model's own, one has no words to compare, and is left out of these scores alone."""
    pytest.importorskip("sacrebleu")
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    own = {"prompt": PROMPTS[0], "completion": f" {reference_text(model, PROMPTS[0], 12)}"}
    data = write_lines(tmp_path / "held-out.jsonl", [own, {"prompt": PROMPTS[1], "completion": " ..."}])
    options = ("--data", data, "--max-new-tokens", 12, "--text-scores", "--json", tmp_path / "s.json")
    assert run("evaluate", "--model", merged, *options) == 0
    score = json.loads((tmp_path / "s.json").read_text())
    assert (score["asked"], score["exact"]) == (2, 1)
    assert score["texts"]["bleu"] == pytest.approx(100)
    assert score["texts"]["rouge_l"] == pytest.approx(1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "BLEU 100.0000" in shown
    assert "ROUGE-L 1.0000" in shown


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (PAIRS, ["--model", "/no/model"], "found nothing under '/no/model'"),
        (PAIRS, ["--max-length", "4"], "Expected labels to score, found no target tokens"),
        (PAIRS, ["--loss-on", "assistant"], "Expected chats for loss-on=assistant"),
        (PAIRS, ["--text-scores", "--max-new-tokens", "0"], "Expected --max-new-tokens above 0 for text scores"),
        ([{"q": "a"}], [], "the columns of one of these forms"),
    ],
)
def test_what_cannot_be_scored_is_said_in_one_line(
    rows: list[dict[str, Any]], options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "prompt": "far far far far"} for row in rows] if "--max-length" in options else rows
    data = write_lines(tmp_path / "held-out.jsonl", rows)
    assert run("evaluate", "--model", BASE, "--data", data, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hsplit-flwr: error: ")
    assert message in error
