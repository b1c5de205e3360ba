"""Bytes of float32 arrays as npy files, which is how Flower carries them."""

import io
import math
from collections.abc import Iterable

import numpy as np

from hsplit_flwr.exchange.codecs import Shape


def array_bytes(shapes: Iterable[Shape]) -> int:
    """Float32 arrays of these shapes, each as an npy file, which is how Flower's `Parameters` hold them."""
    return sum(4 * math.prod(shape) + _npy_header_bytes(shape) for shape in shapes)


def _npy_header_bytes(shape: Shape) -> int:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.tell()
