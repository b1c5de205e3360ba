"""A model card says what a run was, in the hub's form, and names no path of the machine that trained."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from hsplit_flwr.cli import USER_ERROR, main
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.reports.model_card import CARD, model_card, push, write_card
from hsplit_flwr.reports.records import ClientRecord, RoundRecord, RunSummary

CLIENTS = (
    ClientRecord("0", 1, "4", 4.0, 100, 8, 2.0, 10, 20),
    ClientRecord("1", 3, "16", 16.0, 100, 8, 2.0, 10, 20),
)
SUMMARY = RunSummary(
    initial_perplexity=20.0,
    history=(RoundRecord(1, central_perplexity=5.25, clients=CLIENTS),),
    seed=0,
    versions={"hsplit_flwr": "0.1.0"},
    commit=None,
    command="flwr run simulations/finetune --stream --run-config 'data=\"/home/somebody/desk.jsonl\" rounds=1'",
    wall_seconds=61.0,
    config={"data": "/home/somebody/desk.jsonl", "rounds": 1},
    adapter={"exact": True, "relative_error": 1e-8, "max_rank": 20, "ranks": {"a": 20, "b": 4}},
)


def metadata(card: str) -> dict[str, Any]:
    """As the hub's own library reads it."""
    read: dict[str, Any] = vars(ModelCard(card).data)
    return {key: value for key, value in read.items() if value is not None}


def test_the_hub_reads_the_metadata() -> None:
    data = metadata(model_card("adapter", "HuggingFaceTB/SmolLM2-135M", SUMMARY))
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation"
    assert "arxiv:2505.02795" in data["tags"]
    assert metadata(model_card("merged model", "a/b", SUMMARY))["library_name"] == "transformers"


def test_a_card_says_method_scores_and_command() -> None:
    card = model_card("adapter", "a/b", SUMMARY)
    assert "2 clients trained LoRA adapters on their first 1 or 3 blocks, of ranks 16 or 4, in 1 rounds" in card
    assert "20.000 before training, 5.250 after it" in card
    assert "The adapter equals what was trained: relative error 1e-08, ranks 4-20." in card
    assert 'AutoModelForCausalLM.from_pretrained("a/b")' in card
    assert "PeftModel" not in model_card("merged model", "a/b", SUMMARY)


def test_a_failed_run_says_so() -> None:
    summary = RunSummary(**{**vars(SUMMARY), "status": "failed", "reason": "RunFailedError: nobody", "adapter": None})
    assert "**The run failed** after 1 rounds: RunFailedError: nobody" in model_card("adapter", "a/b", summary)


def test_paths_of_the_machine_stay_out(tmp_path: Path) -> None:
    base = tmp_path / "SmolLM2"
    base.mkdir()
    card = model_card("adapter", str(base), SUMMARY)
    assert str(tmp_path) not in card
    assert "/home/somebody" not in card
    assert "LoRA adapter for SmolLM2" in card
    assert '"data": "desk.jsonl"' in card
    assert "--run-config 'data=\"desk.jsonl\" rounds=1'" in card
    assert "base_model" not in metadata(card)


def test_a_folder_is_pushed_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **given: calls.append((repo, given)))

    def upload(self: HfApi, **given: Any) -> str:
        calls.append(("upload", given))
        return "address"

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    (tmp_path / "adapter_config.json").write_text("{}")
    write_card(tmp_path, "adapter", "a/b", SUMMARY)
    assert (tmp_path / CARD).read_text().startswith("---\n")
    assert push(tmp_path, "me/mine", private=True) == "address"
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == tmp_path


def test_what_cannot_be_pushed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="Expected an adapter or a merged model in"):
        push(tmp_path, "me/mine")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="give the repository as user/name"):
        push(tmp_path, "no/such/repository")

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Cannot reach the hub: offline mode is enabled")

    monkeypatch.setattr(HfApi, "create_repo", unreachable)
    assert main(["push", str(tmp_path), "me/mine"]) == USER_ERROR
    assert "Cannot reach the hub" in capsys.readouterr().err
