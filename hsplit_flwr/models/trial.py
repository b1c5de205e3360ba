"""A small model to try things on before the model itself is used: its miniature, or itself where that does not run."""

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.models.block_layout import BlockLayout, build_skeleton, find_layout
from hsplit_flwr.models.failures import cause, first_line
from hsplit_flwr.models.miniature import narrow, random_model

LARGEST = 150_000_000
"""parameters of a model that is built to be tried: 1.8 GB with two sets of gradients"""
ROWS, TOKENS = 3, 6


def config_key(config: PretrainedConfig) -> str:
    """What tells one config from another."""
    return f"{type(config).__name__} {config.to_json_string(use_diff=False)}"


def tried_model(config: PretrainedConfig) -> tuple[PreTrainedModel, BlockLayout]:
    """The miniature, or the model with its own widths if parts of the miniature do not fit together.

    In float32 and eval mode with random weights; it ran as a whole.

    Raises:
        UnsupportedModelError: neither runs, or it cannot be cut.
    """
    try:
        return _built(narrow(config))
    except UnsupportedModelError:
        raise
    except Exception as error:
        size = _size(build_skeleton(config, torch.float32))
        if size <= LARGEST:
            return _as_it_is(config)
        raise UnsupportedModelError(
            f"Expected a model of type {config.model_type!r} to be tried in head and tail first, found one of {size:,} "
            f"parameters whose miniature does not run ({first_line(error)}). Choose another architecture."
        ) from error


def _as_it_is(config: PretrainedConfig) -> tuple[PreTrainedModel, BlockLayout]:
    try:
        return _built(config)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"Expected a model of type {config.model_type!r} that runs in one piece, on token ids and an attention "
            f"mask, found {cause(error)}. Check its config.json, or choose another model."
        ) from error


def _built(config: PretrainedConfig) -> tuple[PreTrainedModel, BlockLayout]:
    skeleton = build_skeleton(config, torch.float32)
    if _size(skeleton) > LARGEST:
        raise MemoryError("it is too large")
    model = random_model(config)
    with torch.no_grad():
        model(**trial_batch(config), use_cache=False)
    return model, find_layout(skeleton)


def _size(skeleton: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in skeleton.parameters())


def trial_batch(config: PretrainedConfig, seed: int = 1) -> dict[str, Tensor]:
    """Token ids and mask (B, T): a full row, one padded on the right, one padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.get_text_config().vocab_size, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}
