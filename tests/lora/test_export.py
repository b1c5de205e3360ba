import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hsplit_flwr.errors import AggregationError, ConfigError
from hsplit_flwr.lora.export import EXACT_TOLERANCE, AdapterExport, save_merged, save_peft_adapter
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import load_segment, segment_from_model

LOGITS_TOLERANCE = 1e-5
ERROR_TOLERANCE = 1e-5
VOCABULARY = 97


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=32,
            n_layer=12,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    ).eval()


# Twelve blocks, so that the names of blocks 1 and 11 could be confused by a careless pattern.
GPT2_TARGETS = ("attn.c_attn", "mlp.c_proj")
LLAMA_TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], list[str], bool]] = {
    "gpt2": (
        tiny_gpt2,
        [f"transformer.h.{i}.{m}" for i in range(12) for m in GPT2_TARGETS],
        True,
    ),
    "llama": (
        tiny_llama,
        [f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")],
        False,
    ),
}


def oriented(weight: Tensor, conv1d: bool) -> Tensor:
    """The weight in nn.Linear orientation (d_out, d_in)."""
    return weight.T if conv1d else weight


def stacked_factors(model: PreTrainedModel, names: list[str], conv1d: bool) -> dict[str, LoraFactors]:
    """Factors whose rank differs from module to module, as after rounds with other plans."""
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for i, name in enumerate(names):
        d_out, d_in = oriented(model.get_submodule(name).weight, conv1d).shape
        rank = 2 + i % 5
        factors[name] = LoraFactors(
            A=torch.randn(rank, d_in, generator=generator) / d_in**0.5,
            B=torch.randn(d_out, rank, generator=generator) * 0.3,
            scaling=0.5 + i % 3,
        )
    return factors


def merge(model: PreTrainedModel, deltas: dict[str, Tensor], conv1d: bool) -> PreTrainedModel:
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += oriented(delta, conv1d)
    return model


def logits(model: torch.nn.Module) -> Tensor:
    tokens = torch.arange(20).reshape(2, 10) % VOCABULARY
    with torch.no_grad():
        output: Tensor = model(input_ids=tokens).logits
    return output


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("dense", [False, True], ids=["factors", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_adapter_equals_the_merged_model_in_peft(family: str, dense: bool, tmp_path: Path) -> None:
    build, names, conv1d = FAMILIES[family]
    factors = stacked_factors(build(), names, conv1d)
    deltas = {name: f.delta() for name, f in factors.items()}
    export = save_peft_adapter(deltas if dense else factors, family, tmp_path, fan_in_fan_out=conv1d)

    assert export.exact
    assert export.relative_error <= EXACT_TOLERANCE
    assert export.ranks == {name: f.rank for name, f in factors.items()}
    merged = merge(build(), deltas, conv1d)
    adapted = PeftModel.from_pretrained(build(), str(tmp_path))
    assert largest_difference(logits(build()), logits(merged)) > 0.1  # the deltas are worth comparing
    assert largest_difference(logits(adapted), logits(merged)) < LOGITS_TOLERANCE

    unloaded = adapted.merge_and_unload()
    assert dict(unloaded.named_parameters()).keys() == dict(merged.named_parameters()).keys()
    for name, weight in merged.named_parameters():
        assert largest_difference(unloaded.get_parameter(name), weight) < LOGITS_TOLERANCE, name


@pytest.mark.parametrize("max_rank", [1, 2, 4])
@pytest.mark.parametrize("dense", [False, True], ids=["factors", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_adapter_is_the_eckart_young_optimum(family: str, dense: bool, max_rank: int, tmp_path: Path) -> None:
    build, names, conv1d = FAMILIES[family]
    base = build()
    factors = stacked_factors(base, names, conv1d)
    deltas = {name: f.delta() for name, f in factors.items()}
    export = save_peft_adapter(deltas if dense else factors, family, tmp_path, max_rank=max_rank, fan_in_fan_out=conv1d)
    unloaded = PeftModel.from_pretrained(build(), str(tmp_path)).merge_and_unload()

    lost, total = 0.0, 0.0
    for name, delta in deltas.items():
        exact = delta.double().numpy()
        singular = np.linalg.svd(exact, compute_uv=False)
        optimum = np.sqrt((singular[max_rank:] ** 2).sum() / (singular**2).sum())
        change = oriented(unloaded.get_submodule(name).weight - base.get_submodule(name).weight, conv1d)
        found = np.linalg.norm(exact - change.detach().double().numpy()) / np.linalg.norm(exact)
        assert found == pytest.approx(optimum, abs=ERROR_TOLERANCE)
        assert export.module_errors[name] == pytest.approx(optimum, abs=ERROR_TOLERANCE)
        assert export.ranks[name] == min(max_rank, factors[name].rank)
        lost, total = lost + (singular[max_rank:] ** 2).sum(), total + (singular**2).sum()
    assert export.relative_error == pytest.approx(np.sqrt(lost / total), abs=ERROR_TOLERANCE)
    assert not export.exact


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_noise_of_many_fp32_merges_does_not_raise_the_rank(shape: tuple[int, int], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    B, A = torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator)
    delta = torch.zeros(shape)
    for _ in range(50):
        delta += (B * torch.rand(1, 3, generator=generator)) @ A
    export = save_peft_adapter({"m": delta}, "base", tmp_path)
    assert export.ranks == {"m": 3}
    assert export.exact


def test_more_stacked_rank_than_the_matrix_has_is_reduced_to_full_rank(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    factors = LoraFactors(torch.randn(90, 12, generator=generator), torch.randn(20, 90, generator=generator), 0.1)
    export = save_peft_adapter({"m": factors}, "base", tmp_path)
    assert export.ranks == {"m": 12}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rebuilt = tensors["base_model.model.m.lora_B.weight"] @ tensors["base_model.model.m.lora_A.weight"]
    assert float((rebuilt - factors.delta()).norm() / factors.delta().norm()) < EXACT_TOLERANCE


def test_small_singular_values_are_kept_down_to_the_tolerance(tmp_path: Path) -> None:
    diagonal = torch.diag(torch.tensor([1.0, 1e-3, 1e-5, 1e-7]))
    export = save_peft_adapter({"m": diagonal}, "base", tmp_path)
    assert export.ranks == {"m": 3}
    assert export.module_errors["m"] == pytest.approx(1e-7, rel=0.05)


def test_modules_that_did_not_change_are_left_out(tmp_path: Path) -> None:
    kept, zero = "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj"
    base = tiny_llama()
    delta = 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(4))
    untrained = LoraFactors(A=torch.randn(4, 32), B=torch.zeros(32, 4), scaling=2.0)
    deltas: dict[str, LoraFactors | Tensor] = {
        kept: delta,
        zero: untrained,
        "model.layers.2.self_attn.q_proj": torch.zeros(32, 32),
    }
    export = save_peft_adapter(deltas, "base", tmp_path, max_rank=5)
    assert dict(export.ranks) == {kept: 5}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [kept]
    adapted = PeftModel.from_pretrained(base, str(tmp_path))
    assert [n for n, _ in adapted.named_modules() if n.endswith("lora_A")] == [f"base_model.model.{kept}.lora_A"]


def test_config_has_scaling_one_and_no_order_of_its_own(tmp_path: Path) -> None:
    base = tiny_llama()
    names = FAMILIES["llama"][1]
    save_peft_adapter(stacked_factors(base, names, False), "some/base", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["r"] == config["lora_alpha"] == 6
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(names)
    weights = PeftModel.from_pretrained(base, str(tmp_path)).base_model.model.get_submodule(names[0])
    assert weights.scaling == {"default": 1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_that_knows_no_patterns_reads_the_same(family: str, tmp_path: Path) -> None:
    """Some scale by alpha over the rank of each tensor: with ranks 8 to 24 under one alpha they were far off."""
    build, names, conv1d = FAMILIES[family]
    factors = stacked_factors(build(), names, conv1d)
    export = save_peft_adapter(factors, family, tmp_path, fan_in_fan_out=conv1d)
    assert set(export.ranks.values()) == {2, 3, 4, 5, 6}
    alpha = json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, pair in factors.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        read = alpha / A.shape[0] * B @ A
        assert float((read - pair.delta()).norm() / pair.delta().norm()) < EXACT_TOLERANCE


@pytest.mark.parametrize("largest", [5, 32])
def test_ranks_stay_apart_where_zeros_would_double_the_adapter(
    largest: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks 4, 4, 4 and 5 become four of 5; ranks 4, 4, 4 and 32 would take 2.9 times the bytes."""
    generator = torch.Generator().manual_seed(5)
    names = FAMILIES["llama"][1][:10:3]  # query projections (32, 32) of four blocks
    factors = {
        name: LoraFactors(torch.randn(r, 32, generator=generator), 0.1 * torch.randn(32, r, generator=generator), 1.0)
        for name, r in zip(names, (4, largest, 4, 4), strict=True)
    }
    save_peft_adapter(factors, "base", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    apart = largest == 32
    assert len(config["rank_pattern"]) == (3 if apart else 0)
    assert ("keeps ranks up to 32 that differ by module" in caplog.text) == apart
    merged = merge(tiny_llama(), {name: f.delta() for name, f in factors.items()}, False)
    adapted = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert largest_difference(logits(adapted), logits(merged)) < LOGITS_TOLERANCE


def test_what_the_base_says_about_writing_texts_survives(tmp_path: Path) -> None:
    """End tokens, penalties and the chat template; a temperature without sampling, which save_pretrained refuses."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    said = {"eos_token_id": [2, 7], "repetition_penalty": 1.1, "temperature": 0.6, "bos_token_id": 1}
    (base / "generation_config.json").write_text(json.dumps(said))
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "river": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(base)
    files = ModelFiles.resolve(str(base))
    for model in (load_segment(files).model, segment_from_model(load_segment(files).model).model):
        save_merged(model, files.tokenizer(), tmp_path / "merged")
        found = GenerationConfig.from_pretrained(tmp_path / "merged")
        assert {key: getattr(found, key) for key in said} == said
        assert model.generation_config.repetition_penalty == 1.1
        assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


def test_merged_model_and_tokenizer_load_with_the_stock_readers(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "near": 1, "the": 2, "river": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for family, (build, names, conv1d) in FAMILIES.items():
        deltas = {n: f.delta() for n, f in stacked_factors(build(), names, conv1d).items()}
        merged = merge(build(), deltas, conv1d)
        save_merged(merged, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"), tmp_path / family)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family).eval()
        assert torch.equal(logits(loaded), logits(merged))
        words = AutoTokenizer.from_pretrained(tmp_path / family)
        assert words("near the river")["input_ids"] == [1, 2, 3]


def test_a_model_that_still_holds_adapters_is_not_saved_as_merged(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(ConfigError, match="Expected a merged model without adapters, found 36 adapter"):
        save_merged(model, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ({"a.q": torch.zeros(4, 4)}, "Expected a delta that is not zero, found none in 1 modules"),
        ({}, "found none in 0 modules"),
        ({"a.q": torch.full((4, 4), float("nan"))}, "Delta of a.q: expected finite values, found NaN"),
        (
            {"a.q": torch.ones(2, 2, 2)},
            r"Delta of a.q: expected a dense delta .* found the shape \(2, 2, 2\)",
        ),
        (
            {"a.q": LoraFactors(torch.ones(3, 4), torch.ones(4, 2), 1.0)},
            r"found A \(3, 4\) and B \(4, 2\)",
        ),
    ],
)
def test_bad_deltas_are_refused_and_nothing_is_written(
    deltas: dict[str, LoraFactors | Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AggregationError, match=message):
        save_peft_adapter(deltas, "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rank_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Expected max_rank >= 1 or None"):
        save_peft_adapter({"m": torch.eye(3)}, "base", tmp_path, max_rank=0)


def test_export_describes_itself_as_json() -> None:
    export = AdapterExport(ranks={"a": 2, "b": 5}, module_errors={"a": 0.0, "b": 0.1}, relative_error=0.08)
    assert json.loads(json.dumps(export.to_dict())) == {
        "max_rank": 5,
        "relative_error": 0.08,
        "exact": False,
        "ranks": {"a": 2, "b": 5},
        "module_errors": {"a": 0.0, "b": 0.1},
    }


def test_importing_export_does_not_import_peft() -> None:
    code = "import sys, hsplit_flwr.lora.export; sys.exit('peft' in sys.modules)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False).returncode == 0
