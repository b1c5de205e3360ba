"""PEFT's LoRA config as a `LoraSpec`, or why it cannot be one."""

from typing import TYPE_CHECKING

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.spec import LoraSpec

if TYPE_CHECKING:
    from peft import LoraConfig

_ORDINARY_STARTS = (True, "gaussian")
_REASONS = {
    "use_dora": "DoRA normalizes W_0 + B A and scales its columns: such updates of several clients have no exact sum",
    "lora_bias": "a bias of B is no product of factors: only A and B are aggregated",
    "layer_replication": "repeated layers are not those of the model that clients hold",
    "modules_to_save": "modules trained in full do not fit an exchange of adapters; train those of a block by LoRA",
    "target_parameters": "parameters that are no linear layers (fused experts) stay frozen here",
    "trainable_token_indices": "rows of the embeddings are not trained: every head holds them",
    "megatron_config": "Megatron's parallel layers are not cut",
    "lora_dropout": "dropout is the training's: set lora-dropout (TrainingConfig.lora_dropout)",
    "layers_pattern": "blocks are found by the model's own list of them; layers_to_transform alone says which",
    "arrow_config": "routing among adapters is not merged into one model",
    "alora_invocation_tokens": "adapters that begin with a token are not merged into one model",
}
"""option -> why it is refused where it is set"""


def spec_from_peft(config: "LoraConfig") -> LoraSpec:
    """The spec that says what `config` says.

    Raises:
        ConfigError: an option that does not fit exact aggregation, with the reason.
    """
    for option, reason in _REASONS.items():
        if getattr(config, option, None):
            raise ConfigError(f"Expected a LoRA config without {option}, found {getattr(config, option)!r}: {reason}.")
    if config.init_lora_weights not in _ORDINARY_STARTS:
        raise ConfigError(
            f"Expected adapters that start at B = 0, found init_lora_weights={config.init_lora_weights!r}: it takes "
            "the adapter's start out of the base weights (PiSSA, OLoRA, CorDA, EVA, LoftQ), so that heads, tail and "
            "merged model would have different bases. Leave it at True; A is drawn as PEFT draws it by default."
        )
    if config.bias != "none":
        raise ConfigError(f"Expected bias='none', found {config.bias!r}: only A and B are aggregated.")
    targets, excluded, layers = config.target_modules, config.exclude_modules, config.layers_to_transform
    if targets is None:
        raise ConfigError("Expected target_modules, found none. Name them, or use 'all-linear'.")
    return LoraSpec(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        rank_pattern=dict(config.rank_pattern or {}),
        alpha_pattern=dict(config.alpha_pattern or {}),
        exclude_modules=excluded if isinstance(excluded, str) else tuple(sorted(excluded or ())),
        layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers) if layers is not None else None,
        use_rslora=config.use_rslora,
    )
