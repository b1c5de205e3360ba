"""A run that ends before its last round, and the adapter of its best one: on both faces, resumed or not."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.reports.rounds_file import read_rounds
from tests.flower import test_resume as resuming
from tests.flower.test_resume import EVALUATION, FACES, MODEL, PLANS, TRAINING, Federation, comparable, ended
from tests.helpers.federation import build_one_at_a_time, weights_of

pytestmark = pytest.mark.timeout(180)

ROUNDS = replace(TRAINING, rounds=7, local_steps=1, learning_rate=0.01, warmup_steps=0, schedule="constant")
BEST, LAST, PATIENCE = 3, 5, 2
"""clients learn what the server scores in rounds 1 to `BEST`, then to say one token whatever comes"""
SCORED_TO = 1e-4
"""relative error of a perplexity from weights merged in float32, against base + adapter"""


def learning(client: str) -> ClientData:
    held_out = EVALUATION[0]
    one_token = {**held_out, "labels": held_out["labels"].clamp(max=5)}
    steps = [held_out] * BEST + [one_token] * (ROUNDS.rounds - BEST)
    return ClientData(lambda first_step: steps[first_step:], EVALUATION[:1])


@pytest.fixture(autouse=True)
def federation_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")
    monkeypatch.setattr(resuming, "data_of", learning)
    monkeypatch.setattr(resuming, "EVALUATION", EVALUATION[:1])


def perplexity(adapter: Path) -> float:
    """By transformers and PEFT alone."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), adapter)
    with torch.no_grad():
        return float(model.eval()(**EVALUATION[0]).loss.exp())


def tensors(adapter: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(adapter / "adapter_model.safetensors")
    return found


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def run(face: str, folder: Path, **options: Any) -> RoundServer:
    return Federation(face, False, patience=PATIENCE).run(folder, training=ROUNDS, **options)


@cache
def uninterrupted(face: str, folder: Path) -> RoundServer:
    return run(face, folder / face)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uninterrupted")


@FACES
def test_a_run_ends_when_its_patience_does_and_keeps_its_best_adapter(face: str, folder: Path) -> None:
    rounds, out = uninterrupted(face, folder), folder / face
    perplexities = [record.central_perplexity or 0.0 for record in rounds.history]
    assert len(perplexities) == LAST
    assert min(perplexities) == perplexities[BEST - 1] < perplexities[-1] / 1.5
    summary = summary_of(out)
    assert summary["status"] == "completed"
    why = "patience = 2: no lower perplexity on the server's held-out data in 2 rounds than"
    assert summary["reason"].startswith(why)
    assert f"The run ended early, after {LAST} rounds: {why}" in (out / "report.txt").read_text()
    assert summary["best"] == {
        "round": BEST,
        "perplexity": perplexities[BEST - 1],
        "measured_on": "the server's held-out data",
        "adapter": f"best/round-{BEST:04d}/adapter",
    }
    assert perplexity(out / summary["best"]["adapter"]) == pytest.approx(min(perplexities), rel=SCORED_TO)
    assert perplexity(out / "adapter") == pytest.approx(perplexities[-1], rel=SCORED_TO)


@FACES
@pytest.mark.parametrize("broken_in", [BEST, LAST], ids=["best", "last"])
def test_patience_and_the_best_adapter_outlive_a_break(face: str, broken_in: int, folder: Path, tmp_path: Path) -> None:
    expected, reference = uninterrupted(face, folder), folder / face
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(face, out, trap=ended("close_training", broken_in))
    found = run(face, out, resume="latest")
    assert found.resumed_after == broken_in - 1
    assert comparable(found) == comparable(expected)
    ours, theirs = weights_of(found), weights_of(expected)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert summary_of(out)["best"] == summary_of(reference)["best"]
    assert summary_of(out)["reason"] == summary_of(reference)["reason"]
    for name in ("adapter", summary_of(out)["best"]["adapter"]):
        here, there = tensors(out / name), tensors(reference / name)
        assert here.keys() == there.keys()
        assert [key for key in there if not torch.equal(here[key], there[key])] == []
    assert [line["round"] for line in read_rounds(out)] == list(range(1, LAST + 1))
    assert [path.name for path in (out / "best").iterdir()] == [f"round-{BEST:04d}"]


@FACES
def test_a_run_that_ended_early_goes_on_with_more_patience(face: str, folder: Path, tmp_path: Path) -> None:
    """What ended it decides nothing of the results, so it may differ."""
    uninterrupted(face, folder)
    out = tmp_path / "out"
    shutil.copytree(folder / face, out)
    assert len(run(face, out, resume="latest").history) == LAST
    further = Federation(face, False).run(out, "latest", training=ROUNDS)
    assert [record.round for record in further.history] == list(range(1, ROUNDS.rounds + 1))
    assert summary_of(out)["reason"] == ""


def test_a_best_adapter_that_is_gone_is_missed(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No summary names an adapter that is not there, or that of another round."""
    uninterrupted("legacy", folder)
    out = tmp_path / "out"
    shutil.copytree(folder / "legacy", out)
    shutil.rmtree(out / "best")
    run("legacy", out, resume="latest")
    assert f"round {BEST} is the best so far, and its adapter is not in {out}" in caplog.text
    best = summary_of(out)["best"]
    assert (best["round"], best["adapter"]) == (BEST, "")


def test_flower_returns_the_rounds_that_were_played(tmp_path: Path) -> None:
    federation = Federation("messages", False, patience=PATIENCE)
    model = GlobalModel(ModelFiles.resolve(MODEL))
    config = StrategyConfig(wait_for_nodes_s=5.0, patience=PATIENCE)
    strategy = HSplitLoRAMessageStrategy(model, PLANS, ROUNDS, config=config, eval_batches=EVALUATION[:1])
    assert federation.grid
    result = strategy.start(federation.grid)
    played = list(range(1, len(strategy.history) + 1))
    assert len(played) < ROUNDS.rounds
    assert list(result.train_metrics_clientapp) == list(result.evaluate_metrics_clientapp) == played
    assert list(result.evaluate_metrics_serverapp) == [0, *played]
    assert [result.evaluate_metrics_serverapp[n]["perplexity"] for n in played] == [
        record.central_perplexity for record in strategy.history
    ]


def test_patience_without_a_score_is_refused() -> None:
    config = StrategyConfig(patience=1, federated_evaluation=False)
    with pytest.raises(ConfigError, match=r"Expected held-out data .* found patience = 1"):
        HSplitLoRAMessageStrategy(GlobalModel(ModelFiles.resolve(MODEL)), PLANS, TRAINING, config=config)
