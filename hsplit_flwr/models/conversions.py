"""How the tensors of a model are made of those in a checkpoint: by name, or as transformers converts them.

Published mixtures of experts store each expert apart, where the model holds all of a block in one tensor; other
checkpoints store q, k and v in one. transformers says how (`conversion_mapping`), for a whole checkpoint at once; here
it is done for one tensor of the model, from its own stored ones alone.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass(frozen=True, eq=False)
class Source:
    """Where one tensor of the model comes from."""

    stored: tuple[str, ...]
    """its tensors in the checkpoint, in the order in which they are put together; one if it is stored as it is"""
    converter: WeightConverter | None = None
    """what makes it of them"""
    patterns: tuple[str, ...] = ()
    """the converter's source pattern that each of them matches"""
    layer: str = ""
    """what the converter calls all that it makes of them"""
    made: str = ""
    """which of that this is: its state-dict name"""


class Parameters:
    """Names and forms of a model's tensors, without the model: what converters ask for.

    Args:
        skeleton: the whole model; its parameters may be on the meta device.
    """

    def __init__(self, skeleton: PreTrainedModel) -> None:
        self.config: PretrainedConfig = skeleton.config
        self._forms = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in skeleton.state_dict().items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by state-dict name, in the model's order."""
        return {name: tuple(form.shape) for name, form in self._forms.items()}

    def get_parameter(self, name: str) -> Tensor:
        """A tensor of the form of `name`, on the meta device (as ``nn.Module.get_parameter``)."""
        return self._forms[name]


def renamed_on_load(model: PreTrainedModel, module_names: Iterable[str]) -> set[str]:
    """Those of `module_names` that transformers' rules would rename, though they are the model's own names already.

    transformers itself then keeps the name; PEFT, which goes by the same rules, loses the adapter without a word.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    keys = {name: f"{name}.weight" for name in module_names}
    return {name for name, key in keys.items() if rename_source_key(key, renamings, converters)[0] != key}


def sources_of(skeleton: PreTrainedModel, stored: Iterable[str]) -> dict[str, Source]:
    """State-dict name -> where it comes from, for what the `stored` names are known to be; as transformers loads it."""
    rules = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    names: Mapping[str, Any] = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    sources: dict[str, Source] = {}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names:
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name in names and pattern is None:
            sources[name] = Source((key,))
        elif name in names and pattern is not None:
            groups.setdefault(name, []).append((key, pattern))
    for layer, members in groups.items():
        keys, patterns = zip(*members, strict=True)
        converter = next(rule for rule in converters if patterns[0] in rule.source_patterns)
        first = converter.target_patterns[0]
        for target in converter.target_patterns:
            if (name := layer.replace(first, target)) in names:
                sources[name] = Source(keys, converter, patterns, layer, name)
    return sources


def converted(source: Source, read: Callable[[str], Tensor], model: Parameters) -> Tensor | None:
    """The tensor made of what `read` gives for each of its stored names; None if the conversion makes no such one.

    Raises:
        Exception: whatever transformers' conversion raises where tensors are missing or do not fit.
    """
    assert source.converter is not None
    converter = copy.deepcopy(source.converter)
    for key, pattern in zip(source.stored, source.patterns, strict=True):
        converter.add_tensor(source.layer, key, pattern, lambda key=key: read(key))
    made = converter.convert(source.layer, model=model, config=model.config)
    found = made.get(source.made)
    tensor: Tensor | None = found[0] if isinstance(found, list) else found
    return tensor
