"""One client's copy of the weight delta in one run, as files in a folder.

::

    SHA256.json            what is held: run, client, version, modules, and the files of their deltas
    SHA256.safetensors     a pair of factors, or a dense matrix
    round-...              where the client is in its round (`federation/kept_round.py`)
    kept-...               adapters that it keeps for a later round (`federation/kept_files.py`)
    own-ROUND-SHA256.safetensors    the adapters that the client trained in its last round, until its next update

Files are named by their content, written beside and renamed, and all checked before a version counts as held: so it
does not matter where a process ended, and nothing needs to be flushed. One process at a time uses a folder.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from hsplit_flwr.federation.trained_head import Shapes
from hsplit_flwr.lora.delta_update import DeltaReplica, OwnFactors
from hsplit_flwr.lora.deltas import SEPARATOR, MatrixDelta, WeightDelta
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.places import (
    Dense,
    Piece,
    StoredFactors,
    StoredMatrix,
    mapped_only,
    stored_factors,
    write_tensors,
)

KEPT_ROUND, KEPT_ADAPTERS = "round-", "kept-"
"""how the names of files begin that are of the client's round, or of adapters that it keeps, not of its delta"""
_OWN = "own-"
FORMAT = 1
"""of the files; another one counts as nothing held"""
_log = logging.getLogger("hsplit_flwr")


class Stamp(NamedTuple):
    """What tells a version that was kept from any other."""

    run: str
    version: int
    name: str
    """of its folder"""
    sha256: str
    """of its list of files"""


class DeltaFolder:
    """A `lora.places.Place` whose files stay, and the list of those that make up the newest version.

    Args:
        path: of the folder, which exists.
        run: the server's, whose versions these are.
        client: whose copy it is.
    """

    def __init__(self, path: Path, run: str, client: str) -> None:
        self._path = path
        self._run = run
        self._client = client
        self._unwritten: OSError | None = None

    def load(self, shapes: Shapes, expected: Stamp | None = None) -> DeltaReplica:
        """The replica held here, in these files; an empty one where there is none, or it is of another head.

        Args:
            shapes: (d_out, d_in) of the linear layers of the client's head.
            expected: what the client remembers of the last version that it kept.
        """
        nothing = DeltaReplica(total=WeightDelta(place=self))
        lists = sorted(self._path.glob("*.json"))
        try:
            listed = max((self._read_list(path) for path in lists), key=lambda found: int(found["version"]))
            self._check_stamp(listed, expected)
            if not set(shapes) <= set(listed["modules"]):
                return nothing
            matrices = {
                name: self._read_matrix(parts, shapes[name])
                for name, parts in listed["modules"].items()
                if parts and name in shapes
            }
            own = self._load_own()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if lists:
                _log.warning(
                    "client %s: its copy of the weight delta in %s is damaged, it takes the whole: %s",
                    *(self._client, self._path, error),
                )
            return nothing
        return DeltaReplica(listed["version"], frozenset(shapes), WeightDelta(matrices, place=self), own)

    def save(self, replica: DeltaReplica) -> Stamp:
        """Keep `replica`, and nothing else; what is in memory is written.

        Raises:
            OSError: a full disk. Nothing is held then.
        """
        modules = {name: self._parts_of(replica.total, name) for name in sorted(replica.names)}
        listed = {
            "format": FORMAT,
            "run": self._run,
            "client": self._client,
            "version": replica.version,
            "modules": modules,
        }
        content = json.dumps(listed, sort_keys=True).encode()
        digest = hashlib.sha256(content).hexdigest()
        if self._unwritten is None:
            self._write_list(content, self._path / f"{digest}.json")
        self._remove_others({f"{digest}.json", *(part["file"] for parts in modules.values() for part in parts)})
        if self._unwritten is not None:
            raise self._unwritten
        return Stamp(self._run, replica.version or 0, self._path.name, digest)

    def save_own(self, own: OwnFactors) -> None:
        """Keep what the client trained in a round; without room for it, the server sends it back."""
        for path in self._path.glob(f"{_OWN}*"):
            path.unlink(missing_ok=True)
        tensors = {  # as they were trained: the server says with which scale they count
            f"{name}{SEPARATOR}{side}": getattr(factors, side) for name, factors in own.factors.items() for side in "AB"
        }
        beside = self._written_beside(tensors)
        if beside:
            beside.replace(self._path / f"{_OWN}{own.round_number}-{sha256_of(beside)}.safetensors")

    def _load_own(self) -> OwnFactors | None:
        for path in self._path.glob(f"{_OWN}*"):
            _, number, digest = path.stem.split("-")
            if sha256_of(path) == digest:
                pairs = load_file(path)
                names = dict.fromkeys(key.rpartition(SEPARATOR)[0] for key in pairs)
                factors = {n: LoraFactors(pairs[f"{n}{SEPARATOR}A"], pairs[f"{n}{SEPARATOR}B"], 1.0) for n in names}
                return OwnFactors(int(number), factors)
        return None

    def keep_factors(self, piece: Piece) -> Piece:
        """See `Place`."""
        if isinstance(piece, StoredFactors):
            return piece
        path = self._write({"A": piece.A, "B": piece.B})
        return stored_factors(path, piece) if path else piece

    def keep_dense(self, dense: Dense) -> Dense:
        """See `Place`."""
        if isinstance(dense, StoredMatrix):
            return dense
        path = self._write({"dense": dense})
        return StoredMatrix(path) if path else dense

    def aside(self, tensor: Tensor) -> Tensor:
        """See `Place`."""
        beside = self._written_beside({"dense": tensor})
        return mapped_only(beside) if beside else tensor

    # --- reading ---

    def _read_list(self, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != path.stem:
            raise ValueError(f"expected {path} as it was written, found other content")
        listed: dict[str, Any] = json.loads(content)
        found = tuple(listed.get(key) for key in ("format", "run", "client"))
        if found != (FORMAT, self._run, self._client):
            raise ValueError(f"expected format, run and client as {(FORMAT, self._run, self._client)}, found {found}")
        return listed | {"sha256": path.stem}

    def _check_stamp(self, listed: Mapping[str, Any], expected: Stamp | None) -> None:
        same_version = expected and (expected.run, expected.version) == (self._run, listed["version"])
        if expected and same_version and expected.sha256 != listed["sha256"]:
            raise ValueError(f"expected the list of files {expected.sha256}, found {listed['sha256']}")

    def _read_matrix(self, parts: list[dict[str, Any]], shape: tuple[int, int]) -> MatrixDelta:
        paths = [self._checked(part["file"]) for part in parts]
        if any(tuple(part["shape"]) != shape for part in parts):
            raise ValueError(f"expected matrices {shape}, found {[part['shape'] for part in parts]}")
        if parts[0]["rank"] is None:
            return MatrixDelta(shape, dense=StoredMatrix(paths[0]))
        stored = zip(paths, parts, strict=True)
        return MatrixDelta(shape, tuple(StoredFactors(p, part["rank"], shape, part["scaling"]) for p, part in stored))

    def _checked(self, name: str) -> Path:
        path = self._path / name
        if path.name != name or sha256_of(path) != path.stem:
            raise ValueError(f"expected {path} as it was written, found other content")
        return path

    # --- writing ---

    def _parts_of(self, total: WeightDelta, name: str) -> list[dict[str, Any]]:
        """The files of a module's delta; none where it never changed, or the disk is full."""
        if name not in total.names():
            return []
        matrix = total.matrix(name).kept_in(self)
        parts = [matrix.dense] if matrix.dense is not None else list(matrix.pieces)
        return [
            {
                "file": part.path.name,
                "shape": list(matrix.shape),
                "rank": part.rank if isinstance(part, StoredFactors) else None,
                "scaling": part.scaling if isinstance(part, StoredFactors) else None,
            }
            for part in parts
            if isinstance(part, StoredFactors | StoredMatrix)
        ]

    def _write(self, tensors: Mapping[str, Tensor]) -> Path | None:
        """A new file under the name of its content; None where it cannot be written, which `save` will say."""
        beside = self._written_beside(tensors)
        if beside is None:
            return None
        path = self._path / f"{sha256_of(beside)}.safetensors"
        beside.replace(path)
        return path

    def _written_beside(self, tensors: Mapping[str, Tensor]) -> Path | None:
        if self._unwritten is not None:
            return None
        beside = self._beside()
        try:
            write_tensors(tensors, beside)
        except OSError as error:
            self._unwritten = error
            beside.unlink(missing_ok=True)
            return None
        return beside

    def _write_list(self, content: bytes, path: Path) -> None:
        beside = self._beside()
        try:
            beside.write_bytes(content)
            beside.replace(path)
        except OSError as error:
            self._unwritten = error
            beside.unlink(missing_ok=True)

    def _beside(self) -> Path:
        return self._path / ".unfinished"

    def _remove_others(self, named: set[str]) -> None:
        """Lists first: at no time does one name a file that is gone."""
        for path in sorted(self._path.iterdir(), key=lambda path: path.suffix != ".json"):
            unnamed = self._unwritten is not None or path.name not in named
            if unnamed and not path.name.startswith((KEPT_ROUND, KEPT_ADAPTERS)):
                path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
