"""A tiny config of any model type: its own class and settings, with small sizes.

Sizes are known by how configs call them, not by architecture, and go through the config's own constructor, so that
what it derives (types of layers, ranks, head widths) is derived anew. Awkward features stay on: windows shorter than
the rows, unequal heads, groups of experts, both kinds of layer where a model has two.
"""

import re
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

BLOCKS = 4
VOCABULARY = 128
POSITIONS = 64
_BLOCKS = r"num_((hidden|decoder|encoder)_)?layers|n_layers?|(en|de)coder_layers|.*num_hidden_layers|num_blocks"
_SIZES: tuple[tuple[str, int], ...] = (
    (_BLOCKS, BLOCKS),
    (r"(decoder_|unpadded_)?vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"max_(position_embeddings|target_positions)|n_positions|n_ctx|context_length|max_source_positions", POSITIONS),
    (r"sliding_window(_size)?|window_size|attention_window_size|local_attention|keep_window_size|chunk_size", 4),
    (r"attention_chunk_size", 4),
    (r"(num|n|swa_num|decoder|encoder|num_(en|de)coder|conf_num|index_n)?_?(attention_)?heads?|num_attention_heads", 4),
    (r".*attention_heads|index_n_heads|n_mamba_heads|mamba_n(um)?_heads|linear_num_value_heads|num_query_groups", 4),
    (r"linear_num_key_heads", 2),
    (r"linear_num_heads", 4),
    (r"linear_head_dim", 8),
    (
        r"(swa_)?(attention_|linear_key_|linear_value_|index_|qk_rope_|qk_nope_|v_|swa_v_|d_)?head_dim|kv_channels|d_kv|d_head|dim_head",
        8,
    ),
    (r"attention_head_size", 8),
    (r"qk_head_dim|mamba_d_head|mamba_headdim|mamba_head_dim", 16),
    (r"rotary_dim", 8),
    (r".*lora_rank|adapter_rank|laurel_rank|hc_lowrank|.*_rank", 8),
    (r"hidden_size_per_layer_input", 8),
    (r"hidden_size|hidden_size_global|backbone_hidden_size|adapter_(in|out)_dim|adapter_input_size|n_embd|d_model", 32),
    (r"emb_dim|embedding_dim|ple_embed_dim|input_embedding_size|output_embedding_size|lru_width", 32),
    (r"word_embed_proj_dim|embedding_size|router_hidden_size", 16),
    (r"mamba_d_ssm|mamba_intermediate", 64),
    (r".*(intermediate|ffn|inner|dff|d_ff|dim_ff|feed_forward).*", 64),
    (r"(num_|n_routed_|num_local_|moe_num_)experts|num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k|index_topk(_blocks)?", 2),
    (r"n_group|num_(expert_)?group", 2),
    (r"topk_group", 1),
    (r".*n_?groups", 1),
    (r".*(state_size|d_state)", 8),
    (r".*(dt_rank|time_step_rank)", 4),
    (r"first_k_dense_replace|moe_layer_start_index", 1),
    (r".*(_period|_interval|sliding_window_pattern)|global_attn_every_n_layers|layer_group_size", 2),
    (r".*_offset", 1),
    (r"block_size|index_block_size|mamba_chunk_size", 8),
)
"""(how configs call it, its tiny value); the first that matches holds"""
_WITHOUT_LAYER_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_QWEN4 = {
    "ple_layer_ids": [1, 3],
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 4,
    "heads_per_ngram": 2,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "eos_token_id": 1,
}
_GEMMA3N = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * BLOCKS,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], BLOCKS // 2]]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "layer_types": ["mamba", "hybrid"] * 2,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "bert-generation": {"is_decoder": True},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {"layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"]},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "blt": {"encoder_hash_byte_group_vocab": 64, "local_attention_window_len": 4},
    "dbrx": {"d_model": 32, "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "dots3_note": {"vision_config": {"mlp_layer_types": ["dense", "sparse"] * 2}},
    "gemma4_assistant": {"text_config": {**_WITHOUT_LAYER_INPUTS, "num_kv_shared_layers": BLOCKS}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
}
"""what one model type wants beside: sizes that belong together, or have no default"""
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {**_WITHOUT_LAYER_INPUTS, "num_kv_shared_layers": 30}},
}
"""what a model type wants to be made at all, where its own defaults contradict each other"""
_KEY_VALUE_HEADS = re.compile(r"(swa_)?(num_key_value_heads|num_kv_heads|kv_n_heads)")


def tiny_config(model_type: str) -> PretrainedConfig:
    """A tiny config of `model_type`, without dropout that matters (models run in eval mode)."""
    kind = CONFIG_MAPPING[model_type]
    settings = _joined(_tiny(kind(**DEFAULTS.get(model_type, {}))), SETTINGS.get(model_type, {}))
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not kind.is_encoder_decoder:
        settings["is_decoder"] = True  # as for tokens that attend to earlier ones alone
    return kind(**settings)


def _joined(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """`settings` with the `others`, which hold where both say something; so do configs inside."""
    both = {key for key in settings.keys() & others.keys() if isinstance(settings[key], dict)}
    return settings | others | {key: _joined(settings[key], others[key]) for key in both}


def written_as(config: PretrainedConfig, key: str) -> str:
    """What this kind of config calls `key` itself, such as ``n_head``."""
    return str(config.attribute_map.get(key, key))


def _tiny(default: PretrainedConfig) -> dict[str, Any]:
    """Arguments of the constructor that make `default` small."""
    written = {alias: name for name, alias in default.attribute_map.items()}
    heads = vars(default).get(written_as(default, "num_attention_heads"))
    arguments: dict[str, Any] = {}
    for key, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            arguments[key] = _tiny(value)
        elif (small := _tiny_value(key, value, heads)) is not None:
            arguments[written.get(key, key)] = small
    return arguments


def _tiny_value(key: str, value: Any, heads: Any) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return None
    if key.endswith(("token_id", "token_index")):
        return min(value, VOCABULARY - 1)
    if _KEY_VALUE_HEADS.fullmatch(key):
        return 1 if value == 1 else 4 if value == heads else 2
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)
