"""What a model uses before its blocks, seen in a pass that ends where they begin."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.models.failures import first_line
from hsplit_flwr.models.views import WrappedBlock, graft, path_to


class _FirstBlockReached(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a pass before the first block, with the hidden states that reach it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _StopAtBlock(WrappedBlock):
    """Stands in for a block while the prelude is observed."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Raises `_FirstBlockReached`."""
        raise _FirstBlockReached(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


class _ArgumentsSeen(TorchFunctionMode):
    """Notes the arguments of every torch function: unlike module hooks, also parameters used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ids.update(map(id, args))
        self.ids.update(map(id, (kwargs or {}).values()))
        return func(*args, **(kwargs or {}))


def used_before_blocks(
    skeleton: PreTrainedModel, blocks: str, outside: Mapping[str, nn.Module]
) -> tuple[frozenset[str], tuple[int, ...]]:
    """Which modules of `outside` a pass uses before the blocks, and the form of one position of what reaches them."""
    # A real pass rather than one on the meta device, where code that looks at a mask's values fails.
    for module in [*outside.values(), *map(skeleton.get_submodule, path_to(blocks))]:
        _use_zeros(module)
    stand_ins = nn.ModuleList(map(_StopAtBlock, skeleton.get_submodule(blocks).children()))
    view = graft(skeleton, {blocks: stand_ins})
    tokens = torch.zeros(1, 2, dtype=torch.long)
    seen = _ArgumentsSeen()
    try:
        with torch.no_grad(), seen:
            view(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except _FirstBlockReached as reached:
        if (shape := tuple(reached.hidden.shape))[:2] != tuple(tokens.shape):
            found = f"hidden states of the shape {shape} for {tuple(tokens.shape)} tokens"
            raise _not_run(skeleton, blocks, found) from reached
        used = {
            name
            for name, module in outside.items()
            if any(id(parameter) in seen.ids for parameter in module.parameters(recurse=False))
        }
        return frozenset(used), shape[2:]
    except Exception as error:
        raise _not_run(skeleton, blocks, f"a pass that stops before them: {first_line(error)}") from error
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
