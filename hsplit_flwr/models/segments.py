"""Cut a causal language model into segments: a head for a client, a tail for the server.

A segment holds blocks [start, stop) of the model's own class, with the embeddings when ``start == 0`` and
with the final norm and LM head when ``stop == L``. It runs the model's own ``forward``, so masks, positions
and rotary embeddings are computed as in the whole model: the first block receives the smashed activations
instead of whatever reached it, and the pass ends with the last block held. Every architecture goes through
the same code. The cut into a client-side and a server-side model is that of split learning (arXiv:2505.02795).

Shape suffixes: B batch, T tokens, H hidden size, W width of activations (mostly H), V vocabulary.
"""

from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.adaptable import layout_of
from hsplit_flwr.models.block_layout import BlockLayout, block_of, build_skeleton, shift_block
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.quantized import QuantizedLayer, share
from hsplit_flwr.models.token_limits import TokenLimits
from hsplit_flwr.models.views import (
    Absent,
    CheckpointedBlock,
    EntryBlock,
    ExitBlock,
    LastBlockDone,
    graft,
    outermost,
    set_view_config,
    stand_in,
)

__all__ = ["Segment", "block_of", "load_segment", "segment_from_model"]


class Segment(nn.Module):
    """Blocks [start, stop) of a causal language model, frozen.

    ``model`` has the model's own class and *local* names: its block 0 is block ``start`` of the whole model.
    A forward pass changes nothing in it, so several threads may call one segment at once.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, layout: BlockLayout, start: int, stop: int) -> None:
        super().__init__()
        self.model = model
        self.start = start
        self.stop = stop
        self.num_blocks = layout.num_blocks
        self.gradient_checkpointing = False
        """compute each block's activations again in the backward pass instead of keeping them"""
        self._layout = layout
        self._limits = TokenLimits.of(model)
        self._linear_names = layout.linear_layers(model, start)
        plain = (module for module in model.modules() if not isinstance(module, QuantizedLayer))
        weights = (parameter for module in plain for parameter in module.parameters(recurse=False))
        self.dtype = next(weight.dtype for weight in weights if weight.is_floating_point())
        """of the activations, and of the frozen weights that are not quantised"""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    @property
    def config(self) -> PretrainedConfig:
        """The config of the whole model."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """The width W of activations: the hidden size, times the streams of a model that has several."""
        return self._layout.width

    @property
    def vocab_size(self) -> int:
        """The vocabulary size V."""
        return int(self.config.get_text_config().vocab_size)

    def forward(
        self, inputs: Tensor, attention_mask: Tensor, *, entry: int | None = None, until: int | None = None
    ) -> Tensor:
        """Runs the blocks from `entry` on.

        Args:
            inputs: `input_ids` (B, T) if the segment starts with the embeddings and `entry` is None,
                otherwise the smashed activations (B, T, W) that enter before block `entry`, in the segment's
                dtype. On any device.
            attention_mask: (B, T), 1 for tokens and 0 for padding. On any device.
            entry: a block of the segment; its first one by default.
            until: the block before which the pass ends; ``stop`` by default.

        Returns:
            The hidden states (B, T, W) after block ``until - 1``, or the logits (B, T, V) if that is the
            model's last one; on the segment's device.

        Raises:
            ConfigError: `entry` or `until` outside the segment, or `inputs` of the wrong shape for it.
        """
        embed = self.start == 0 and entry is None
        first = self.start if entry is None else entry
        end = self.stop if until is None else until
        self._check(inputs, first, end, embed)
        inputs, attention_mask = inputs.to(self.device), attention_mask.to(self.device)
        view = self._view(first, end, None if embed else inputs)
        tokens = {"input_ids": inputs} if embed else {"inputs_embeds": stand_in(inputs, self._layout.embedding_size)}
        try:
            outputs = view(**tokens, attention_mask=attention_mask, use_cache=False)
        except LastBlockDone as done:
            return done.hidden_BTW
        logits_BTV: Tensor = outputs.logits
        return logits_BTV

    def check_tokens(self, input_ids: Tensor, labels: Tensor | None = None) -> None:
        """Looks at a batch (B, T) before the embeddings do; for segments that hold them. See `TokenLimits.check`.

        Raises:
            ConfigError: a row is longer than the model's positions, or an id or a label is none of its vocabulary.
        """
        self._limits.check(input_ids, labels)

    def _check(self, inputs: Tensor, first: int, end: int, embed: bool) -> None:
        if not self.start <= first < self.stop:
            raise ConfigError(
                f"Expected an entry in this segment's blocks {self.start}..{self.stop - 1}, "
                f"found {first}. Load a segment that holds that block."
            )
        if not first < end <= self.stop:
            raise ConfigError(f"Expected a pass that ends in {first + 1}..{self.stop}, found until={end}.")
        if embed and (inputs.ndim != 2 or inputs.is_floating_point()):
            raise ConfigError(
                f"Expected input_ids (B, T) of integers, found {tuple(inputs.shape)} {inputs.dtype}. "
                "Pass entry=0 to let activations enter before block 0."
            )
        if not embed and (inputs.ndim != 3 or inputs.shape[-1] != self.hidden_size):
            raise ConfigError(
                f"Expected smashed activations (B, T, {self.hidden_size}) for block {first}, "
                f"found {tuple(inputs.shape)}. Only a segment with the embeddings takes input_ids."
            )

    def _view(self, first: int, end: int, smashed_BTW: Tensor | None) -> nn.Module:
        """The model with blocks first..end-1 only, fed from `smashed_BTW` and ended after the last one."""
        held = self.model.get_submodule(self._layout.blocks)
        blocks: list[nn.Module] = list(held.children())[first - self.start : end - self.start]
        if self.gradient_checkpointing:
            blocks = [CheckpointedBlock(block) for block in blocks]
        replacements: dict[str, nn.Module] = {}
        if smashed_BTW is not None:
            blocks[0] = EntryBlock(blocks[0], smashed_BTW, self._layout.streams)
            replacements |= {name: Absent() for name in outermost(self._layout.prelude)}
        if end < self.num_blocks:
            blocks[-1] = ExitBlock(blocks[-1])
        view = graft(self.model, {**replacements, self._layout.blocks: nn.ModuleList(blocks)})
        set_view_config(view, self._layout.blocks, first, end)
        return view

    def linear_modules(self) -> dict[str, nn.Module]:
        """Whole-model name -> linear layer (``nn.Linear`` or ``Conv1D``) of the blocks held, in their order.

        Only those that take an adapter (`adaptable`); the base layer, also after PEFT has put a LoRA layer around it.
        """
        layers = {name: self.model.get_submodule(self.local_name(name)) for name in self._linear_names}
        return {
            name: layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            for name, layer in layers.items()
        }

    def local_name(self, name: str) -> str:
        """The name in ``self.model`` of what the whole model calls `name`.

        Raises:
            ConfigError: it lies in a block that this segment does not hold.
        """
        if name.startswith(f"{self._layout.blocks}."):
            block = block_of(name)
            if not self.start <= block < self.stop:
                raise ConfigError(
                    f"Expected a name in the blocks {self.start}..{self.stop - 1}, found {name!r}. "
                    "Ask the segment that holds that block."
                )
        return shift_block(name, self._layout.blocks, -self.start)

    def global_name(self, name: str) -> str:
        """The whole-model name of what ``self.model`` calls `name`."""
        return shift_block(name, self._layout.blocks, self.start)


def load_segment(
    source: ModelFiles,
    start: int = 0,
    stop: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Segment:
    """Blocks [start, stop) from disk; `stop` is L by default.

    Only the segment's own tensors are read. On the CPU those already stored in `dtype` are mapped, not
    copied: give a parameter a new tensor (``p.data = ...``) rather than write into it. Where the base is quantised
    (`ModelFiles.quantized_by`), its layers compute in `dtype`, and are quantised one after the other.

    Raises:
        ConfigError: blocks out of range, or a quantised base without bitsandbytes.
        UnsupportedModelError: the model cannot be cut, or a tensor is missing.
    """
    skeleton = source.skeleton(dtype)
    if (generation := source.generation_config()) is not None:
        skeleton.generation_config = generation  # the merged model is written with it

    def read(name: str) -> Tensor:
        return source.read(name, dtype).to(device)

    def quantize(layer: QuantizedLayer, name: str) -> None:
        layer.load(source.read(name, dtype), source.statistics(name), device)

    def prepare(whole: PreTrainedModel) -> None:
        if source.quantization:
            source.quantization.place(whole, dtype)

    return _cut(skeleton, start, stop, _Weights(source, read, quantize, prepare), device)


def segment_from_model(model: PreTrainedModel, start: int = 0, stop: int | None = None) -> Segment:
    """Blocks [start, stop) of a model in memory. Shares its tensors; `model` itself stays as it is.

    Raises:
        ConfigError: blocks out of range.
        UnsupportedModelError: the model cannot be cut.
    """
    weights = model.state_dict()
    skeleton = build_skeleton(model.config, model.dtype)
    skeleton.generation_config = model.generation_config
    prepare = partial(share, model)
    return _cut(skeleton, start, stop, _Weights(weights, weights.__getitem__, _as_it_is, prepare), model.device)


def _as_it_is(layer: QuantizedLayer, name: str) -> None:
    """A quantised layer that is shared is loaded."""


class _Weights(NamedTuple):
    """Where a segment's tensors come from."""

    stored: Container[str]
    read: Callable[[str], Tensor]
    quantize: Callable[[QuantizedLayer, str], None]
    """gives a layer its weight, by that weight's name"""
    prepare: Callable[[PreTrainedModel], None]
    """puts quantised layers into the whole model"""


def _cut(
    skeleton: PreTrainedModel, start: int, stop: int | None, weights: _Weights, device: torch.device | str
) -> Segment:
    layout = layout_of(skeleton)
    stop = layout.num_blocks if stop is None else stop
    if not 0 <= start < stop <= layout.num_blocks:
        raise ConfigError(
            f"Expected blocks 0 <= start < stop <= {layout.num_blocks}, found start={start}, stop={stop}. "
            f"A split point of this model lies in 1..{layout.num_blocks - 1}."
        )
    weights.prepare(skeleton)
    kept = list(skeleton.get_submodule(layout.blocks).children())[start:stop]
    skeleton.set_submodule(layout.blocks, nn.ModuleList(kept))
    if start > 0:
        _drop(skeleton, layout.prelude)
    if stop < layout.num_blocks:
        _drop(skeleton, layout.postlude)
    segment = Segment(skeleton, layout, start, stop)
    _fill(segment, weights)
    return segment.to(device).eval()


def _drop(model: nn.Module, names: frozenset[str]) -> None:
    for name in outermost(names):
        model.set_submodule(name, Absent())


def _fill(segment: Segment, weights: _Weights) -> None:
    """Gives every parameter of the segment, and every stored buffer, the tensor of its whole-model name."""
    ties: Mapping[str, str] = segment.model.all_tied_weights_keys
    parameters: dict[str, nn.Parameter] = {}
    for prefix, module in segment.model.named_modules():
        for leaf, _ in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            name = segment.global_name(f"{prefix}.{leaf}".lstrip("."))
            if leaf == "weight" and isinstance(module, QuantizedLayer):
                weights.quantize(module, name)
                continue
            source = ties.get(name, name)
            if source not in parameters:
                parameters[source] = nn.Parameter(weights.read(source), requires_grad=False)
            module._parameters[leaf] = parameters[source]
        for leaf in module._buffers.keys() - module._non_persistent_buffers_set:
            name = segment.global_name(f"{prefix}.{leaf}".lstrip("."))
            if name in weights.stored:
                module._buffers[leaf] = weights.read(name)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, whichever way it stores its weight."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    weight = layer.weight
    assert isinstance(weight, Tensor)
    d_in, d_out = weight.shape
    return d_out, d_in


def linear_shapes(segment: Segment) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear layer of the segment, by whole-model module name."""
    return {name: linear_shape(layer) for name, layer in segment.linear_modules().items()}
