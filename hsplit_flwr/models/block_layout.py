"""Where a causal language model can be cut: its blocks, and what it uses before and after them.

Nothing here knows an architecture. The blocks are the one ``ModuleList`` with as many entries as the config
has layers; the *prelude* (embeddings and the like) is what a forward pass touches before the first block; all
else outside the blocks is the *postlude* (final norm, LM head).
"""

import copy
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.models.views import graft, path_to

PATCHING = threading.Lock()
"""Held while nn.Module is patched to build on the meta device: building real modules in another thread must wait."""
_LARGE = 1 << 20
"""elements of a tensor that is not allocated while a skeleton is built"""


@dataclass(frozen=True)
class BlockLayout:
    """The parts of one architecture, as names of modules of the whole model."""

    blocks: str
    """the ``ModuleList`` of the blocks, such as ``model.layers``"""
    num_blocks: int
    """L"""
    prelude: frozenset[str]
    """modules with parameters used before the blocks: embeddings, position embeddings, their norm, ..."""
    postlude: frozenset[str]
    """all other modules with parameters outside the blocks: final norm, LM head, ..."""
    passive: frozenset[str] = frozenset()
    """linear layers of the blocks that take no adapter (`adaptable`)"""

    def linear_layers(self, model: nn.Module, start: int = 0) -> list[str]:
        """Whole-model names of the linear layers in the blocks of `model` that take an adapter, in its order.

        Args:
            model: the whole model, or one that holds the blocks from `start` on.
            start: its first block.
        """
        names = [
            shift_block(name, self.blocks, start)
            for name, module in model.named_modules()
            if name.startswith(f"{self.blocks}.") and isinstance(module, nn.Linear | Conv1D)
        ]
        return [name for name in names if name not in self.passive]


def block_of(name: str) -> int:
    """The index of the block that the whole-model name `name` lies in: ``model.layers.7.mlp.up_proj`` -> 7.

    Raises:
        ConfigError: the name has no block index.
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if found is None:
        raise ConfigError(
            f"Expected a module inside a block, such as 'model.layers.7.mlp.up_proj', found {name!r}. "
            "Only modules inside blocks carry adapters."
        )
    return int(found.group(1))


class _LargeOnMeta(TorchFunctionMode):
    """Large tensors without values have no storage: accelerate moves a parameter away only once it is there.

    The fused experts of one block of DeepSeek-V3 would ask for 30 GB. Smaller ones stay as they are, so that buffers
    that a model fills in are computed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and "device" not in kwargs:
            size = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
            if all(isinstance(side, int) for side in size) and math.prod(size) >= _LARGE:
                return func(*args, **kwargs, device="meta")
        return func(*args, **kwargs)


def shift_block(name: str, blocks: str, by: int) -> str:
    """`name` with its index among the `blocks` moved; names of what lies elsewhere stay."""
    if not name.startswith(f"{blocks}."):
        return name
    index, dot, rest = name[len(blocks) + 1 :].partition(".")
    return f"{blocks}.{int(index) + by}{dot}{rest}"


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Models built inside have parameters without storage; buffers (rotary frequencies) are computed."""
    with PATCHING, init_empty_weights(include_buffers=False), _LargeOnMeta():  # patches nn.Module for all threads
        yield


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model of `config` in eval mode, with its parameters on the meta device.

    Raises:
        UnsupportedModelError: not a decoder-only causal language model.
    """
    _require_causal_lm(config)
    with parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return model.eval()


def _require_causal_lm(config: PretrainedConfig) -> None:
    kind = config.model_type
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise UnsupportedModelError(
            f"Expected weights in fp32, bf16 or fp16, found a {kind!r} checkpoint quantised by {method} "
            "(quantization_config in config.json). Take the checkpoint that it was made from, or dequantise it with "
            "transformers and write it with save_pretrained."
        )
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"Expected a decoder-only causal language model, found the encoder-decoder model {kind!r}. "
            "Choose a model with one stack of blocks, such as GPT-2 or LLaMA."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"Expected a model that AutoModelForCausalLM knows, found the model type {kind!r}. "
            "Choose a decoder-only causal language model."
        )
    if config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"Expected a language model, found {kind!r}, which has parts for other inputs beside it. "
            "Choose a checkpoint of its text model alone."
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"Expected a causal language model, found {kind!r}, whose tokens attend to later ones. "
            "Choose a causal model, or set is_decoder=True if this one was trained as a decoder."
        )


def find_layout(skeleton: PreTrainedModel) -> BlockLayout:
    """The layout of a model from `build_skeleton`.

    The parameters outside its blocks become zeros that share one element, so that the model runs.

    Raises:
        UnsupportedModelError: the blocks, the embeddings or the LM head were not found.
    """
    blocks, num_blocks = _find_blocks(skeleton)
    on_path = path_to(blocks)
    outside = {
        name: module
        for name, module in skeleton.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and name not in on_path
        and not name.startswith(f"{blocks}.")
    }
    prelude = _used_before_blocks(skeleton, blocks, num_blocks, outside)
    layout = BlockLayout(blocks, num_blocks, prelude, frozenset(outside) - prelude)
    _require_both_ends(skeleton, layout)
    return layout


def _require_both_ends(skeleton: PreTrainedModel, layout: BlockLayout) -> None:
    kind = type(skeleton).__name__
    names = {module: name for name, module in skeleton.named_modules()}
    if names.get(skeleton.get_input_embeddings()) not in layout.prelude:
        raise UnsupportedModelError(
            f"Expected input embeddings before the blocks of {kind}, found {sorted(layout.prelude)}. "
            "Choose a model that embeds its tokens before the first block."
        )
    if names.get(skeleton.get_output_embeddings()) not in layout.postlude:
        raise UnsupportedModelError(
            f"Expected an LM head after the blocks of {kind}, found {sorted(layout.postlude)}. "
            "Choose a model whose get_output_embeddings() is a module of its own."
        )


def _find_blocks(skeleton: PreTrainedModel) -> tuple[str, int]:
    num_blocks = skeleton.config.get_text_config().num_hidden_layers
    decoder = skeleton.get_decoder()
    prefix = next(name for name, module in skeleton.named_modules() if module is decoder)
    lengths = {
        f"{prefix}.{name}".lstrip("."): len(module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and not re.search(r"\.\d+\.", name)
    }
    found = [name for name, length in lengths.items() if length == num_blocks]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"Expected one ModuleList with the {num_blocks} blocks of {type(skeleton).__name__}, "
            f"found {lengths}. Choose a model whose decoder is a single stack of blocks."
        )
    return found[0], num_blocks


class _FirstBlockReached(Exception):  # noqa: N818  (a signal, not an error)
    pass


class _StopAtBlock(nn.Module):
    """Stands in for a block while the prelude is observed."""

    def forward(self, *_args: Any, **_kwargs: Any) -> None:
        raise _FirstBlockReached


class _ArgumentsSeen(TorchFunctionMode):
    """Notes the arguments of every torch function: unlike module hooks, also parameters used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ids.update(map(id, args))
        self.ids.update(map(id, (kwargs or {}).values()))
        return func(*args, **(kwargs or {}))


def _used_before_blocks(
    skeleton: PreTrainedModel, blocks: str, num_blocks: int, outside: Mapping[str, nn.Module]
) -> frozenset[str]:
    # A real pass rather than one on the meta device, where code that looks at a mask's values fails.
    for module in [*outside.values(), *map(skeleton.get_submodule, path_to(blocks))]:
        _use_zeros(module)
    stand_ins = nn.ModuleList(_StopAtBlock() for _ in range(num_blocks))
    view = graft(skeleton, {blocks: stand_ins})
    tokens = torch.zeros(1, 2, dtype=torch.long)
    seen = _ArgumentsSeen()
    try:
        with torch.no_grad(), seen:
            view(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except _FirstBlockReached:
        return frozenset(
            name
            for name, module in outside.items()
            if any(id(parameter) in seen.ids for parameter in module.parameters(recurse=False))
        )
    except Exception as error:
        raise _not_run(skeleton, blocks, f"a pass that failed before them ({error!r})") from error
    raise _not_run(skeleton, blocks, "a pass without them")


def _not_run(skeleton: PreTrainedModel, blocks: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Expected {type(skeleton).__name__} to run the blocks in {blocks!r}, found {found}. "
        "Choose a model whose decoder calls its blocks one after another."
    )


def _use_zeros(module: nn.Module) -> None:
    """Gives the module's own parameters a value that takes no memory: one zero, expanded."""
    for leaf, parameter in module.named_parameters(recurse=False):
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        module._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)
