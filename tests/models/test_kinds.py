"""One model of each kind of architecture, through the same checks as docs/models.md; and that document."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.adaptable import refused_by_peft, sees_all
from hsplit_flwr.models.block_layout import build_skeleton
from hsplit_flwr.models.equality import require_cuttable
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import load_segment, segment_from_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "simulations" / "benchmarks"))

import _model_row  # noqa: E402
import _models_table  # noqa: E402
import models  # noqa: E402
from _tiny_configs import tiny_config  # noqa: E402

STORED = ROOT / "simulations" / "evidence" / "models.json"

KINDS = {
    "mixtral": "experts that are stored apart and held in one tensor",
    "gpt_oss": "experts with biases, stored as they are held",
    "deepseek_v3": "layers of names that PEFT takes for fused experts",
    "sarvam_moe": "q, k and v stored in one tensor",
    "jamba": "types of blocks by period and offset; step sizes used without a call",
    "mamba": "no attention; layers that PEFT refuses",
    "openai-gpt": "blocks that return lists",
    "modernbert-decoder": "get_decoder() is the LM head",
    "llama4": "parts for images beside the text model; routers that return more than one tensor",
    "minicpm3": "a layer that sees positions with one dimension more",
}


@pytest.mark.parametrize("name", KINDS, ids=str)
def test_each_kind_works_from_cut_to_export(name: str) -> None:
    row = _model_row.model_row(name)
    assert row["not_run"] is None
    assert {column: cell["status"] for column, cell in row["cells"].items()} == dict.fromkeys(
        _model_row.COLUMNS, _model_row.WORKS
    ), row


def test_the_checks_find_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that cannot say "differs" says nothing."""
    monkeypatch.setattr(_model_row, "sent", lambda activations, _mask: activations * 1.001)
    statuses = {column: cell["status"] for column, cell in _model_row.model_row("llama")["cells"].items()}
    assert statuses == {
        "cut": "differs",
        "gradients": "differs",
        "folder": "differs",
        "plan": "works",
        "export": "works",
    }


def test_a_head_reads_the_experts_of_its_own_blocks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _model_row.random_whole(tiny_config("mixtral")).save_pretrained(tmp_path)
    files = ModelFiles.resolve(str(tmp_path))
    stored = json.dumps(sorted(files._stored))
    assert "experts.3.w1" in stored
    read: list[str] = []
    take = files._read_stored

    def noted(name: str, dtype: torch.dtype | None) -> Tensor:
        read.append(name)
        return take(name, dtype)

    monkeypatch.setattr(files, "_read_stored", noted)
    load_segment(files, 0, 1)
    assert any("layers.0.block_sparse_moe.experts.3" in name for name in read)
    assert not any("layers.1." in name or "lm_head" in name for name in read)


def test_a_missing_expert_is_named_before_anything_trains(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _model_row.random_whole(tiny_config("mixtral")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "layers.1.block_sparse_moe.experts.3.w2" not in n},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    files = ModelFiles.resolve(str(tmp_path))
    load_segment(files, 0, 1)
    with pytest.raises(ConfigError, match=r"down_proj of the shape \(4, 32, 64\).*found \(3, 32, 64\)"):
        load_segment(files, 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma4_text", "its blocks also read per_layer_input"),
        ("hy_v4", "its blocks also read prev_topk_indices"),
        ("zamba2", "its blocks also read original_hidden_states"),
        ("cpmant", "hidden states of the shape"),
        ("hrm_text", "one ModuleList with the"),
        ("qwen4_exp", "its blocks also read ple_input_ids"),
        ("blt", "how many blocks BltForCausalLM has, found BltConfig without num_hidden_layers"),
    ],
)
def test_what_reads_more_than_the_hidden_states_is_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        require_cuttable(tiny_config(name))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma4_assistant", "on token ids and an attention mask, found that .* stops: inputs_embeds and shared_kv"),
        ("musicgen", "found the encoder-decoder model 'musicgen'"),
        ("gemma3n", "with, found that one is missing: .* timm|found hidden states of the shape"),
    ],
)
def test_what_tokens_alone_do_not_run_is_refused_by_reason(name: str, reason: str) -> None:
    """Drafts on another model's keys, a part for images that wants timm: raw errors of transformers' code once."""
    row = _model_row.model_row(name)
    assert row["not_run"] or name == "gemma3n"  # with timm it runs, and is refused all the same
    assert {cell["status"] for cell in row["cells"].values()} == {_model_row.REFUSED}, row
    assert all(re.search(reason, cell["detail"]) for cell in row["cells"].values()), row


def test_rows_that_are_made_again_stand_beside_the_others() -> None:
    """Each with its own commit, and only where versions are the same: a table must not say more than was run."""
    stored: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    again: dict[str, Any] = {"model_type": "llama", "commit": "f" * 40, "not_run": None, "cells": {}}
    rows = models.beside([again], stored, stored)
    assert [row["model_type"] for row in rows] == [row["model_type"] for row in stored["rows"]]
    assert [row["model_type"] for row in rows if row["commit"] == again["commit"]] == ["llama"]
    of_gpt2 = next(row for row in stored["rows"] if row["model_type"] == "gpt2")
    assert {"commit": stored["commit"], **of_gpt2} in rows
    with pytest.raises(SystemExit, match="Make all again"):
        models.beside([again], stored, {"versions": {**stored["versions"], "torch": "1.0"}})


def test_models_where_padding_changes_later_tokens_are_refused() -> None:
    """No padding travels between head and tail; a recurrence that takes it in would compute something else there."""
    with pytest.raises(UnsupportedModelError, match="found logits that differ by"):
        require_cuttable(tiny_config("rwkv"))


def test_a_real_mixture_is_built_without_its_experts() -> None:
    """One block of DeepSeek-V3 has 30 GB of experts, which building a skeleton once asked for."""
    from transformers import AutoConfig

    skeleton = build_skeleton(AutoConfig.for_model("deepseek_v3", num_hidden_layers=5), torch.float32)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert sum(parameter.nbytes for parameter in skeleton.parameters()) > 40e9


def test_routers_take_no_adapter_and_can_be_named_by_nobody() -> None:
    segment = segment_from_model(_model_row.random_whole(tiny_config("llama4_text")))
    names = list(segment.linear_modules())
    assert names
    assert not any("router" in name for name in names)
    with pytest.raises(ConfigError, match=r"found \['router'\]"):
        LoraSpec(target_modules=("router",)).targets(names)


def test_peft_is_asked_what_it_refuses() -> None:
    assert refused_by_peft(tiny_config("mamba"), ["in_proj", "out_proj"]) == {"out_proj"}
    assert refused_by_peft(tiny_config("qwen3_moe"), ["q_proj", "gate_proj", "down_proj", "gate"]) == {
        "gate_proj",
        "down_proj",
        "gate",
    }
    assert refused_by_peft(tiny_config("llama"), ["q_proj", "gate_proj", "down_proj"]) == set()


@pytest.mark.parametrize(
    ("shape", "all_of_them"),
    [
        ((3, 6, 8), True),
        ((18, 8), True),
        ((3, 1, 6, 8), True),
        ((3, 2, 3, 8), True),
        ((6, 3, 8), False),
        ((7, 8), False),
    ],
)
def test_which_tensors_hold_all_positions(shape: tuple[int, ...], all_of_them: bool) -> None:
    assert sees_all(shape, (3, 6)) is all_of_them


def test_the_document_is_what_the_stored_rows_say() -> None:
    figures: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == _models_table.document(figures)
    assert (figures["silent_differences"], figures["raw_errors"]) == (0, 0)
    assert figures["works"] >= 60
