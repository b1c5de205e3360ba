"""Segments of a base in 4 or 8 bits against transformers, PEFT and bitsandbytes on the same base; what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hsplit_flwr import models
from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.lora.factors import LoraFactors, init_lora_A
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models import quantized_layers
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.quantized import METHODS, PLAIN, QUANTIZATION_FILE, Quantization, QuantizedLayer, weight_of
from hsplit_flwr.models.segments import Segment, linear_shapes, load_segment, segment_from_model
from hsplit_flwr.training.importance import ImportanceProbe, SampledRows
from hsplit_flwr.training.loss import token_losses
from hsplit_flwr.training.workload import QUANTIZATIONS
from tests.helpers.models import NUM_BLOCKS, tiny_model

TOLERANCE = 1e-4
"""largest difference of loss and gradients to PEFT, in units of the largest entry of the gradient"""
EXACT = 1e-6
"""absolute, float32: the same products in the same order"""
METHOD = pytest.mark.parametrize("method", ["nf4", "int8"])
CUTS = [1, 2, 3]
LORA = LoraSpec(
    4, 8.0, rank_pattern={r"1\..*": 2, r"3\..*(c_fc|up_proj)": 0, r"2\..*": 7}, alpha_pattern={r"1\..*": 3.0}
)
"""unequal ranks, and none on one matrix"""
Gradients = dict[str, Tensor]


def save(name: str, folder: Path, *, tied: bool = True) -> Path:
    tiny_model(name, tied=tied).save_pretrained(folder)
    return folder


def files_of(folder: Path, method: str) -> ModelFiles:
    return ModelFiles.resolve(str(folder)).quantized_by(method)


def by_transformers(folder: Path, method: str, dtype: torch.dtype = torch.float32, **further: Any) -> PreTrainedModel:
    """The base as people load it: none of our code."""
    if method == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, **further)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=method, bnb_4bit_compute_dtype=dtype, **further
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map="cpu"
    )
    return model.train()  # without dropout; in eval mode a CPU computes 8-bit layers otherwise


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, (3, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    mask[1, :2] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of(model: PreTrainedModel) -> Tensor:
    one = batch()
    with torch.no_grad():
        logits: Tensor = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"], use_cache=False).logits
    return logits


def in_two(head: Segment, tail: Segment) -> Tensor:
    one = batch()
    with torch.no_grad():
        hidden = head(one["input_ids"], one["attention_mask"])
        logits: Tensor = tail(hidden, one["attention_mask"])
    return logits


def trained(shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, LoraFactors]:
    """Factors as training leaves them, of the ranks of `LORA`."""
    found = {}
    for index, name in enumerate(LORA.targets(shapes)):
        d_out, d_in = shapes[name]
        generator = torch.Generator().manual_seed(seed + index)
        A = init_lora_A(LORA.rank(name), d_in, seed + index)
        B = 0.05 * torch.randn(d_out, LORA.rank(name), generator=generator)
        found[name] = LoraFactors(A, B, LORA.scaling(name))
    return found


def peft_of(
    model: PreTrainedModel, factors: dict[str, LoraFactors], before: dict[str, LoraFactors]
) -> tuple[float, Gradients]:
    """Loss and gradients by PEFT: one adapter that is trained, and a frozen one beside it for what came before."""
    names = list(factors)

    def config(scaled: float) -> peft.LoraConfig:
        return peft.LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules=names,
            rank_pattern={name: factors[name].rank for name in names},
            alpha_pattern={name: scaled * factors[name].scaling * factors[name].rank for name in names},
        )

    wrapped = peft.get_peft_model(model, config(1.0))
    adapters = {"default": factors}
    if before:
        wrapped.add_adapter("before", config(1.0))
        adapters["before"] = before
    wrapped.base_model.set_adapter(list(adapters))
    for module_name, layer in wrapped.base_model.model.named_modules():
        for adapter, values in adapters.items():
            if module_name in values:
                layer.lora_A[adapter].weight.data.copy_(values[module_name].A)
                layer.lora_B[adapter].weight.data.copy_(values[module_name].B)
    loss = wrapped(**batch(), use_cache=False).loss
    loss.backward()
    gradients = {}
    for name in names:
        layer = wrapped.base_model.model.get_submodule(name)
        assert isinstance(layer, Linear4bit | Linear8bitLt)
        gradients[f"{name}.A"] = layer.lora_A["default"].weight.grad
        gradients[f"{name}.B"] = layer.lora_B["default"].weight.grad
    return float(loss.detach()), gradients


def ours_of(
    files: ModelFiles, cut: int, factors: dict[str, LoraFactors], before: dict[str, LoraFactors]
) -> tuple[float, Gradients]:
    """Loss and gradients of head and tail, as a step takes them."""
    head, tail = load_segment(files, 0, cut), load_segment(files, cut)
    gradients: Gradients = {}
    adapters = []
    for segment in (head, tail):
        for name, layer in segment.linear_modules().items():
            if name in before:
                assert isinstance(layer, QuantizedLayer)
                layer.stand(before[name].A, before[name].scaling * before[name].B)
        own = SegmentAdapters(segment, LORA, [n for n in segment.linear_modules() if LORA.rank(n)])
        own.set({name: factors[name] for name in own.module_names})
        adapters.append(own)
    one = batch()
    hidden = head(one["input_ids"], one["attention_mask"])
    entering = hidden.detach().requires_grad_()
    losses = token_losses(tail(entering, one["attention_mask"]), one["labels"])
    loss = losses.sum() / (one["labels"][:, 1:] >= 0).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.autograd.backward(hidden, entering.grad)
    for own in adapters:
        for name in own.module_names:
            A, B = own.parameters([name])
            assert A.grad is not None
            assert B.grad is not None
            gradients[f"{name}.A"], gradients[f"{name}.B"] = A.grad, B.grad
    return float(loss.detach()), gradients


# --- equality ---


def test_the_methods_have_one_list() -> None:
    assert (PLAIN, *METHODS) == QUANTIZATIONS


@pytest.mark.parametrize(
    ("name", "method", "tied"),
    [
        *(("llama", method, tied) for method in METHODS for tied in (True, False)),
        *((name, method, False) for name in ("gpt2", "opt", "gpt_neox") for method in ("nf4", "int8")),
    ],
)
def test_head_and_tail_are_the_quantised_model(name: str, method: str, tied: bool, tmp_path: Path) -> None:
    """OPT has linear layers outside of its blocks, GPT-2 transposed ones; the LM head stays as it is, tied or not."""
    files = files_of(save(name, tmp_path, tied=tied), method)
    expected = logits_of(by_transformers(tmp_path, method))
    assert not torch.allclose(expected, logits_of(tiny_model(name, tied=tied)), atol=1e-3)
    for cut in CUTS:
        found = in_two(load_segment(files, 0, cut), load_segment(files, cut))
        assert torch.allclose(found, expected, atol=EXACT, rtol=0)


@METHOD
@pytest.mark.parametrize("merged_before", [False, True], ids=["first-round", "later-round"])
@pytest.mark.parametrize(("name", "cut"), [("gpt2", 2), *(("llama", cut) for cut in CUTS)])
def test_loss_and_gradients_are_pefts_on_the_same_base(
    name: str, cut: int, merged_before: bool, method: str, tmp_path: Path
) -> None:
    files = files_of(save(name, tmp_path), method)
    shapes = linear_shapes(load_segment(files))
    factors = trained(shapes, seed=1)
    before = trained(shapes, seed=1000) if merged_before else {}
    loss, gradients = ours_of(files, cut, factors, before)
    expected_loss, expected = peft_of(by_transformers(tmp_path, method), factors, before)
    assert loss == pytest.approx(expected_loss, abs=TOLERANCE, rel=0)
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert float((gradients[key] - gradient).abs().max()) <= TOLERANCE * float(gradient.abs().max()), key


@METHOD
def test_it_computes_in_bf16_as_transformers_does(method: str, tmp_path: Path) -> None:
    files = files_of(save("llama", tmp_path), method)
    head, tail = (load_segment(files, *part, dtype=torch.bfloat16) for part in ((0, 2), (2, NUM_BLOCKS)))
    expected = logits_of(by_transformers(tmp_path, method, torch.bfloat16))
    found = in_two(head, tail)
    assert (tail.dtype, found.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(found, expected)


@METHOD
def test_training_and_scoring_compute_the_same(method: str, tmp_path: Path) -> None:
    """By itself bitsandbytes repacks 4-bit weights for bf16 where no gradient is asked for, and in eval mode quantises
    the inputs of 8-bit layers on a CPU: a score would be of another model than the one that is trained."""
    whole = load_segment(files_of(save("llama", tmp_path), method))
    one = batch()
    with torch.no_grad():
        scored = whole(one["input_ids"], one["attention_mask"])
    adapters = SegmentAdapters(whole, LORA)
    adapters.reset(3)
    assert torch.equal(whole(one["input_ids"], one["attention_mask"]), scored)


# --- importance, weights ---


@METHOD
def test_importance_is_of_the_weights_that_are_computed_with(method: str, tmp_path: Path) -> None:
    """sum |W * dL/dW|, by autograd in a plain model: W as bitsandbytes dequantises it, and what stands beside it."""
    files = files_of(save("llama", tmp_path), method)
    whole = load_segment(files)
    before = trained(linear_shapes(whole), seed=7)
    plain = tiny_model("llama")
    reference = by_transformers(tmp_path, method)
    for name, layer in whole.linear_modules().items():
        stored = reference.get_submodule(name)
        weight = dequantized(stored)
        if name in before:
            assert isinstance(layer, QuantizedLayer)
            layer.stand(before[name].A, before[name].scaling * before[name].B)
            weight = weight + before[name].delta()
        assert torch.allclose(weight_of(layer), weight, atol=EXACT, rtol=0)
        twin = plain.get_submodule(name)
        twin.weight = nn.Parameter(weight)
    one = batch()
    with ImportanceProbe(whole, [SampledRows(0, 3, 1.0)], one["labels"].shape) as probe:
        tokens = (one["labels"][:, 1:] >= 0).sum()
        loss = token_losses(whole(one["input_ids"], one["attention_mask"]), one["labels"]).sum() / tokens
        loss.backward()  # type: ignore[no-untyped-call]
    (values,) = probe.values()
    plain(**one).loss.backward()
    for name, value in values.items():
        twin = plain.get_submodule(name)
        assert isinstance(twin.weight, nn.Parameter)
        assert twin.weight.grad is not None
        expected = float((twin.weight.detach() * twin.weight.grad).abs().sum()) / sum(twin.weight.shape)
        assert value == pytest.approx(expected, rel=TOLERANCE), name


def dequantized(layer: Any) -> Tensor:
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()  # type: ignore[no-any-return]
    return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).float()  # type: ignore[no-any-return]


@METHOD
def test_segments_of_a_model_share_its_quantised_layers(method: str, tmp_path: Path) -> None:
    """So what stands beside a weight of the global model does so in the tail, too."""
    whole = load_segment(files_of(save("llama", tmp_path), method))
    tail = segment_from_model(whole.model, 2)
    name = "model.layers.3.mlp.up_proj"
    assert tail.linear_modules()[name] is whole.linear_modules()[name]
    SegmentAdapters(tail, LORA)
    assert not any("lora" in key for key, _ in whole.model.named_parameters())


@METHOD
def test_a_layer_is_quantised_as_soon_as_it_is_read(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two weights are ever there in more bits."""
    files = files_of(save("llama", tmp_path), method)
    unpacked: list[str] = []
    read = ModelFiles.read
    kind = quantized_layers.EightBit if method == "int8" else quantized_layers.FourBit
    packed = kind.load

    def noted(self: ModelFiles, name: str, dtype: torch.dtype | None = None) -> Tensor:
        assert not unpacked
        if name.endswith("_proj.weight"):
            unpacked.append(name)
        return read(self, name, dtype)

    def packs(self: Any, *args: Any) -> None:
        packed(self, *args)
        assert self.weight.dtype in (torch.uint8, torch.int8)
        unpacked.clear()

    monkeypatch.setattr(ModelFiles, "read", noted)
    monkeypatch.setattr(kind, "load", packs)
    head = load_segment(files, 0, 2)
    assert len([m for m in head.model.modules() if isinstance(m, QuantizedLayer)]) == 14


# --- checkpoints that are quantised already ---


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("name", "method"), [("llama", "nf4"), ("gpt2", "nf4"), ("llama", "fp4")])
def test_a_checkpoint_in_4_bits_is_read_block_by_block(name: str, method: str, nested: bool, tmp_path: Path) -> None:
    _read_block_by_block(name, method, tmp_path, bnb_4bit_use_double_quant=nested)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_in_8_bits_is_read_block_by_block(name: str, tmp_path: Path) -> None:
    _read_block_by_block(name, "int8", tmp_path, llm_int8_skip_modules=["lm_head", "0.attn.c_attn", "0.mlp.up_proj"])


def _read_block_by_block(name: str, method: str, folder: Path, **settings: Any) -> None:
    whole = by_transformers(save(name, folder / "plain"), method, **settings)
    whole.save_pretrained(folder / "quantised")
    expected = logits_of(whole)
    files = files_of(folder / "quantised", method)
    for cut in CUTS:
        head, tail = load_segment(files, 0, cut), load_segment(files, cut)
        assert torch.allclose(in_two(head, tail), expected, atol=EXACT, rtol=0)
    assert len(files.weight_names()) == len({*tiny_model(name).state_dict()} - {"lm_head.weight"})


def test_a_quantised_checkpoint_is_not_taken_for_another(tmp_path: Path) -> None:
    by_transformers(save("llama", tmp_path / "plain"), "nf4").save_pretrained(tmp_path / "quantised")
    files = ModelFiles.resolve(str(tmp_path / "quantised"))
    with pytest.raises(UnsupportedModelError, match=r'quantised by bitsandbytes .*, or set quantization = "nf4"'):
        load_segment(files, 0, 1)
    with pytest.raises(ConfigError, match=r'quantised by nf4 to stay so, found .*\'int8\'\. Set quantization = "nf4"'):
        files.quantized_by("int8")
    with pytest.raises(ConfigError, match=r"quantization as one of .*'nf4'.*, found 'int3'"):
        files.quantized_by("int3")


@pytest.mark.parametrize("quant_method", ["gptq", "awq", "hqq", "fp8", "compressed-tensors"])
def test_what_others_quantised_is_refused_under_every_setting(quant_method: str, tmp_path: Path) -> None:
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    stated = {"quant_method": quant_method, "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    for method in QUANTIZATIONS:
        with pytest.raises(UnsupportedModelError, match=rf"quantised by {quant_method} .*Take the checkpoint"):
            load_segment(files_of(tmp_path, method), 0, 1)


@pytest.mark.parametrize("damage", ["shape", "missing", "json"])
def test_statistics_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    by_transformers(save("llama", tmp_path / "plain"), "nf4").save_pretrained(tmp_path / "quantised")
    path = tmp_path / "quantised" / "model.safetensors"
    tensors = load_file(path)
    weight = "model.layers.0.self_attn.q_proj.weight"
    state = f"{weight}.quant_state.bitsandbytes__nf4"
    if damage == "shape":
        tensors[state] = tensors["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"].clone()
    elif damage == "missing":
        del tensors[f"{weight}.absmax"]
    else:
        tensors[state] = torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"Expected a weight quantised by nf4 for a layer of .* \(32, 32\), found"):
        load_segment(files_of(tmp_path / "quantised", "nf4"), 0, 1)


def test_without_bitsandbytes_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of(save("llama", tmp_path), "nf4")
    monkeypatch.setitem(sys.modules, "hsplit_flwr.models.quantized_layers", None)
    monkeypatch.delattr(models, "quantized_layers")
    with pytest.raises(ConfigError, match=r"package bitsandbytes .* pip install 'hsplit_flwr\[quantized\]'"):
        load_segment(files, 0, 1)


def test_a_checkpoints_own_settings_are_kept(tmp_path: Path) -> None:
    """Also a threshold of 0, which is not transformers' default; and the file beside an adapter gives them back."""
    stated = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}
    found = Quantization.of_stated({**stated, "llm_int8_skip_modules": ["lm_head"]})
    assert found is not None
    config = found.transformers_config(torch.float32)
    assert (config.llm_int8_threshold, config.llm_int8_skip_modules) == (0.0, ["lm_head"])
    found.save(tmp_path, torch.float32)
    assert Quantization.of_folder(tmp_path) == found
    (tmp_path / QUANTIZATION_FILE).write_text('{"quant_method": "gptq"}')
    with pytest.raises(ConfigError, match="how the base is quantised by bitsandbytes, found nothing of it"):
        Quantization.of_folder(tmp_path)
    (tmp_path / QUANTIZATION_FILE).write_text("{")
    with pytest.raises(ConfigError, match="to say how the base is quantised, found"):
        Quantization.of_folder(tmp_path)
    for odd in ({"llm_int8_has_fp16_weight": True}, {"bnb_4bit_quant_storage": "bfloat16"}):
        with pytest.raises(ConfigError, match=r"packed into uint8 or int8, found .*Quantise it with the defaults"):
            Quantization.of_stated({**stated, **odd})
