"""What a run leaves behind, read back with transformers, PEFT and json."""

import gc
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation import result_files, run_output, sample_texts
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.federation.run_output import RunOutput
from hsplit_flwr.federation.sample_texts import MAX_NEW_TOKENS, Sample
from hsplit_flwr.flower.server import HSplitLoRAServer
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.generation import generate_texts
from hsplit_flwr.reports.records import RoundRecord, RunSummary
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from tests.helpers.federation import Node, random_batches

pytestmark = [pytest.mark.timeout(120), pytest.mark.pictures]

EXACT = 1e-4
"""largest absolute difference of logits between base + adapter and the merged model"""
PROMPT = Sample("name[The Blue Otter], food[Thai] =>", "The Blue Otter serves Thai food.")
TRAINING = TrainingConfig(rounds=2, local_steps=3, learning_rate=0.05, warmup_steps=0)
BATCHES = random_batches(3, seed=0, rows=4, width=16)


def run(folder: Path, rounds: int, adapter_rank: int | None = None, log_samples: bool = False) -> dict[str, Any]:
    """A run of one client in this process; returns its ``summary.json``."""
    model = GlobalModel(ModelFiles.resolve(str(tiny_checkpoint())))
    output = RunOutput(
        model,
        str(tiny_checkpoint()),
        folder,
        command="flwr run here",
        config={"rounds": rounds, "cuts": "2"},
        samples=[PROMPT],
        adapter_rank=adapter_rank,
        log_samples=log_samples,
    )
    strategy = HSplitLoRAStrategy(
        model,
        ClientPlan(2, LoraSpec(4, 8.0)),
        TRAINING,
        limits=BarrierLimits(start_gate_s=5.0),
        eval_batches=BATCHES,
    )
    server = HSplitLoRAServer(strategy, output)
    data = ClientData(train=BATCHES, evaluate=BATCHES)
    server.client_manager().register(Node("1", ["0"], tiny_checkpoint(), lambda client: data))
    server.fit(num_rounds=rounds, timeout=60.0)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("results") / "run" / "deep"
    summary = run(folder, rounds=2)
    gc.collect()  # as if the process had ended: the delta's files go with its model
    return folder, summary


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=BATCHES[0]["input_ids"], attention_mask=BATCHES[0]["attention_mask"]).logits
    return found


def continuation(folder: Path) -> str:
    """What transformers itself generates from the model in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(PROMPT.prompt, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def test_the_files(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == {
        "adapter",
        "best",
        "checkpoints",
        "merged_model",
        "report.txt",
        "rounds.jsonl",
        "run.png",
        "spectrum.png",
        "summary.json",
    }
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = trained
    assert summary["rounds"] == 2
    assert summary["final_perplexity"] < summary["initial_perplexity"]
    assert summary["final_perplexity"] == summary["history"][-1]["central_perplexity"]
    assert summary["command"] == "flwr run here"
    assert summary["config"] == {"rounds": 2, "cuts": "2"}
    assert summary["wall_seconds"] > 0
    (client,) = summary["history"][0]["clients"]
    assert client["seconds"].keys() == {"load", "compute", "exchange"}
    before, after = summary["initial_perplexity"], summary["final_perplexity"]
    assert f"{before:,.1f} -> {after:,.1f}" in (folder / "report.txt").read_text()


def test_the_merged_model_is_a_plain_checkpoint_of_the_trained_weights(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = trained
    stored = load_file(folder / "merged_model" / "model.safetensors")
    base = load_file(tiny_checkpoint() / "model.safetensors")
    assert stored.keys() == base.keys()
    changed = {name for name in base if not torch.equal(stored[name], base[name])}
    assert changed == {name for name in base if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged_model", dtype=torch.float32)
    nll, tokens = 0.0, 0
    for batch in BATCHES:
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            nll += merged(**batch).loss.item() * count
        tokens += count
    assert torch.tensor(nll / tokens).exp().item() == pytest.approx(summary["final_perplexity"], rel=1e-5)


def test_the_adapter_on_the_base_equals_the_merged_model(trained: tuple[Path, dict[str, Any]]) -> None:
    import peft

    folder, summary = trained
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    before = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, folder / "adapter").eval())
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "merged_model", dtype=torch.float32))
    assert (adapted - merged).abs().max() <= EXACT
    assert (adapted - before).abs().max() > 100 * EXACT
    assert summary["adapter"]["exact"] is True


def test_the_samples_are_what_transformers_generates(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = trained
    assert summary["samples"] == [
        {
            "prompt": PROMPT.prompt,
            "reference": PROMPT.reference,
            "before": continuation(tiny_checkpoint()),
            "after": continuation(folder / "merged_model"),
        }
    ]
    assert summary["samples"][0]["before"] != summary["samples"][0]["after"]


@pytest.mark.parametrize("asked", [False, True])
def test_held_out_samples_are_logged_only_if_asked_for(
    tmp_path: Path, asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A server's log is streamed to whoever runs ``flwr run --stream``; people's held-out data stood in it."""
    with caplog.at_level(logging.INFO):
        summary = run(tmp_path, rounds=0, log_samples=asked)
    assert f"Results: {tmp_path}" in caplog.text
    (sample,) = summary["samples"]
    assert [sample[key] in caplog.text for key in ("prompt", "before", "after")] == [asked] * 3
    assert PROMPT.reference not in caplog.text
    assert not [path for path in tmp_path.glob("*.txt") if PROMPT.reference in path.read_text()]


def test_a_small_adapter_says_that_it_is_not_exact(tmp_path: Path) -> None:
    summary = run(tmp_path, rounds=2, adapter_rank=2)
    assert summary["adapter"]["exact"] is False
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name} == {2}


def test_a_run_without_rounds_has_results_but_no_adapter(tmp_path: Path) -> None:
    summary = run(tmp_path, rounds=0)
    assert summary["adapter"] is None
    assert summary["history"] == []
    assert summary["final_perplexity"] == summary["initial_perplexity"]
    assert not (tmp_path / "adapter").exists()
    assert load_file(tmp_path / "merged_model" / "model.safetensors").keys()


def test_a_second_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    """It overwrote the first one's summary and left its adapter beside the new model."""
    first = run(tmp_path / "run", rounds=1)
    run(tmp_path / "run", rounds=2)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == first
    assert json.loads((tmp_path / "run-2" / "summary.json").read_text())["rounds"] == 2


WRITERS = {
    "save_peft_adapter": result_files,
    "save_merged": run_output,
    "plot_run": result_files,
    "generate_texts": sample_texts,
}


@pytest.mark.parametrize("broken", WRITERS)
def test_what_cannot_be_written_costs_nothing_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """One failing export took all results with it."""
    calls = 0

    def full_disk(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if broken == "generate_texts" and calls == 1:
            return generate_texts(*arguments, **options)  # before the run
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WRITERS[broken], broken, full_disk)
    summary = run(tmp_path, rounds=1)
    assert summary["rounds"] == 1
    assert f"could not be written to {tmp_path}" in caplog.text
    assert "No space left on device" in caplog.text
    there = {path.name for path in tmp_path.iterdir()}
    assert {"report.txt", "summary.json"} <= there
    assert ("adapter" in there) == (broken != "save_peft_adapter")
    assert ("merged_model" in there) == (broken != "save_merged")


@pytest.mark.parametrize(("round_s", "drawn"), [(5.0, [1, 3]), (30.0, [1, 2, 3, 3])])
def test_pictures_follow_a_run_and_take_a_twentieth_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, round_s: float, drawn: list[int]
) -> None:
    """Drawn after the first round and at the end; in between where rounds last long beside a picture (here 1 s)."""
    now, found = [0.0], []
    monkeypatch.setattr(run_output, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def draw(summary: RunSummary, server: RoundServer, folder: Path) -> None:
        now[0] += 1.0
        found.append(len(summary.history))

    def append_round(folder: Path, history: Sequence[RoundRecord]) -> None:
        now[0] += round_s

    monkeypatch.setattr(run_output, "draw", draw)
    monkeypatch.setattr(run_output, "append_round", append_round)
    run(tmp_path / "run", rounds=3)
    assert found == drawn


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_none_is_refused_at_once(tmp_path: Path, rank: int) -> None:
    """After the last round only the merged model was left."""
    model = GlobalModel(ModelFiles.resolve(str(tiny_checkpoint())))
    with pytest.raises(ConfigError, match=f"Expected adapter-rank >= 1, .*found {rank}"):
        RunOutput(model, "tiny", tmp_path, adapter_rank=rank)


def test_a_bad_folder_fails_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = GlobalModel(ModelFiles.resolve(str(tiny_checkpoint())))
    with pytest.raises(ConfigError, match="Expected an output folder that can be created"):
        RunOutput(model, "tiny", tmp_path / "file" / "run", command="", config={})
