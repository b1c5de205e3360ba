"""Scaled rotary positions in GGUF files: llama.cpp computes the model's angles from them, and so does a run."""

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from hsplit_flwr.common.cache_folder import CACHE_VARIABLE
from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.models.gguf_cache import convert_once
from hsplit_flwr.models.gguf_export import write_gguf
from hsplit_flwr.models.gguf_rope import read_rope
from tests.helpers.chats import tokenizer
from tests.helpers.gguf_files import SMALL, fields, logits, read, small

LLAMA_31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"original_max_position_embeddings": 16}
WITHOUT_FACTOR = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, **YARN}


def scaled(kind: str, factor: float = 4.0, **further: float) -> dict[str, Any]:
    """Settings of a small model with scaled positions."""
    rope = {"rope_type": kind, "factor": factor, "rope_theta": 50000.0, **further}
    return {**SMALL, "rope_parameters": rope, "head_dim": 16, "max_position_embeddings": 16384}


SCALED = {
    "linear": LlamaConfig(**scaled("linear")),
    "yarn": Qwen3Config(**scaled("yarn", **YARN)),
    "yarn of LLaMA": LlamaConfig(**scaled("yarn", original_max_position_embeddings=64, beta_fast=32, beta_slow=1)),
    "llama3": LlamaConfig(**scaled("llama3", 8.0, **LLAMA_31)),
}


def angles(path: Path) -> tuple[torch.Tensor, float]:
    """Frequencies and the scale of queries and keys that llama.cpp computes from what a file says."""
    said, arch = fields(path), fields(path)["general.architecture"]
    of = {key.removeprefix(f"{arch}.rope."): value for key, value in said.items()}
    width, theta, factor = of["dimension_count"], of["freq_base"], of.get("scaling.factor", 1.0)
    plain = torch.tensor([theta ** (-2 * pair / width) for pair in range(width // 2)], dtype=torch.float64)
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name == "rope_freqs.weight":
            plain = plain / torch.tensor(tensor.data, dtype=torch.float64)
    if of.get("scaling.type") != "yarn":
        return plain / factor, 1.0

    def column(turns: float) -> float:
        context = of["scaling.original_context_length"]
        return float(width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta)))

    low = max(0, math.floor(column(32)))
    high = min(width - 1, math.ceil(column(1)))
    kept = 1 - ((torch.arange(width // 2) - low) / max(0.001, high - low)).clamp(0, 1)
    return plain / factor * (1 - kept) + plain * kept, 1 + 0.1 * math.log(factor)


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_positions_go_there_and_back(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's angles from the file are the model's; a run from the file has them, too, which transformers drops."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    model = small(SCALED[kind])
    write_gguf(model, tokenizer(), path := tmp_path / "own.gguf")
    frequencies, scale = angles(path)
    rotary = model.get_submodule("model.rotary_emb")
    torch.testing.assert_close(frequencies.float(), rotary.inv_freq, rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(scale, rel=1e-6)
    back = AutoModelForCausalLM.from_pretrained(convert_once(path)).eval()
    assert torch.equal(logits(back), logits(model))
    assert not torch.equal(logits(read(path)), logits(model))  # what is mended


def test_what_files_say_is_read_or_refused(tmp_path: Path) -> None:
    write_gguf(small(SCALED["llama3"]), tokenizer(), tmp_path / "own.gguf")
    said = fields(tmp_path / "own.gguf")
    with pytest.raises(UnsupportedModelError, match="as none, linear or yarn in a GGUF file, found 'longrope'"):
        read_rope({**said, "llama.rope.scaling.type": "longrope"}, None)
    old = {"general.architecture": "llama", "llama.rope.freq_base": 1e4, "llama.rope.scale_linear": 2.0}
    assert read_rope(old, None) == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    of = "qwen2.rope.scaling"
    yarn = {f"{of}.type": "yarn", f"{of}.factor": 4.0, f"{of}.original_context_length": 16, f"{of}.yarn_beta_fast": 8.0}
    assert read_rope({"general.architecture": "qwen2", "qwen2.rope.freq_base": 1e4, **yarn}, None) == {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
    }
    gemma = {"general.architecture": "gemma3", "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    with pytest.raises(UnsupportedModelError, match="alone in a GGUF file, found gemma3"):
        read_rope(gemma, None)
    with pytest.raises(UnsupportedModelError, match=r"as in Llama 3\.1 in a GGUF file, found others"):
        read_rope(said, torch.tensor([1.0, 1.0, 1.0, 2.0, 5.0, 8.0, 8.0, 8.0]))


def test_a_base_of_other_positions_gives_no_metadata(tmp_path: Path) -> None:
    """The keys that a scaled model needs would be missing in its file."""
    unscaled = small(LlamaConfig(**{**scaled("linear"), "rope_parameters": SMALL["rope_parameters"]}))
    write_gguf(unscaled, tokenizer(), plain := tmp_path / "plain.gguf")
    write_gguf(small(SCALED["linear"]), tokenizer(), far := tmp_path / "far.gguf")
    with pytest.raises(ConfigError, match=r"found positions as they are in .*plain\.gguf where the model has"):
        write_gguf(small(SCALED["linear"]), tokenizer(), tmp_path / "own.gguf", like=plain)
    write_gguf(small(SCALED["linear"]), tokenizer(), tmp_path / "own.gguf", like=far)
    torch.testing.assert_close(angles(tmp_path / "own.gguf"), angles(far))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**scaled("dynamic")), "Expected rope_type as one of default, linear, yarn, llama3"),
        (Qwen2Config(**scaled("llama3", **LLAMA_31)), "Expected rope_type as default, linear or yarn"),
        (LlamaConfig(**scaled("yarn", **YARN, attention_factor=1.5)), "attention_factor as 1.13863, which follows"),
        (LlamaConfig(**scaled("yarn", **YARN, beta_slow=0.5)), "YaRN's beta_slow as 1 for GGUF, found 0.5"),
        (LlamaConfig(**SMALL | {"rope_parameters": WITHOUT_FACTOR}), "factor of yarn positions as a number"),
        (LlamaConfig(**scaled("yarn", **YARN, truncate=False)), "YaRN's truncate as True"),
    ],
)
def test_positions_that_llama_cpp_has_not_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        write_gguf(small(config), tokenizer(), tmp_path / "own.gguf")
    assert [*tmp_path.iterdir()] == []
