"""Tiny models with random weights, one per architecture that the tests cover. Nothing is downloaded.

The sizes are small but the awkward features are on: sliding windows shorter than the sequences, mixed layer
types, attention scaled by the layer's index, embeddings narrower than the hidden size, embeddings
scaled in place, ALiBi, soft-capping.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

NUM_BLOCKS = 4
HIDDEN_SIZE = 32
VOCAB_SIZE = 97
PAD_TOKEN_ID = 0

_ALTERNATING = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
    "pad_token_id": PAD_TOKEN_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_GEMMA = {
    **_GATED,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "layer_types": _ALTERNATING,
}

_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **_COMMON,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "llama": _GATED,
    "qwen2": {**_GATED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {
        **_GATED,
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "mistral": {**_GATED, "sliding_window": 4},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {**_GATED, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "sliding_window": 4},
    "opt": {
        **_COMMON,
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": 0.2,
    },
    "gpt_neox": {**_COMMON, "intermediate_size": 48, "hidden_dropout": 0.0},
    "bloom": {**_COMMON, "hidden_dropout": 0.0},
    "ctrl": {**_COMMON, "dff": 48, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "falcon": {**_COMMON, "hidden_dropout": 0.0, "alibi": False, "multi_query": True},
}
ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_config(name: str, tied: bool) -> PretrainedConfig:
    """The config of a tiny model: 4 blocks, hidden size 32, 97 tokens, no dropout."""
    config: PretrainedConfig = AutoConfig.for_model(name, **_CONFIGS[name], tie_word_embeddings=tied)
    return config


def tiny_model(name: str, *, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """The tiny model in float32 and eval mode; biases and norms are random too, so that each one matters."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(name, tied), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def saved_llama(folder: Path, hidden_size: int, intermediate_size: int) -> Path:
    """A LLaMA of `NUM_BLOCKS` blocks of this width with random weights, in `folder`."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
