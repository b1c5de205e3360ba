"""Where the parts of a weight delta are kept: in memory, or in files that are mapped while they are read.

Over the rounds a delta becomes as large as float32 copies of the matrices that it changes. In files it costs memory one
matrix at a time: a `StoredMatrix` or `StoredFactors` is mapped at each `read`, and given back with the tensor.
Files are written once and never changed, as the tensors of a delta are.
"""

import contextlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.factors import FLOAT32_BYTES, LoraFactors, Shape, factor_bytes

_SCRATCH = ".delta-"
_log = logging.getLogger("hsplit_flwr")


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A dense matrix in a file."""

    path: Path

    def read(self) -> Tensor:
        """(d_out, d_in), float32, mapped from the file.

        Raises:
            AggregationError: the file is gone or damaged.
        """
        return _read(self.path, "dense")[0]


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """A pair of factors in a file."""

    path: Path
    rank: int
    shape: Shape
    """(d_out, d_in) of their product"""
    scaling: float

    def read(self) -> LoraFactors:
        """The factors, mapped from the file (raises as `StoredMatrix.read`)."""
        A, B = _read(self.path, "A", "B")
        return LoraFactors(A, B, self.scaling)


Dense: TypeAlias = Tensor | StoredMatrix
Piece: TypeAlias = LoraFactors | StoredFactors
Part = TypeVar("Part", StoredFactors, StoredMatrix)


def as_tensor(dense: Dense) -> Tensor:
    """The matrix itself, wherever it is kept."""
    return dense.read() if isinstance(dense, StoredMatrix) else dense


def as_factors(piece: Piece) -> LoraFactors:
    """The factors themselves, wherever they are kept."""
    return piece.read() if isinstance(piece, StoredFactors) else piece


def piece_bytes(piece: Piece) -> int:
    """Bytes of A and B."""
    if isinstance(piece, StoredFactors):
        return FLOAT32_BYTES * piece.rank * sum(piece.shape)
    return factor_bytes(piece)


def shape_of(piece: Piece) -> Shape:
    """(d_out, d_in) of the product of the factors."""
    return piece.shape if isinstance(piece, StoredFactors) else (piece.B.shape[0], piece.A.shape[1])


class Place(Protocol):
    """Keeps the parts of a delta. What is kept already, in whatever place, stays where it is."""

    def keep_factors(self, piece: Piece) -> Piece:
        """`piece`, kept here."""

    def keep_dense(self, dense: Dense) -> Dense:
        """`dense`, kept here."""

    def aside(self, tensor: Tensor) -> Tensor:
        """`tensor`, out of the way until it is used: of many, memory need not hold all at once."""


class Memory:
    """The `Place` that leaves everything as it is."""

    def keep_factors(self, piece: Piece) -> Piece:
        """See `Place`."""
        return piece

    def keep_dense(self, dense: Dense) -> Dense:
        """See `Place`."""
        return dense

    def aside(self, tensor: Tensor) -> Tensor:
        """See `Place`."""
        return tensor


MEMORY = Memory()


class ScratchFolder:
    """A `Place` for one process: files in a folder of its own, each deleted with the last use of what it holds.

    Where a file cannot be written the part stays in memory, and the log says so, once.

    Args:
        parent: where the folder is made as it is needed; what an earlier process left of its own there is removed.
            None: where temporary files go.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = parent
        for left in parent.glob(f"{_SCRATCH}*") if parent else ():
            shutil.rmtree(left, ignore_errors=True)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0
        self._warned = False

    def keep_factors(self, piece: Piece) -> Piece:
        """See `Place`."""
        if isinstance(piece, StoredFactors):
            return piece
        path = self._write({"A": piece.A, "B": piece.B})
        return self._owned(stored_factors(path, piece)) if path else piece

    def keep_dense(self, dense: Dense) -> Dense:
        """See `Place`."""
        if isinstance(dense, StoredMatrix):
            return dense
        path = self._write({"dense": dense})
        return self._owned(StoredMatrix(path)) if path else dense

    def aside(self, tensor: Tensor) -> Tensor:
        """See `Place`."""
        path = self._write({"dense": tensor})
        return mapped_only(path) if path else tensor

    def _write(self, tensors: Mapping[str, Tensor]) -> Path | None:
        path = None
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(
                    prefix=_SCRATCH, dir=self._parent, ignore_cleanup_errors=True
                )
            self._written += 1
            path = Path(self._folder.name, f"{self._written}.safetensors")
            write_tensors(tensors, path)
        except OSError as error:
            if path:
                path.unlink(missing_ok=True)
            if not self._warned:
                _log.warning("the weight delta stays in memory, it could not be written to disk: %s", error)
                self._warned = True
            return None
        return path

    def _owned(self, part: Part) -> Part:
        # holds the folder, which must not go before its last part
        weakref.finalize(part, _delete, part.path, self._folder).atexit = False
        return part


def stored_factors(path: Path, factors: LoraFactors) -> StoredFactors:
    """What was just written to `path`."""
    return StoredFactors(path, factors.rank, shape_of(factors), factors.scaling)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write `tensors` to the safetensors file `path`.

    Raises:
        OSError: a full disk, or an unwritable folder.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if len({tensor.untyped_storage().data_ptr() for tensor in plain.values()}) < len(plain):
        plain = {name: tensor.clone() for name, tensor in plain.items()}  # safetensors refuses shared memory
    try:
        save_file(plain, path)
    except SafetensorError as error:  # a full disk, too
        raise OSError(f"{path}: {error}") from error


def mapped_only(path: Path) -> Tensor:
    """The matrix in the file `path`, which goes: its room on the disk does with the tensor."""
    tensor = StoredMatrix(path).read()
    with contextlib.suppress(OSError):  # Windows keeps what is mapped; whoever owns the folder removes it
        path.unlink()
    return tensor


def _read(path: Path, *names: str) -> list[Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise AggregationError(
            f"Expected a part of the weight delta in {path}, found: {error}. Leave its files alone while a run needs "
            "them; the client gets the whole delta in its next round."
        ) from error


def _delete(path: Path, folder: object) -> None:
    path.unlink(missing_ok=True)
