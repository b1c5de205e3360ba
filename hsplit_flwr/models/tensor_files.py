"""Which file of a folder holds which tensor, and of what shape: read from the headers, before any tensor is."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hsplit_flwr.errors import ConfigError, UnsupportedModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """as safetensors calls it, such as ``BF16``"""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name in the checkpoint -> where it is; single or sharded with an index.

    Raises:
        ConfigError: a file is missing, cut short, no safetensors, or does not hold what the index says.
        UnsupportedModelError: no safetensors in the folder.
    """
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    others = sorted(path.name for path in folder.glob("*") if path.suffix in {".bin", ".pt", ".pth", ".safetensors"})
    raise UnsupportedModelError(
        f"Expected {WEIGHTS} or {INDEX} in {folder}, found weights {others}. "
        "Load the model with transformers and write it with save_pretrained."
    )


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    file_of = _weight_map(folder / INDEX)
    missing = sorted({file for file in file_of.values() if not (folder / file).is_file()})
    if missing:
        raise ConfigError(
            f"Expected every shard that {INDEX} lists in {folder}, found {missing} missing. Download them again."
        )
    held = {file: _header(folder / file) for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        if name not in held[file]:
            raise ConfigError(
                f"Expected the tensor {name!r} in {folder / file}, where {INDEX} puts it, found none. "
                "Download the folder again: its files are of different checkpoints."
            )
    return {name: held[file][name] for name, file in file_of.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected JSON in {index}, found {_content(index, error)}. Download it again.") from error
    files = found.get("weight_map") if isinstance(found, dict) else None
    # Plain names: an index that came from elsewhere must not lead out of its folder.
    if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
        raise ConfigError(
            f"Expected 'weight_map' in {index} with a file of its folder for each tensor, found something else. "
            "Download it again."
        )
    return files


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: StoredTensor(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"Expected a complete safetensors file at {path}, found {_content(path, error)}. Download it again."
        ) from error


def _content(path: Path, error: Exception) -> str:
    """What a file that cannot be read holds instead."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as unreadable:
        return str(unreadable)
    if pointer:
        return "a Git LFS pointer instead of the file itself (run: git lfs pull)"
    return f"{path.stat().st_size:,} bytes that are none ({error})"
