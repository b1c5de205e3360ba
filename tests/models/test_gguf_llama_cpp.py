"""llama.cpp itself, where the package xllamacpp is: from our files it computes what transformers does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from hsplit_flwr.models.gguf_export import write_gguf
from hsplit_flwr.models.gguf_tokenizer import QWEN_2
from tests.helpers.chats import tokenizer
from tests.helpers.gguf_files import SMALL, VOCABULARY, small
from tests.models.test_gguf_export import BYTES, cutting
from tests.models.test_gguf_rope import LLAMA_31, scaled
from tests.models.test_gguf_sentencepiece import TEXTS, like_llama_2, random_texts

xllamacpp = pytest.importorskip("xllamacpp")

TOLERANCE = 0.02
"""of log-probabilities between -2 and -6, whose attention llama.cpp computes in half precision (0.017 was seen)"""
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
PLAIN = {**SMALL, **SIZES, "max_position_embeddings": 512}
YARN = {"original_max_position_embeddings": 16}
CONFIGS = {
    "llama": LlamaConfig(**PLAIN),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=512, n_embd=64, n_layer=2, n_head=4),
    "qwen2": Qwen2Config(**PLAIN, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**PLAIN, tie_word_embeddings=True),
    "linear": LlamaConfig(**scaled("linear") | SIZES),
    "yarn": Qwen2Config(**scaled("yarn", **YARN) | SIZES),
    "yarn of LLaMA": LlamaConfig(**scaled("yarn", original_max_position_embeddings=64) | SIZES),
    "llama3": LlamaConfig(**scaled("llama3", 8.0, **LLAMA_31) | SIZES),
}


class LlamaCpp:
    """llama.cpp's server with one file."""

    def __init__(self, path: Path) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(path), 512, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.warmup = False
        self._server = xllamacpp.Server(parameters)

    def likely(self, prompt: str | list[int]) -> dict[int, float] | None:
        """Log-probabilities of the 40 likeliest next tokens; None where the likeliest one is half of a letter."""
        asked = {"prompt": prompt, "max_tokens": 1, "logprobs": 40, "temperature": 0.0, "cache_prompt": False}
        found = self._server.handle_completions(asked)["choices"][0]["logprobs"]
        return {one["id"]: one["logprob"] for one in found["content"][0]["top_logprobs"]} if found else None


def spread(config: PretrainedConfig) -> Any:
    """A model whose next token hangs on the positions of all earlier ones."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            norm = weight.ndim == 1 and "norm" in name
            weight.copy_(
                1 + 0.3 * noise if norm else noise * (1.5 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 0.5)
            )
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_the_model(kind: str, tmp_path: Path) -> None:
    model = spread(CONFIGS[kind])
    write_gguf(model, tokenizer(), tmp_path / "own.gguf")
    llama_cpp, compared = LlamaCpp(tmp_path / "own.gguf"), 0
    for seed in range(4):
        ids = torch.randint(5, 1500, (1, 150), generator=torch.Generator().manual_seed(seed))
        if (found := llama_cpp.likely(ids[0].tolist())) is None:
            continue
        with torch.no_grad():
            expected = model(ids).logits[0, -1].log_softmax(-1)
        compared += 1
        assert max(abs(float(expected[number]) - value) for number, value in found.items()) < TOLERANCE
    assert compared


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "sentencepiece": like_llama_2,
    "gpt-2": tokenizer,
    "qwen2": lambda: cutting([pre_tokenizers.Split(Regex(QWEN_2), behavior="isolated"), BYTES]),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_cuts_texts_as_the_tokenizer(kind: str, tmp_path: Path) -> None:
    """A text, and its ids by the tokenizer, make the same next tokens likely."""
    own = TOKENIZERS[kind]()
    write_gguf(small(LlamaConfig(**PLAIN)), own, tmp_path / "own.gguf")
    llama_cpp, compared = LlamaCpp(tmp_path / "own.gguf"), 0
    for text in [*TEXTS, " begins with a space", *random_texts(60)]:
        found, expected = llama_cpp.likely(text), llama_cpp.likely(own(text, add_special_tokens=False)["input_ids"])
        if found and expected:
            compared += 1
            assert found == pytest.approx(expected, abs=1e-4), text
    assert compared > 40
