"""Where a causal language model can be cut: its blocks, and what it uses before and after them.

Nothing here knows an architecture. The blocks are the one ``ModuleList`` with as many entries as the config
has layers; the *prelude* (embeddings and the like) is what a forward pass touches before the first block; all
else outside the blocks is the *postlude* (final norm, LM head).
"""

import copy
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.models.failures import first_line
from hsplit_flwr.models.prelude import used_before_blocks
from hsplit_flwr.models.quantized import Quantization
from hsplit_flwr.models.views import path_to

PATCHING = threading.Lock()
"""Held while nn.Module is patched to build on the meta device: building real modules in another thread must wait."""
_AUTO_CLASSES = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
)
_LARGE = 1 << 20
"""elements of a tensor that is not allocated while a skeleton is built"""
_INITIALISATIONS = ("normal_", "uniform_", "constant_", "kaiming_uniform_")
"""of `torch.nn.init` and of tensors, those that a mode hears of; transformers has its own of the same names"""


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
    streams: tuple[int, ...]
    """the form of the hidden states at one position: (H,), or (4, H) with four streams (hyper-connections)"""
    embedding_size: int
    """width of what enters in place of the embeddings"""
    passive: frozenset[str] = frozenset()
    """linear layers of the blocks that take no adapter (`adaptable`)"""

    @property
    def width(self) -> int:
        """Values of the activations at one position, W."""
        return math.prod(self.streams)

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
    that a model fills in are computed. What has no storage is not initialised either: torch's functions for it spend
    their time in Python, most of what building a small model takes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _INITIALISATIONS:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
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
        UnsupportedModelError: not a decoder-only causal language model, or one that wants a package that is not here.
    """
    _require_causal_lm(config)
    try:
        with parameters_on_meta():
            model: PreTrainedModel = _auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
    except ImportError as error:  # Gemma 3n's part for images is a model of timm
        raise UnsupportedModelError(
            f"Expected the packages that transformers builds a {config.model_type!r} model with, found that one is "
            f"missing: {first_line(error)}. Install it, or choose another model."
        ) from error
    _auto_class(model.config)  # Emu3's text model goes by a type of its own, which nothing would load again
    if blank := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise UnsupportedModelError(
            f"Expected buffers of a {config.model_type!r} model that are computed as it is built, found {blank[0]} "
            "without values. Choose another architecture."
        )
    return model.eval()


def _auto_class(config: PretrainedConfig) -> Any:
    """The class that makes a model of `config`. One for images and text runs its text part alone where no image is."""
    for auto, mapping in _AUTO_CLASSES:
        if type(config) in mapping:
            return auto
    raise UnsupportedModelError(
        f"Expected a model that AutoModelForCausalLM knows, found the model type {config.model_type!r}. "
        "Choose a decoder-only causal language model."
    )


def _require_causal_lm(config: PretrainedConfig) -> None:
    kind = config.model_type
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        known = Quantization.of_config(config)
        remedy = f', or set quantization = "{known.method}" to train beside it as it is' if known else ""
        raise UnsupportedModelError(
            f"Expected weights in fp32, bf16 or fp16, found a {kind!r} checkpoint quantised by {method} "
            "(quantization_config in config.json). Take the checkpoint that it was made from, or dequantise it with "
            f"transformers and write it with save_pretrained{remedy}."
        )
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"Expected a decoder-only causal language model, found the encoder-decoder model {kind!r}. "
            "Choose a model with one stack of blocks, such as GPT-2 or LLaMA."
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
    prelude, streams = used_before_blocks(skeleton, blocks, outside)
    layout = BlockLayout(
        blocks=blocks,
        num_blocks=num_blocks,
        prelude=prelude,
        postlude=frozenset(outside) - prelude,
        streams=streams,
        embedding_size=_embedding_size(skeleton),
    )
    _require_both_ends(skeleton, layout)
    return layout


def block_kinds(skeleton: PreTrainedModel, layout: BlockLayout) -> list[tuple[Any, ...]]:
    """What tells one block from another: its class, its parameters' shapes and its entries in per-layer settings."""
    config: PretrainedConfig = skeleton.config.get_text_config()
    lists = [v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == layout.num_blocks]
    return [
        (type(block), tuple(p.shape for p in block.parameters()), tuple(repr(values[index]) for values in lists))
        for index, block in enumerate(skeleton.get_submodule(layout.blocks).children())
    ]


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


def _embedding_size(skeleton: PreTrainedModel) -> int:
    return int(skeleton.config.get_text_config().hidden_size)


def _find_blocks(skeleton: PreTrainedModel) -> tuple[str, int]:
    """The ``ModuleList`` of as many entries as the config has layers; the outermost, or the only one there is."""
    config = skeleton.config.get_text_config()
    num_blocks = getattr(config, "num_hidden_layers", None)
    if num_blocks is None:  # as in BLT, a stack between two others
        raise UnsupportedModelError(
            f"Expected a config that says how many blocks {type(skeleton).__name__} has, found {type(config).__name__} "
            "without num_hidden_layers. Choose a model whose decoder is a single stack of blocks."
        )
    lengths = _module_lists(skeleton, skeleton.get_decoder()) or _module_lists(skeleton, skeleton)
    found = [name for name, length in lengths.items() if length == num_blocks] or list(lengths)
    depth = min((name.count(".") for name in found), default=0)
    outermost = [name for name in found if name.count(".") == depth]
    if len(outermost) != 1 or lengths[outermost[0]] < 2:
        raise UnsupportedModelError(
            f"Expected one ModuleList with the {num_blocks} blocks of {type(skeleton).__name__}, "
            f"found {lengths}. Choose a model whose decoder is a single stack of blocks."
        )
    return outermost[0], lengths[outermost[0]]


def _module_lists(skeleton: PreTrainedModel, root: nn.Module) -> dict[str, int]:
    """Name -> length of the module lists in `root` that are in no other one."""
    prefix = next(name for name, module in skeleton.named_modules() if module is root)
    return {
        f"{prefix}.{name}".lstrip("."): len(module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList) and not re.search(r"\.\d+\.", name)
    }
