"""Bytes of the frames and arrays that travel, exact, from their shapes alone."""

import json
import math
import struct
from collections.abc import Mapping

import torch

from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.training.workload import Workload

Shape = tuple[int, ...]
_ALIGNMENT = 8
"""safetensors pads its header with spaces to it (https://github.com/huggingface/safetensors, ``serialize``)"""
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def step_bytes_up(workload: Workload, hidden_size: int) -> int:
    """One ``train`` frame."""
    tokens = (workload.batch_size, workload.sequence_length)
    return _frame_bytes(
        {
            "activations": ((*tokens, hidden_size), DTYPES[workload.activation_dtype]),
            "mask": (tokens, torch.uint8),
            "labels": (tokens, torch.int32),
        }
    )


def step_bytes_down(workload: Workload, hidden_size: int) -> int:
    """One ``gradient`` frame."""
    shape = (workload.batch_size, workload.sequence_length, hidden_size)
    return _frame_bytes({"gradient": (shape, DTYPES[workload.activation_dtype])})


def hello_bytes() -> int:
    """One ``hello`` frame."""
    return _frame_bytes({})


def _frame_bytes(tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> int:
    """What `wire.encode` makes of such tensors: lays out safetensors' header, without the tensors."""
    empty = encode(Header("hello", "", 0, "", 0))
    (length,) = struct.unpack_from("<Q", empty)
    header = len(empty[8 : 8 + length].rstrip(b" "))
    offset = 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        stop = offset + math.prod(shape) * dtype.itemsize
        entry = {name: {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, stop]}}
        header += len(json.dumps(entry, separators=(",", ":"))) - 1  # one comma more, two braces less
        offset = stop
    return 8 + math.ceil(header / _ALIGNMENT) * _ALIGNMENT + offset
