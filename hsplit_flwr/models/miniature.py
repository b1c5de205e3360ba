"""A miniature of a model: its own class and all of its blocks, narrow, with random weights; made from the config alone.

What a model computes *from what* (which block reads the embeddings, which shares keys with an earlier one) does not
hang on its widths, so a miniature can answer in milliseconds what the model itself would answer in minutes.
"""

import copy
import math
import re
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hsplit_flwr.models.block_layout import build_skeleton

WIDTH = 64
"""of feed-forward layers, and of the hidden states of a model without attention heads"""
VOCABULARY = 128
EXPERTS_CHOSEN = 2
"""per token; what a router chooses from is made as small as its groups allow"""
WINDOW = 4
"""of sliding attention: shorter than the rows of a check, so that a wrong window is seen"""
_FEED_FORWARD = re.compile(r"intermediate|ffn|inner|dff")
_SCALED = re.compile(r"hidden_size|heads$|n_head$|embd|embed|d_model|d_ssm|width")
"""keys of what grows with the number of attention heads; the sizes of single heads do not"""
_EXPERTS = re.compile(r"(num|n_routed|num_local|moe_num)_experts")
_CHOSEN = re.compile(r"num_experts_per_tok(en)?|moe_top_?k|moe_k")


def narrow(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of `config` with few attention heads (mostly two), all widths divided alike, and a small vocabulary.

    All blocks stay. Widths that hang together in a way nobody can see from here may no longer fit: then the model
    of the copy is not built, or does not run.
    """
    small = copy.deepcopy(config)
    factor, experts = _factor(config), 2 * EXPERTS_CHOSEN * _groups(config)
    for key, value in vars(config).items():
        # Into __dict__: an assignment would be validated by itself, while the values must change together.
        small.__dict__[key] = _smaller(key, value, factor, experts)
    return small


def _groups(config: PretrainedConfig) -> int:
    """Groups that a router chooses from before it chooses experts; 1 where there are none."""
    groups = getattr(config, "n_group", None)
    return groups if isinstance(groups, int) and groups > 0 else 1


def _factor(config: PretrainedConfig) -> int:
    """What the widths are divided by."""
    heads, width = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    if isinstance(heads, int) and heads > 0:
        return math.gcd(heads // 2 if heads % 2 == 0 else heads, width)
    return max(1, width // WIDTH) if isinstance(width, int) else 1


def _size(config: PretrainedConfig, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:  # of transformers' own, where each block has its own value
        return None


def _smaller(key: str, value: Any, factor: int, experts: int) -> Any:
    if isinstance(value, PretrainedConfig):
        return narrow(value)
    if isinstance(value, list) and _FEED_FORWARD.search(key):
        return [_smaller(key, one, factor, experts) for one in value]
    if not isinstance(value, int) or isinstance(value, bool) or "position" in key:
        return value
    if key.startswith("vocab_size"):
        return min(value, VOCABULARY)
    if key.endswith("token_id"):
        return min(value, VOCABULARY - 1)
    if _EXPERTS.fullmatch(key):
        return min(value, experts)
    if _CHOSEN.fullmatch(key):
        return min(value, EXPERTS_CHOSEN)
    if key == "sliding_window":
        return min(value, WINDOW)
    if _FEED_FORWARD.search(key):
        return min(value, WIDTH)
    if _SCALED.search(key) and ("head" in key or value % factor == 0):
        return max(1, value // factor)
    return value


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of `config` in float32 and eval mode with random weights, the same at each call.

    Raises:
        UnsupportedModelError: not a decoder-only causal language model.
    """
    model = build_skeleton(config, torch.float32)
    fill(model)
    return model


def fill(model: PreTrainedModel) -> None:
    """Gives every parameter random values that keep activations near 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            values = 1 + 0.1 * noise if parameter.ndim < 2 else noise / parameter.shape[-1] ** 0.5
            module._parameters[leaf] = torch.nn.Parameter(values.to(parameter.dtype))
    model.tie_weights()
