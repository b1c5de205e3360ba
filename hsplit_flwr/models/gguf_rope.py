"""Rotary positions in a GGUF file: how llama.cpp has them written, and what a file says in transformers' words.

llama.cpp knows linear scaling and YaRN by keys, and the frequencies of Llama 3 by a tensor of what each is divided by.
transformers reads neither, and would compute a long-context model with the wrong angles (`read_rope`).
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hsplit_flwr.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FREQUENCIES = "rope_freqs.weight"
"""llama.cpp's name of the divisors, one for each pair of a head's columns"""
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""what all published models of this kind have; a file has the divisors that follow, not the figures themselves"""
READ = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
"""architectures of files whose scaled positions are read; those of others are per layer, or mean something else"""
SCALINGS = ("default", "linear", "yarn", "llama3")
_YARN = {"original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"}
_KEYS = {
    "linear": {"factor"},
    "yarn": {"factor", "mscale", "mscale_all_dim"} | _YARN,
    "llama3": {"factor", *LLAMA_3},
    "default": set[str](),
}
_MORE_OF_YARN = {"scaling.attn_factor", "scaling.yarn_attn_factor", "scaling.yarn_log_multiplier"}
_SAME_EVERYWHERE = {"rope_type", "type", "rope_theta"}
_CLOSE = 1e-5


def rope_figures(config: "PretrainedConfig") -> dict[str, int | float | str]:
    """What a file says of rotary positions, by the key after ``ARCHITECTURE.``; `rope_divisors` is beside it.

    Raises:
        UnsupportedModelError: llama.cpp has no such positions.
    """
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind not in SCALINGS:
        raise _refused(f"rope_type as one of {', '.join(SCALINGS)}", kind)
    further = {key for key, value in rope.items() if value is not None} - _KEYS[kind] - _SAME_EVERYWHERE
    if further - {"partial_rotary_factor"} or rope.get("partial_rotary_factor") not in (None, 1.0):
        raise _refused(f"rope_parameters of {kind} positions alone", sorted(further))
    needed = {"linear": ["factor"], "yarn": ["factor", "original_max_position_embeddings"]}.get(kind, [])
    if missing := [key for key in needed if rope.get(key) is None]:
        raise _refused(f"{missing[0]} of {kind} positions as a number", None)
    figures: dict[str, int | float | str] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("linear", "yarn"):
        figures |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        _require_llama_cpps_yarn(rope)
        figures["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return figures


def _require_llama_cpps_yarn(rope: Mapping[str, Any]) -> None:
    """llama.cpp scales queries and keys as the YaRN paper says, and has whole columns at the ends of the paper's ramp.

    There are keys for other ends, but it reads them for other architectures alone.
    """
    scale = 0.1 * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
    said = rope.get("attention_factor")
    if said is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        raise _refused("YaRN without mscale", rope["mscale"])
    if said is not None and not math.isclose(said, scale, rel_tol=_CLOSE):
        raise _refused(f"YaRN's attention_factor as {scale:.6g}, which follows from its factor", said)
    for key, usual in (("beta_fast", 32), ("beta_slow", 1)):
        if rope.get(key) not in (None, usual):
            raise _refused(f"YaRN's {key} as {usual}", rope[key])
    if rope.get("truncate", True) is not True:
        raise _refused("YaRN's truncate as True", rope["truncate"])


def rope_divisors(config: "PretrainedConfig", width: int) -> Tensor | None:
    """What llama.cpp divides each of the `width` / 2 frequencies by (float32); None where it needs no tensor for it."""
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    return _llama_3_divisors(rope, width) if rope.get("rope_type") == "llama3" else None


def _llama_3_divisors(rope: Mapping[str, Any], width: int) -> Tensor:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    longer = 2 * int(rope["original_max_position_embeddings"])
    config = LlamaConfig(head_dim=width, rope_parameters=dict(rope), max_position_embeddings=longer)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    plain: Tensor = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    divisors: Tensor = plain / scaled
    return divisors


def read_rope(fields: Mapping[str, Any], divisors: Tensor | None) -> dict[str, Any] | None:
    """``rope_parameters`` of a file; None where they are the default ones, which transformers reads itself.

    Args:
        fields: key -> value of all that the file says.
        divisors: its tensor `FREQUENCIES`, if it has one.

    Raises:
        UnsupportedModelError: positions that transformers has no name for.
    """
    architecture = fields["general.architecture"]
    said = {key.removeprefix(f"{architecture}.rope."): v for key, v in fields.items() if ".rope." in key}
    context = int(fields.get(f"{architecture}.context_length", 0))
    scaling = _read_divisors(divisors) or _read_scaling(said, context)
    rope = {"rope_theta": float(said.get("freq_base", 10_000.0)), **scaling}
    if "rope_type" not in rope:
        return None
    if architecture not in READ:
        raise _unreadable(f"scaled positions of {', '.join(READ)} alone", architecture)
    if divisors is not None and not torch.allclose(_llama_3_divisors(rope, 2 * len(divisors)), divisors, rtol=_CLOSE):
        raise _unreadable(f"frequencies ({FREQUENCIES}) as in Llama 3.1", "others")
    return rope


def _read_divisors(divisors: Tensor | None) -> dict[str, Any]:
    if divisors is None or bool((divisors == 1).all()):
        return {}
    return {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA_3}


def _read_scaling(said: Mapping[str, Any], context: int) -> dict[str, Any]:
    factor = float(said.get("scaling.factor", said.get("scale_linear", 0)))
    kind = said.get("scaling.type", "linear" if factor else "none")  # as llama.cpp reads older files
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise _unreadable("rope.scaling.type as none, linear or yarn", repr(kind))
    if further := sorted(said.keys() & _MORE_OF_YARN):
        raise _unreadable("a factor, and YaRN's two betas, alone", ", ".join(further))
    rope = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(said.get("scaling.original_context_length", context))
        betas = {key: said.get(f"scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
        rope |= {key: float(beta) for key, beta in betas.items() if beta is not None}
    return rope


def _refused(expected: str, found: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Expected {expected} for GGUF, found {found!r}: llama.cpp would compute something else. "
        "Convert its merged_model with llama.cpp's convert_hf_to_gguf.py."
    )


def _unreadable(expected: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Expected {expected} in a GGUF file, found {found}: transformers would compute other positions. Use a "
        "safetensors checkpoint of the model."
    )
