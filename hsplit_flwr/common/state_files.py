"""A state (`common/state.py`) as JSON values beside tensors, as files hold it. Nothing is ever pickled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hsplit_flwr.errors import ConfigError

_REFERENCE = "$tensor"
"""among the values, ``{"$tensor": key}`` stands for a tensor"""


def without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` with a reference for each tensor, which is put into `tensors`."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {_REFERENCE: key}
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str) or key == _REFERENCE]:
            raise ConfigError(f"Expected names of a state as texts other than {_REFERENCE!r}, found {wrong[0]!r}.")
        return {key: without_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [without_tensors(item, tensors) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ConfigError(
        f"Expected a state of tensors, numbers, texts, lists and dicts, found {type(value).__name__}: {value!r:.80}."
    )


def with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `without_tensors` made `value` of."""
    if isinstance(value, list):
        return [with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_REFERENCE}:
        return tensors[value[_REFERENCE]]
    return {key: with_tensors(item, tensors) for key, item in value.items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of `tensors`, wherever they are and whatever memory they share.

    Raises:
        OSError: a full disk.
    """
    memory: set[int] = set()
    alone = {}
    for key, tensor in tensors.items():  # safetensors refuses tensors that share memory
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        shared = storage.data_ptr() in memory or storage.nbytes() != plain.nbytes
        alone[key] = plain.clone() if shared else plain
        memory.add(storage.data_ptr())
    try:
        save_file(alone, path, dict(metadata) if metadata else None)
    except SafetensorError as error:  # a full disk, too
        raise OSError(f"{path}: {error}") from error
