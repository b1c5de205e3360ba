"""A state as a checkpoint would keep it."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hsplit_flwr.common.state import State

MARK = "tensor:"


def through_disk(state: State, folder: Path) -> State:
    """`state` written as JSON beside one file of tensors, and read back. Anything else in it is an error."""
    tensors: dict[str, Tensor] = {}

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            assert value.device.type == "cpu"
            key = str(len(tensors))
            tensors[key] = value.contiguous().clone()
            return f"{MARK}{key}"
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            return {key: put(inner) for key, inner in value.items()}
        if isinstance(value, list):
            assert all(isinstance(inner, int | float | str) for inner in value)
            return value
        assert isinstance(value, int | float | str), type(value)
        return value

    (folder / "state.json").write_text(json.dumps(put(state)), encoding="utf-8")
    save_file(tensors, folder / "state.safetensors")
    loaded = load_file(folder / "state.safetensors")

    def get(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(MARK):
            return loaded[value.removeprefix(MARK)]
        return {key: get(inner) for key, inner in value.items()} if isinstance(value, dict) else value

    state_again: State = get(json.loads((folder / "state.json").read_text(encoding="utf-8")))
    return state_again
