"""Small models for GGUF files, and what such a file says."""

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

VOCABULARY = 1540
"""four rows more than the tokenizer has tokens, as many published models have"""
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "rms_norm_eps": 3e-5,
}
TEXTS = ["The Mill is a pub.", "It's 2,345 metres away!\n\n  Ünïcode 日本 🙂", "<|endoftext|> inside"]


def small(config: Any = None) -> PreTrainedModel:
    torch.manual_seed(5)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config or LlamaConfig(**SMALL)).eval()
    for weight in model.parameters():  # norms of 1 would hide that they are lost
        torch.nn.init.normal_(weight, std=0.3)
    return model


def read(path: Path) -> PreTrainedModel:
    """As transformers reads it, which takes neither GPT-2's positions nor Qwen3's width of heads from the file."""
    said = fields(path)
    options = {"n_positions": said["gpt2.context_length"]} if "gpt2.context_length" in said else {}
    options |= {"head_dim": said["qwen3.attention.key_length"]} if "qwen3.attention.key_length" in said else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **options
    )
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(5, 37)[None]).logits
    return found


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
