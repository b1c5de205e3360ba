"""How llama.cpp lays out the weights of a model type, and what it has to know of its config.

As its own converter does (``convert_hf_to_gguf.py``); what it would compute otherwise than transformers is refused.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.models.gguf_rope import FREQUENCIES, rope_divisors, rope_figures

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ELSE = "Convert its merged_model with llama.cpp's convert_hf_to_gguf.py."

Figure = int | float | str


class Layout(Protocol):
    """The weights and figures of one architecture of llama.cpp."""

    architecture: str
    """by llama.cpp's name"""

    def figures(self, config: "PretrainedConfig") -> Mapping[str, Figure]:
        """What a file says of the model, by the key after ``ARCHITECTURE.``

        Raises:
            UnsupportedModelError: the architecture has no such models.
        """
        ...

    def arranged(self, name: str, weight: Tensor, config: "PretrainedConfig") -> Tensor:
        """`weight` of the parameter `name` with rows and columns as llama.cpp wants them."""
        ...

    def further(self, config: "PretrainedConfig") -> Iterator[tuple[str, Tensor]]:
        """Tensors that are no parameters, by llama.cpp's name (float32)."""
        ...


class _GatedLayout:
    """What LLaMA and Qwen have alike: rotary positions, and feed-forward layers with a gate."""

    def figures(self, config: "PretrainedConfig") -> dict[str, Figure]:
        """See `Layout`."""
        window = getattr(config, "sliding_window", None)
        _require("hidden_act", config.hidden_act, "silu", config.hidden_act == "silu")
        for bias in ("attention_bias", "mlp_bias"):
            _require(bias, getattr(config, bias, False), False, not getattr(config, bias, False))
        fits = window is None or window >= config.max_position_embeddings
        _require("sliding_window", window, "none within the positions", fits)
        width = _head_width(config)
        return {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "attention.key_length": width,
            "attention.value_length": width,
            "rope.dimension_count": width,
            **rope_figures(config),
            "vocab_size": config.vocab_size,
        }

    def further(self, config: "PretrainedConfig") -> Iterator[tuple[str, Tensor]]:
        """See `Layout`."""
        divisors = rope_divisors(config, _head_width(config))
        if divisors is not None:
            yield FREQUENCIES, divisors


class LlamaLayout(_GatedLayout):
    """LLaMA, and what computes the same: Mistral without a window, SmolLM2."""

    architecture = "llama"

    def arranged(self, name: str, weight: Tensor, config: "PretrainedConfig") -> Tensor:
        """Queries and keys, whose pairs for rotation stand side by side in llama.cpp and half a head apart here."""
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is None:
            return weight
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape)


class QwenLayout(_GatedLayout):
    """Qwen2, whose queries, keys and values have biases, and Qwen3, whose queries and keys are normalized."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def figures(self, config: "PretrainedConfig") -> dict[str, Figure]:
        """See `Layout`."""
        kind = (config.rope_parameters or {}).get("rope_type", "default")
        _require("rope_type", kind, "default, linear or yarn", kind != "llama3")
        return super().figures(config)

    def arranged(self, name: str, weight: Tensor, config: "PretrainedConfig") -> Tensor:
        """As it is: llama.cpp rotates pairs that are half a head apart here, too."""
        return weight


class Gpt2Layout:
    """GPT-2, which keeps its weights transposed."""

    architecture = "gpt2"

    def figures(self, config: "PretrainedConfig") -> dict[str, Figure]:
        """See `Layout`."""
        act = config.activation_function
        _require("activation_function", act, "gelu_new", act in ("gelu_new", "gelu_pytorch_tanh"))
        plain = bool(config.scale_attn_weights) and not config.scale_attn_by_inverse_layer_idx
        _require("scale_attn_by_inverse_layer_idx", not plain, False, plain)
        return {
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "block_count": config.n_layer,
            "feed_forward_length": config.n_inner or 4 * config.n_embd,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
            "vocab_size": config.vocab_size,
        }

    def arranged(self, name: str, weight: Tensor, config: "PretrainedConfig") -> Tensor:
        """Linear layers of the blocks as (d_out, d_in)."""
        conv = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        return weight.T if conv else weight

    def further(self, config: "PretrainedConfig") -> Iterator[tuple[str, Tensor]]:
        """None."""
        return iter(())


LAYOUTS: Mapping[str, Layout] = {
    "llama": LlamaLayout(),
    "mistral": LlamaLayout(),
    "qwen2": QwenLayout("qwen2"),
    "qwen3": QwenLayout("qwen3"),
    "gpt2": Gpt2Layout(),
}
"""by transformers' ``model_type``"""


def layout_of(config: "PretrainedConfig") -> Layout:
    """The layout of a model.

    Raises:
        UnsupportedModelError: its type has none here.
    """
    if (found := LAYOUTS.get(config.model_type)) is None:
        raise UnsupportedModelError(
            f"Expected a model of one of the types {', '.join(LAYOUTS)} for GGUF, found {config.model_type!r}. {ELSE}"
        )
    return found


def _head_width(config: "PretrainedConfig") -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _require(key: str, found: object, expected: object, holds: bool) -> None:
    if not holds:
        raise UnsupportedModelError(
            f"Expected {key} as {expected} for GGUF, found {found!r}: llama.cpp would compute something else. {ELSE}"
        )
