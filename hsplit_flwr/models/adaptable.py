"""Which linear layers of the blocks take an adapter. Found by a look at the model's miniature, not by a list of names.

An adapter works where the model calls the layer, with every position of the batch, and goes on with the one tensor
that comes back. Others stay frozen: those whose weights are used without a call (Mamba's step sizes), routers that
return more than one tensor, experts that see some positions only, gates of width 1, which have no rank to choose. So do
those that PEFT refuses, renames as it loads them, or takes for something else (a fused expert of that name), since
nobody could load the adapter.
Fused experts are no linear layers: they are frozen, too.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.models.block_layout import (
    BlockLayout,
    block_kinds,
    block_of,
    build_skeleton,
    find_layout,
    shift_block,
)
from hsplit_flwr.models.conversions import renamed_on_load
from hsplit_flwr.models.miniature import fill, narrow
from hsplit_flwr.models.trial import config_key, trial_batch, tried_model
from hsplit_flwr.models.views import ExitBlock, LastBlockDone, graft, set_view_config

_PASSIVE: dict[str, frozenset[str]] = {}
"""what was found for the configs of this process"""


def layout_of(skeleton: PreTrainedModel) -> BlockLayout:
    """The layout of a model from `build_skeleton`, with what takes no adapter; see `find_layout`.

    The first look at a config takes some tenths of a second, and no weights.

    Raises:
        UnsupportedModelError: the model cannot be cut, or not be tried, or nothing in it takes an adapter.
    """
    layout = find_layout(skeleton)
    config = skeleton.config
    key = config_key(config)
    if key not in _PASSIVE:
        with torch.random.fork_rng(devices=[]):
            _PASSIVE[key] = _passive_layers(config)
    vectors = {name for name in layout.linear_layers(skeleton) if _is_vector(skeleton.get_submodule(name))}
    layout = replace(layout, passive=_PASSIVE[key] | vectors)
    if not layout.linear_layers(skeleton):
        raise UnsupportedModelError(
            f"Expected linear layers that take adapters in the blocks of a {config.model_type!r} model, found none. "
            "Choose another architecture."
        )
    return layout


def _passive_layers(config: PretrainedConfig) -> frozenset[str]:
    """Names of the linear layers in the blocks of a model of `config` that take no adapter."""
    try:
        return _passive_of_first_blocks(build_skeleton(narrow(config), torch.float32))
    except UnsupportedModelError:
        raise
    except Exception:  # widths that do not fit together when they are narrow, blocks that need all others
        model, layout = tried_model(config)
        return _passive_in(model, model, layout, range(layout.num_blocks))


def _passive_of_first_blocks(skeleton: PreTrainedModel) -> frozenset[str]:
    """Of as many blocks as it takes to have one of each kind; the others are like them."""
    layout = find_layout(skeleton)
    kinds = block_kinds(skeleton, layout)
    like = [kinds.index(kind) for kind in kinds]
    held = max(like) + 1
    names = layout.linear_layers(skeleton)
    first = list(skeleton.get_submodule(layout.blocks).children())[:held]
    skeleton.set_submodule(layout.blocks, nn.ModuleList(first))
    fill(skeleton)
    view_blocks = [*first[:-1], ExitBlock(first[-1])] if held < layout.num_blocks else first
    view = graft(skeleton, {layout.blocks: nn.ModuleList(view_blocks)})
    set_view_config(view, layout.blocks, 0, held)
    passive = _passive_in(skeleton, view, layout, range(held))
    moved = {name: shift_block(name, layout.blocks, like[block_of(name)] - block_of(name)) for name in names}
    return frozenset(name for name in names if moved[name] in passive)


def _passive_in(
    model: PreTrainedModel, view: nn.Module, layout: BlockLayout, blocks: Collection[int]
) -> frozenset[str]:
    """Of the linear layers in these blocks of `model`, of which `view` runs them."""
    names = [name for name in layout.linear_layers(model) if block_of(name) in blocks]
    layers = {name: model.get_submodule(name) for name in names}
    useful = _seeing_all(model.config, view, layers) - renamed_on_load(model, layers)
    leaves = {name: name.rpartition(".")[2] for name in useful}
    refused = refused_by_peft(model.config, set(leaves.values()))
    return frozenset(layers.keys() - {name for name, leaf in leaves.items() if leaf not in refused})


def _is_vector(layer: nn.Module) -> bool:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return min(weight.shape) == 1


def _seeing_all(config: PretrainedConfig, view: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    """The layers that a pass of `view` calls with all positions of the batch, and that return one tensor."""
    batch = trial_batch(config)
    seen: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            fits = [isinstance(one, Tensor) and sees_all(one.shape, batch["input_ids"].shape) for one in inputs[:1]]
            seen[name] = seen.get(name, True) and fits == [True] and isinstance(output, Tensor)

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), suppress(LastBlockDone):
            view(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, fits in seen.items() if fits}


def sees_all(shape: Sequence[int], batch: Sequence[int]) -> bool:
    """Whether a tensor (..., width) has all positions of a batch (B, T): row by row, or flattened to one dimension."""
    rows, tokens = batch
    *positions, _ = shape
    if positions == [rows * tokens]:
        return True
    return len(positions) > 1 and positions[0] == rows and math.prod(positions[1:]) == tokens


class _OneLayer(nn.Module):
    """A model of this config to PEFT, as far as its rules ask: one linear layer of the name."""

    def __init__(self, config: PretrainedConfig, leaf: str) -> None:
        super().__init__()
        self.config = config
        self.add_module(leaf, nn.Linear(2, 2))


def refused_by_peft(config: PretrainedConfig, leaves: Iterable[str]) -> set[str]:
    """Those of the last parts of module names on which PEFT puts no LoRA layer in models of `config`."""
    import peft  # 2.4 s to import
    from peft.tuners.lora import Linear as LoraLinear

    refused = set()
    for leaf in leaves:
        model = _OneLayer(config, leaf)
        try:
            peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=[leaf]), model)
        except ValueError:
            refused.add(leaf)
            continue
        if not isinstance(model.get_submodule(leaf), LoraLinear):  # a router's weight alone, say
            refused.add(leaf)
    return refused
