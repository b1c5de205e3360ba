"""Which linear layers of the blocks take an adapter. Found by a look at the model's miniature, not by a list of names.

An adapter works where the model calls the layer, with every position of the batch, and goes on with the one tensor
that comes back. Others stay frozen: those whose weights are used without a call (Mamba's step sizes), routers that
return more than one tensor, experts that see some positions only, gates of width 1, which have no rank to choose. So do
those that PEFT refuses, renames as it loads them, or takes for something else (a fused expert of that name), since
nobody could load the adapter.
Fused experts are no linear layers: they are frozen, too.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.models.block_layout import BlockLayout, find_layout
from hsplit_flwr.models.conversions import renamed_on_load
from hsplit_flwr.models.trial import config_key, trial_batch, tried_model

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
            note_passive(config, *tried_model(config))
    layout = replace(layout, passive=_PASSIVE[key])
    if not layout.linear_layers(skeleton):
        raise UnsupportedModelError(
            f"Expected linear layers that take adapters in the blocks of a {config.model_type!r} model, found none. "
            "Choose another architecture."
        )
    return layout


def note_passive(config: PretrainedConfig, model: PreTrainedModel, layout: BlockLayout) -> None:
    """Remember what takes no adapter in models of `config`, of which `model` is the one to try."""
    _PASSIVE[config_key(config)] = passive_layers(model, layout)


def passive_layers(model: PreTrainedModel, layout: BlockLayout) -> frozenset[str]:
    """Names of the linear layers in the blocks of `model` that take no adapter."""
    layers = {name: model.get_submodule(name) for name in layout.linear_layers(model)}
    useful = _seeing_all(model, layers) - renamed_on_load(model, layers)
    useful -= {name for name in useful if _is_vector(layers[name])}
    leaves = {name: name.rpartition(".")[2] for name in useful}
    refused = refused_by_peft(model.config, set(leaves.values()))
    return frozenset(layers.keys() - {name for name, leaf in leaves.items() if leaf not in refused})


def _is_vector(layer: nn.Module) -> bool:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return min(weight.shape) == 1


def _seeing_all(model: PreTrainedModel, layers: dict[str, nn.Module]) -> set[str]:
    """The layers that a pass calls with all positions of the batch, and that return one tensor."""
    batch = trial_batch(model.config)
    seen: dict[str, bool] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            fits = [isinstance(one, Tensor) and sees_all(one.shape, batch["input_ids"].shape) for one in inputs[:1]]
            seen[name] = seen.get(name, True) and fits == [True] and isinstance(output, Tensor)

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(**batch, use_cache=False)
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
