"""Bytes of the frames that travel, exact, from the form of a batch alone."""

import json
import math
import struct

import torch

from hsplit_flwr.exchange.batches import batch_layout
from hsplit_flwr.exchange.codecs import Layout, codec_named
from hsplit_flwr.exchange.delta_frames import packed
from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.exchange.kept_rows import told_layout
from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.training.workload import Workload

_ALIGNMENT = 8
"""safetensors pads its header with spaces to it (https://github.com/huggingface/safetensors, ``serialize``)"""
_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""dtype -> its name in a safetensors header, in the order in which tensors lie there"""


def step_bytes_up(workload: Workload, hidden_size: int, form: BatchForm | None = None) -> int:
    """Bytes of one ``train`` frame of a batch of `form`; by default the most.

    The default is what to plan for. No batch of contiguous rows takes more (`BatchForm.largest`); where tokens or
    targets of a row are not contiguous, bits instead of spans may take B x (T/8 - 8) bytes more each. A frame that
    refers to rows which the tail keeps is smaller.
    """
    form = form or _largest(workload)
    return _frame_bytes(batch_layout(codec_named(workload.activation_codec), form, hidden_size))


def step_bytes_down(
    workload: Workload, hidden_size: int, form: BatchForm | None = None, *, wants_gradient: bool = True
) -> int:
    """Bytes of one ``gradient`` frame of a batch of `form`, by default the most; see `session.wants_gradient`."""
    if not wants_gradient:
        return _frame_bytes({})
    form = form or _largest(workload)
    return _frame_bytes(codec_named(workload.gradient_codec).layout("gradient", (form.positions, hidden_size)))


def payload_bytes(workload: Workload, hidden_size: int) -> int:
    """Bytes of a step's activations on the wire, or of their gradient if they are more; nothing else of a frame."""
    shape = (_largest(workload).positions, hidden_size)
    codecs = (codec_named(workload.activation_codec), codec_named(workload.gradient_codec))
    return max(sum(part.nbytes for part in codec.layout("values", shape).values()) for codec in codecs)


def packing_bytes(workload: Workload, hidden_size: int) -> int:
    """Bytes of float32 that packing and unpacking a step's activations or gradient takes for a moment; 0 for casts."""
    codecs = (codec_named(workload.activation_codec), codec_named(workload.gradient_codec))
    return max(codec.float_copies for codec in codecs) * 4 * _largest(workload).positions * hidden_size


def delta_bytes(layout: Layout) -> int:
    """Bytes of the ``delta`` frames of tensors of `layout`, in its order."""
    return sum(map(_frame_bytes, packed(layout)))


def hello_bytes() -> int:
    """Bytes of one ``hello`` frame."""
    return _frame_bytes({})


def kept_bytes(rows: int) -> int:
    """Bytes of the ``kept`` frame in which the tail tells of so many `rows` that it has."""
    return _frame_bytes(told_layout(rows))


def _largest(workload: Workload) -> BatchForm:
    return BatchForm.largest(workload.batch_size, workload.sequence_length)


def tensor_file_bytes(layout: Layout) -> int:
    """Bytes of a safetensors file of such tensors, without metadata."""
    return _laid_out_bytes(1, layout)  # the empty header has two braces; the first entry brings no comma


def _frame_bytes(layout: Layout) -> int:
    """Bytes of what `frames.encode` makes of such tensors."""
    empty = encode(Header("hello", "", 0, "", 0))
    (length,) = struct.unpack_from("<Q", empty)
    return _laid_out_bytes(len(empty[8 : 8 + length].rstrip(b" ")), layout)


def _laid_out_bytes(header: int, layout: Layout) -> int:
    """Lays out safetensors' header, `header` bytes of which are there, without the tensors."""
    offset = 0
    order = list(_NAMES)
    for name, part in sorted(layout.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        stop = offset + part.nbytes
        entry = {name: {"dtype": _NAMES[part.dtype], "shape": part.shape, "data_offsets": [offset, stop]}}
        header += len(json.dumps(entry, separators=(",", ":"))) - 1  # one comma more, two braces less
        offset = stop
    return 8 + math.ceil(header / _ALIGNMENT) * _ALIGNMENT + offset
