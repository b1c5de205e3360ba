"""Head and tail equal the whole model, which is always the Hugging Face model called directly."""

import copy
import gc
import threading
import weakref
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)
from transformers.pytorch_utils import Conv1D

from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.models.block_layout import build_skeleton, find_layout
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import Segment, block_of, load_segment, segment_from_model
from tests.helpers.models import ARCHITECTURES, NUM_BLOCKS, PAD_TOKEN_ID, VOCAB_SIZE, tiny_config, tiny_model

CUTS = range(1, NUM_BLOCKS)
PADDINGS = ("none", "right", "left")
GRADIENT_TOLERANCE = 1e-5

# What each architecture uses outside its blocks, read from its source: (blocks, before them, after them).
_DECODER = ("model.layers", {"model.embed_tokens"}, {"model.norm", "lm_head"})
PARTS: dict[str, tuple[str, set[str], set[str]]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"), _DECODER),
    "gpt2": ("transformer.h", {"transformer.wte", "transformer.wpe"}, {"transformer.ln_f", "lm_head"}),
    "opt": (
        "model.decoder.layers",
        {f"model.decoder.{name}" for name in ("embed_tokens", "embed_positions", "project_in")},
        {"model.decoder.final_layer_norm", "model.decoder.project_out", "lm_head"},
    ),
    "gpt_neox": ("gpt_neox.layers", {"gpt_neox.embed_in"}, {"gpt_neox.final_layer_norm", "lm_head"}),
    "bloom": (
        "transformer.h",
        {"transformer.word_embeddings", "transformer.word_embeddings_layernorm"},
        {"transformer.ln_f", "lm_head"},
    ),
    "ctrl": ("transformer.h", {"transformer.w"}, {"transformer.layernorm", "lm_head"}),
    "falcon": ("transformer.h", {"transformer.word_embeddings"}, {"transformer.ln_f", "lm_head"}),
}


def batch(padding: str) -> tuple[Tensor, Tensor]:
    """input_ids (3, 11) and their mask; longer than every sliding window of the tiny models."""
    ids = torch.randint(3, VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 7:] = 0
        mask[2, 3:] = 0
    elif padding == "left":
        mask[1, :4] = 0
        mask[2, :8] = 0
    return ids.masked_fill(mask == 0, PAD_TOKEN_ID), mask


def logits_of(model: PreTrainedModel, padding: str = "right") -> Tensor:
    ids, mask = batch(padding)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def split_logits(head: Segment, tail: Segment, padding: str = "right", entry: int | None = None) -> Tensor:
    ids, mask = batch(padding)
    with torch.no_grad():
        logits: Tensor = tail(head(ids, mask), mask, entry=entry)
    return logits


def names_in_blocks(model: nn.Module) -> list[str]:
    """Independent of `Segment`: linear layers that lie under a numbered module."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    ]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_head_and_tail_equal_the_whole_model_bit_for_bit(architecture: str, tied: bool) -> None:
    model = tiny_model(architecture, tied=tied)
    whole = segment_from_model(model)
    expected = {padding: logits_of(model, padding) for padding in PADDINGS}
    for padding in PADDINGS:
        ids, mask = batch(padding)
        assert torch.equal(whole(ids, mask), expected[padding]), (padding, "whole")
    for cut in CUTS:
        head, tail = segment_from_model(model, 0, cut), segment_from_model(model, cut)
        for padding in PADDINGS:
            assert torch.equal(split_logits(head, tail, padding), expected[padding]), (cut, padding, "tail")
            entered = split_logits(head, whole, padding, entry=cut)
            assert torch.equal(entered, expected[padding]), (cut, padding, "entry")


@pytest.mark.parametrize("name", ["gemma3_text", "opt", "falcon"])
def test_middle_segments_and_late_entries_compose(name: str) -> None:
    model = tiny_model(name)
    ids, mask = batch("left")
    parts = [segment_from_model(model, i, i + 1) for i in range(NUM_BLOCKS)]
    hidden = ids
    for part in parts:
        hidden = part(hidden, mask)
    assert torch.equal(hidden, logits_of(model, "left"))
    middle, last = segment_from_model(model, 1, 3), segment_from_model(model, 1)
    after_two = segment_from_model(model, 0, 2)(ids, mask)
    entered = middle(after_two, mask, entry=2)
    assert torch.equal(last(entered, mask, entry=3), logits_of(model, "left"))


def test_activations_may_enter_before_block_0() -> None:
    model = tiny_model("llama")
    ids, mask = batch("right")
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(segment_from_model(model)(embedded, mask, entry=0), logits_of(model))


# --- gradients -------------------------------------------------------------------------------------------------


def inject_lora(model: nn.Module, global_name_of: dict[str, str]) -> dict[str, nn.Parameter]:
    """LoRA with random A and B, drawn from the module's whole-model name. Returns its parameters by that name."""
    layers = {local: model.get_submodule(local) for local in global_name_of}
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=list(layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    peft.inject_adapter_in_model(config, model)
    adapters: dict[str, nn.Parameter] = {}
    for local, name in global_name_of.items():
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        for factor in ("lora_A", "lora_B"):
            parameter: nn.Parameter = getattr(model.get_submodule(local), factor)["default"].weight
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            adapters[f"{name}.{factor}"] = parameter
    return adapters


def inject_into(segment: Segment) -> dict[str, nn.Parameter]:
    return inject_lora(segment.model, {segment.local_name(name): name for name in segment.linear_modules()})


def loss_of(logits: Tensor, mask: Tensor) -> Tensor:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    return (logits.float() * weights)[mask.bool()].mean()


def backward(tensor: Tensor, gradient: Tensor | None = None) -> None:
    tensor.backward(gradient)  # type: ignore[no-untyped-call]


def split_backward(head: Segment, tail: Segment, padding: str, entry: int | None = None) -> None:
    ids, mask = batch(padding)
    hidden = head(ids, mask)
    smashed = hidden.detach().requires_grad_()
    backward(loss_of(tail(smashed, mask, entry=entry), mask))
    backward(hidden, smashed.grad)


def assert_same_gradients(adapters: dict[str, nn.Parameter], expected: dict[str, nn.Parameter]) -> None:
    for name, parameter in adapters.items():
        reference = expected[name].grad
        assert reference is not None
        assert reference.abs().max() > 0, name
        torch.testing.assert_close(
            parameter.grad, reference, rtol=GRADIENT_TOLERANCE, atol=GRADIENT_TOLERANCE * float(reference.abs().max())
        )


def test_adapter_gradients_equal_those_of_the_whole_model(architecture: str) -> None:
    model = tiny_model(architecture, tied=False)
    reference = copy.deepcopy(model).requires_grad_(False)
    expected = inject_lora(reference, {name: name for name in names_in_blocks(reference)})
    ids, mask = batch("right")
    backward(loss_of(reference(input_ids=ids, attention_mask=mask).logits, mask))
    whole = segment_from_model(model)
    in_whole = inject_into(whole)
    assert in_whole.keys() == expected.keys()
    for cut in CUTS:
        head, tail = segment_from_model(model, 0, cut), segment_from_model(model, cut)
        in_head, in_tail = inject_into(head), inject_into(tail)
        assert in_head.keys() | in_tail.keys() == expected.keys()
        split_backward(head, tail, "right")
        assert_same_gradients(in_head | in_tail, expected)

        head.zero_grad()
        whole.zero_grad()
        split_backward(head, whole, "right", entry=cut)
        entered = {name: p for name, p in in_whole.items() if block_of(name) >= cut}
        assert_same_gradients(in_head | entered, expected)
        assert all(p.grad is None for name, p in in_whole.items() if block_of(name) < cut)


def test_gradient_checkpointing_changes_nothing(architecture: str) -> None:
    model = tiny_model(architecture)
    gradients = []
    for checkpointing in (False, True):
        head, tail = segment_from_model(model, 0, 2), segment_from_model(model)
        adapters = {**inject_into(head), **{f"tail {k}": v for k, v in inject_into(tail).items()}}
        head.gradient_checkpointing = tail.gradient_checkpointing = checkpointing
        split_backward(head, tail, "left", entry=2)
        gradients.append({k: v.grad for k, v in adapters.items() if v.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


def test_gradient_checkpointing_keeps_the_inputs_of_blocks_alone() -> None:
    head = segment_from_model(tiny_model("llama"), 0, 3)
    inject_into(head)
    kept = []
    for head.gradient_checkpointing in (False, True):
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = head(torch.randint(0, 90, (4, 32)), torch.ones(4, 32, dtype=torch.long))
        assert hidden.requires_grad
        kept.append(sum(storages.values()))
    assert kept[1] < 0.4 * kept[0]


# --- names -----------------------------------------------------------------------------------------------------


def test_linear_modules_have_whole_model_names_also_after_peft(architecture: str) -> None:
    model = tiny_model(architecture)
    weights = {name: model.get_submodule(name).weight for name in names_in_blocks(model)}
    cut = 3
    for start, stop in ((0, cut), (cut, NUM_BLOCKS), (0, NUM_BLOCKS)):
        segment = segment_from_model(model, start, stop)
        expected = [name for name in weights if start <= block_of(name) < stop]
        before = segment.linear_modules()
        assert list(before) == expected
        inject_into(segment)
        after = segment.linear_modules()
        assert list(after) == expected
        for name in expected:
            assert after[name] is before[name]
            assert torch.equal(after[name].weight, weights[name])  # type: ignore[arg-type]
            assert segment.global_name(segment.local_name(name)) == name


def test_block_of_and_local_name() -> None:
    assert block_of("model.layers.11.self_attn.q_proj") == 11
    assert block_of("transformer.h.0.mlp.c_fc") == 0
    assert block_of("model.layers.3.mlp.experts.7.up_proj") == 3
    with pytest.raises(ConfigError, match=r"Expected a module inside a block.*'lm_head'"):
        block_of("lm_head")
    tail = segment_from_model(tiny_model("llama"), 3)
    assert tail.local_name("model.layers.3.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert tail.local_name("lm_head") == "lm_head"
    with pytest.raises(ConfigError, match=r"in the blocks 3\.\.3, found 'model\.layers\.2\.mlp"):
        tail.local_name("model.layers.2.mlp.up_proj")


def test_layout_finds_what_is_used_before_and_after_the_blocks(architecture: str) -> None:
    layout = find_layout(build_skeleton(tiny_config(architecture, tied=False), torch.float32))
    blocks, prelude, postlude = PARTS[architecture]
    assert (layout.blocks, layout.num_blocks) == (blocks, NUM_BLOCKS)
    assert layout.prelude == prelude
    assert layout.postlude == postlude


# --- from disk -------------------------------------------------------------------------------------------------


def expected_bytes(model: PreTrainedModel, name: str, start: int, stop: int) -> int:
    """Of the tensors that blocks [start, stop) need by `PARTS`; a tied pair held twice counts once."""
    blocks, prelude, postlude = PARTS[name]
    owners = {f"{blocks}.{i}." for i in range(start, stop)}
    owners |= {f"{module}." for module in prelude if start == 0}
    owners |= {f"{module}." for module in postlude if stop == NUM_BLOCKS}
    held = {key: p for key, p in model.state_dict().items() if key.startswith(tuple(owners))}
    return sum(p.numel() * p.element_size() for p in {p.data_ptr(): p for p in held.values()}.values())


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_loaded_segments_hold_their_own_tensors_only(architecture: str, sharded: bool, tmp_path: Path) -> None:
    model = tiny_model(architecture, tied=sharded)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if sharded else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    files = ModelFiles.resolve(str(tmp_path))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = logits_of(reference)
    segments = {}
    for start, stop in ((0, 2), (2, NUM_BLOCKS), (0, NUM_BLOCKS)):
        segment = segments[start, stop] = load_segment(files, start, stop)
        tensors = [*segment.parameters(), *segment.buffers()]
        assert all(tensor.device.type == "cpu" for tensor in tensors)
        held = sum(p.numel() * p.element_size() for p in segment.parameters())
        assert held == expected_bytes(model, architecture, start, stop), (start, stop)
        assert not any(p.requires_grad for p in segment.parameters())
        assert not segment.training
    assert torch.equal(split_logits(segments[0, 2], segments[2, NUM_BLOCKS]), expected)
    assert torch.equal(split_logits(segments[0, 2], segments[0, NUM_BLOCKS], entry=2), expected)


def test_bfloat16_segments_equal_the_bfloat16_model(architecture: str, tmp_path: Path) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    files = ModelFiles.resolve(str(tmp_path))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    head = load_segment(files, 0, 2, dtype=torch.bfloat16)
    tail = load_segment(files, 2, dtype=torch.bfloat16)
    assert {p.dtype for s in (head, tail) for p in s.parameters()} == {torch.bfloat16}
    assert torch.equal(split_logits(head, tail), logits_of(reference))


def test_a_bfloat16_checkpoint_loads_as_float32(tmp_path: Path) -> None:
    tiny_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    files = ModelFiles.resolve(str(tmp_path))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(split_logits(load_segment(files, 0, 1), load_segment(files, 1)), logits_of(reference))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rotary_buffers_are_those_of_from_pretrained(rope: dict[str, object], tmp_path: Path) -> None:
    config = tiny_config("llama", tied=False)
    config.rope_parameters = rope
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    files = ModelFiles.resolve(str(tmp_path))
    head, tail = load_segment(files, 0, 2), load_segment(files, 2)
    for segment in (head, tail):
        for name, buffer in segment.model.named_buffers():
            assert torch.equal(buffer, reference.get_buffer(name)), name
    assert torch.equal(split_logits(head, tail), logits_of(reference))


def test_tied_embeddings_are_one_parameter_in_the_whole_segment(tmp_path: Path) -> None:
    tiny_model("llama", tied=True).save_pretrained(tmp_path)
    model = load_segment(ModelFiles.resolve(str(tmp_path)), dtype=torch.bfloat16).model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_parameters_can_be_replaced_and_the_file_stays_as_it_was(tmp_path: Path) -> None:
    """What merging does: a new tensor in place of the mapped one."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    files = ModelFiles.resolve(str(tmp_path))
    head = load_segment(files, 0, 1)
    name, layer = next(iter(head.linear_modules().items()))
    assert isinstance(layer.weight, nn.Parameter)
    stored = files.read(f"{name}.weight").clone()
    assert layer.weight.data_ptr() == files.read(f"{name}.weight").data_ptr(), "expected a mapped view"
    layer.weight.data = layer.weight.data + 1.0
    with torch.no_grad():
        model.get_submodule(name).weight.add_(1.0)
    assert torch.equal(split_logits(head, segment_from_model(model, 1)), logits_of(model))
    assert torch.equal(files.read(f"{name}.weight"), stored)


# --- no state --------------------------------------------------------------------------------------------------


def test_threads_may_enter_one_segment_at_different_blocks() -> None:
    model = tiny_model("gemma3_text")
    whole = segment_from_model(model)
    heads = {cut: segment_from_model(model, 0, cut) for cut in CUTS}
    wrong: list[object] = []
    start = threading.Barrier(len(heads))

    def run(cut: int) -> None:
        padding = PADDINGS[cut % 3]
        expected = logits_of(model, padding)
        start.wait(timeout=10)
        for _ in range(20):
            if not torch.equal(split_logits(heads[cut], whole, padding, entry=cut), expected):
                wrong.append(cut)

    threads = [threading.Thread(target=run, args=(cut,)) for cut in heads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert wrong == []


def test_a_forward_pass_leaves_the_segment_as_it_was() -> None:
    segment = segment_from_model(tiny_model("gemma2"))
    ids, mask = batch("left")
    modules, config = list(segment.named_modules()), segment.config.to_dict()
    segment(segment_from_model(tiny_model("gemma2"), 0, 3)(ids, mask), mask, entry=3)
    assert list(segment.named_modules()) == modules
    assert segment.config.to_dict() == config


def test_activations_are_freed_as_soon_as_the_caller_drops_them() -> None:
    """The pass of a head ends by an exception: its traceback must not keep the activations alive."""
    head = segment_from_model(tiny_model("llama"), 0, 2)
    ids, mask = batch("none")
    gc.collect()
    gc.disable()
    try:
        hidden = head(ids, mask)
        watched = weakref.ref(hidden)
        del hidden
        assert watched() is None
    finally:
        gc.enable()


def test_cutting_a_model_in_memory_shares_its_tensors_and_leaves_it_alone() -> None:
    model = tiny_model("llama")
    before = list(model.named_modules())
    segment = segment_from_model(model, 2)
    inject_into(segment)
    assert list(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())
    name, layer = next(iter(segment.linear_modules().items()))
    assert layer.weight.data_ptr() == model.get_submodule(name).weight.data_ptr()  # type: ignore[operator]


def test_train_mode_reaches_dropout_in_the_blocks() -> None:
    config = tiny_config("gpt2", tied=True)
    config.resid_pdrop = 0.5
    torch.manual_seed(0)
    head = segment_from_model(AutoModelForCausalLM.from_config(config), 0, 2)
    ids, mask = batch("none")
    assert torch.equal(head(ids, mask), head(ids, mask))
    head.train()
    assert not torch.equal(head(ids, mask), head(ids, mask))


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])  # of these only one calls the hidden size by that name
def test_sizes_come_from_the_config(name: str) -> None:
    tail = segment_from_model(tiny_model(name), 1)
    assert (tail.num_blocks, tail.start, tail.stop) == (NUM_BLOCKS, 1, NUM_BLOCKS)
    assert (tail.hidden_size, tail.vocab_size) == (32, VOCAB_SIZE)
    assert tail.config.num_hidden_layers == NUM_BLOCKS


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (-1, 2), (2, 2), (3, 2), (0, 5), (4, None)])
def test_blocks_out_of_range_are_refused(start: int, stop: int | None) -> None:
    with pytest.raises(ConfigError, match=r"Expected blocks 0 <= start < stop <= 4, found .*lies in 1\.\.3"):
        segment_from_model(tiny_model("llama"), start, stop)


def test_inputs_that_do_not_fit_the_entry_are_refused() -> None:
    model = tiny_model("llama")
    ids, mask = batch("none")
    hidden = torch.zeros(3, 11, 32)
    head, tail = segment_from_model(model, 0, 2), segment_from_model(model, 2)
    with pytest.raises(ConfigError, match=r"entry in this segment's blocks 2\.\.3, found 1"):
        tail(hidden, mask, entry=1)
    with pytest.raises(ConfigError, match=r"blocks 0\.\.1, found 2"):
        head(hidden, mask, entry=2)
    with pytest.raises(ConfigError, match=r"smashed activations \(B, T, 32\) for block 2, found \(3, 11\)"):
        tail(ids, mask)
    with pytest.raises(ConfigError, match=r"smashed activations \(B, T, 32\) for block 3, found \(3, 11, 8\)"):
        tail(hidden[..., :8], mask, entry=3)
    with pytest.raises(ConfigError, match=r"Expected input_ids \(B, T\) of integers, found \(3, 11, 32\)"):
        head(hidden, mask)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(num_layers=2), "found the encoder-decoder model 't5'"),
        (BertConfig(num_hidden_layers=2), "found 'bert', whose tokens attend to later ones"),
        (ViTConfig(), "AutoModelForCausalLM knows, found the model type 'vit'"),
    ],
)
def test_models_that_are_not_causal_are_refused(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        build_skeleton(config, torch.float32)


def test_an_encoder_decoder_model_in_memory_is_refused() -> None:
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=16, d_ff=16, d_kv=4, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(UnsupportedModelError, match="Expected a decoder-only causal language model"):
        segment_from_model(T5ForConditionalGeneration(config), 0, 1)


def test_a_model_without_a_list_of_its_blocks_is_refused() -> None:
    skeleton = build_skeleton(LlamaConfig(num_hidden_layers=3, hidden_size=16, num_attention_heads=2), torch.float32)
    skeleton.model.layers = nn.Sequential(*skeleton.model.layers)
    with pytest.raises(UnsupportedModelError, match=r"one ModuleList with the 3 blocks of LlamaForCausalLM, found"):
        find_layout(skeleton)


def test_a_model_without_an_lm_head_is_refused() -> None:
    skeleton = build_skeleton(tiny_config("llama", tied=False), torch.float32)
    with pytest.raises(UnsupportedModelError, match="Expected an LM head after the blocks of LlamaModel"):
        find_layout(skeleton.model)
