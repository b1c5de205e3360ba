"""Views of a model: cheap copies that share its modules, with some of them replaced.

A view lives for one forward pass. What that pass needs (the activations that enter, where it ends) is in the
view, so the model itself never changes and several threads may run it at once.
"""

import copy
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from hsplit_flwr.errors import UnsupportedModelError


def path_to(name: str) -> list[str]:
    """The name of every module from the root ('') to `name`: ['', 'model', 'model.layers']."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def outermost(names: Iterable[str]) -> list[str]:
    """Those of the module names that lie in no other one."""
    given = set(names)
    return sorted(name for name in given if not given & set(path_to(name)[1:-1]))


def graft(root: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of `root` with the submodules named in `replacements` replaced; all others are shared.

    Only the modules on the way to a replacement are copied, and those shallowly: no tensor is.
    """
    clone = copy.copy(root)
    clone._modules = dict(root._modules)
    nested: dict[str, dict[str, nn.Module]] = {}
    for name, replacement in replacements.items():
        child, _, rest = name.partition(".")
        if rest:
            nested.setdefault(child, {})[rest] = replacement
        else:
            clone._modules[child] = replacement
    for child, inner in nested.items():
        original = root._modules[child]
        assert original is not None
        clone._modules[child] = graft(original, inner)
    return clone


def set_view_config(view: nn.Module, blocks: str, start: int, stop: int) -> None:
    """Gives the modules on the path to the blocks of a `view` a config of the blocks [start, stop) alone.

    `start` and `stop` count blocks of the whole model, which the present config describes. Models loop over
    ``layers[: config.num_hidden_layers]`` and look up ``config.layer_types[i]`` by position, or whether i is among
    ``config.cross_attention_layers``.
    """
    *path, _ = (view.get_submodule(name) for name in path_to(blocks))
    configs: list[Any] = [getattr(module, "config", None) for module in reversed(path)]
    whole: PretrainedConfig = next(config for config in configs if isinstance(config, PretrainedConfig))
    num_blocks: int = whole.num_hidden_layers
    cut = copy.copy(whole)
    # Into __dict__: an assignment would be validated by itself, while the lengths must change together.
    cut.__dict__[whole.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = stop - start
    for key, value in vars(whole).items():
        if "layer" in key and _is_per_block(value, num_blocks):
            cut.__dict__[key] = value[start:stop]
        elif "layer" in key and _are_indices(value, num_blocks):
            cut.__dict__[key] = [index - start for index in value if start <= index < stop]
    computed = {
        key: value[start:stop]
        for key in _list_properties(type(whole))  # type: ignore[arg-type]
        if _is_per_block(value := getattr(whole, key), num_blocks)
    }
    if computed:
        cut.__class__ = type(type(whole).__name__, (type(whole),), computed)
    for module in path:
        if getattr(module, "config", None) is whole:
            module.config = cut


def _is_per_block(value: Any, num_blocks: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == num_blocks


def _are_indices(value: Any, num_blocks: int) -> bool:
    """Whether `value` lists some of the blocks: rising indices."""
    return isinstance(value, list | tuple) and all(
        isinstance(index, int) and not isinstance(index, bool) and before < index < num_blocks
        for before, index in zip([-1, *value], value, strict=False)
    )


@lru_cache(maxsize=64)
def _list_properties(kind: type[PretrainedConfig]) -> tuple[str, ...]:
    """Properties that may compute a list per block, such as Jamba's types of layers by period and offset."""
    return tuple(key for key in dir(kind) if "layer" in key and isinstance(getattr(kind, key, None), property))


def stand_in(activations: Tensor, hidden_size: int) -> Tensor:
    """What the prelude's stubs are fed where `activations` (B, T, W) enter later: zeros (B, T, H), alike in all else.

    It shares no memory with them, because a model may write into its embeddings (CTRL scales them in place).
    """
    return activations.new_zeros(*activations.shape[:-1], hidden_size)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or the first of several."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


class LastBlockDone(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a pass early: a hook would still run the final norm, the LM head and what else follows."""

    def __init__(self, hidden_BTW: Tensor) -> None:
        super().__init__()
        self.hidden_BTW = hidden_BTW


class WrappedBlock(nn.Module):
    """Wraps a block; what models read from their blocks, such as ``attention_type``, shows through."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class EntryBlock(WrappedBlock):
    """A view's first block: takes the smashed activations in place of the hidden states computed before it.

    A wrapper, not a pre-hook: under gradient checkpointing hooks run again in the backward pass.

    Args:
        block: the first block.
        smashed_BTW: the activations (B, T, W).
        streams: the form of one position, such as (H,), or (4, H) where a model has four streams of hidden states.
    """

    def __init__(self, block: nn.Module, smashed_BTW: Tensor, streams: tuple[int, ...]) -> None:
        super().__init__(block)
        self._smashed = smashed_BTW.reshape(*smashed_BTW.shape[:-1], *streams) if len(streams) > 1 else smashed_BTW

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own output."""
        if "hidden_states" in kwargs:
            return self.block(*args, **{**kwargs, "hidden_states": self._smashed})
        return self.block(self._smashed, *args[1:], **kwargs)


class ExitBlock(WrappedBlock):
    """A view's last block, where the model has more."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `LastBlockDone` with the block's hidden states (B, T, W), of all streams."""
        raise LastBlockDone(hidden_of(self.block(*args, **kwargs)).flatten(2))


class Absent(nn.Module):
    """In place of a module that a segment lacks: its result has the right form and a value nobody uses."""

    def forward(self, first: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Activations as they are; for indices (an embedding) a zero, which adds to any activations.

        Raises:
            UnsupportedModelError: for something else, such as the shape that RoFormer's angles are made from.
        """
        if not isinstance(first, Tensor):
            raise UnsupportedModelError(
                "Expected modules before the blocks to make activations of token ids or activations, found one that is "
                f"given {first!s:.40}: what it makes goes into the blocks, too. Choose another architecture."
            )
        return first if first.is_floating_point() else torch.zeros((), device=first.device)


class CheckpointedBlock(WrappedBlock):
    """A block that keeps only its input for the backward pass and computes the rest again (gradient checkpointing).

    transformers' own gradient checkpointing works in train mode alone, which would turn the base model's dropout on.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own output."""
        if not torch.is_grad_enabled():
            return self.block(*args, **kwargs)
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)
