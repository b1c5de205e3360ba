"""What a client keeps of its round between two messages, as files beside its copy of the weight delta.

::

    round-SHA256.safetensors           where it is: the turn, what it said, adapters, optimizer, sums
    round-heard-TURN-FRAME-SHA256      frames of the tail that go on in its next message

Files are named by their content, written beside and renamed. Those of a round stay until the next one begins, so that a
message which is sent again finds what the first one found.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

from safetensors import SafetensorError, safe_open

from hsplit_flwr.common.state import State
from hsplit_flwr.common.state_files import save_tensors, with_tensors, without_tensors
from hsplit_flwr.common.tables import format_bytes
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.exchange.turns import digest
from hsplit_flwr.federation.delta_folder import KEPT_ROUND, sha256_of

_HEARD = f"{KEPT_ROUND}heard-"
_VALUES = "hsplit"
_log = logging.getLogger("hsplit_flwr")


@dataclass(frozen=True, kw_only=True)
class KeptRound:
    """Where a client is in its round."""

    token: str
    """digest of the task's token: of this round and mode, and no other"""
    began: float
    """seconds since the epoch"""
    turn: int = 0
    """the last that was answered"""
    said: Sequence[str] = ()
    """`digest` of each frame of that answer"""
    version: int | None = None
    """of the weight delta that its head has; None: it has not asked for it, or not got it yet"""
    load_s: float = 0.0
    """of making the head, in all turns"""
    work: State = field(default_factory=dict)
    """of training or scoring; empty: not begun"""

    @classmethod
    def begun(cls, task: RoundTask, now: float) -> Self:
        """At the beginning of `task`."""
        return cls(token=digest(task.token.encode()), began=now)


class RoundFolder:
    """The files of one client's round in `path`, which exists; one process at a time uses it.

    Args:
        path: of the folder.
        limit_bytes: that all its files may take.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes

    def load(self) -> KeptRound | None:
        """What was kept last; None: nothing, or nothing that is whole."""
        found = [kept for path in self._states() if (kept := _read(path))]
        return max(found, key=lambda kept: kept.turn, default=None)

    def save(self, kept: KeptRound) -> None:
        """Keep `kept` and nothing else, but for what was heard where its turn is to go on.

        Raises:
            OSError: a full disk, or a folder that cannot be written.
        """
        former = self._states()
        beside = self._path / f".{KEPT_ROUND}unfinished"
        tensors: dict[str, Any] = {}
        values = json.dumps(without_tensors({**asdict(replace(kept, work={})), "said": [*kept.said]}, {}))
        work = json.dumps(without_tensors(kept.work, tensors))
        save_tensors(tensors, beside, {_VALUES: values, "work": work})
        path = self._path / f"{KEPT_ROUND}{sha256_of(beside)}.safetensors"
        beside.replace(path)
        for old in former:
            if old != path:
                old.unlink(missing_ok=True)

    def hear(self, turn: int, frames: Sequence[bytes]) -> None:
        """Keep the tail's frames of `turn` for the next one.

        Raises:
            OSError: as `save`.
            ConfigError: more than the folder may take.
        """
        used = sum(path.stat().st_size for path in self._path.iterdir()) + sum(map(len, frames))
        if used > self._limit_bytes:
            raise ConfigError(
                f"Expected at most {format_bytes(self._limit_bytes)} of one client's state, found "
                f"{format_bytes(used)} with what the server sends. Raise state-limit-gb."
            )
        beside = self._path / f".{KEPT_ROUND}unfinished"
        for number, frame in enumerate(frames):
            beside.write_bytes(frame)
            beside.replace(self._path / f"{_HEARD}{turn:06d}-{number:06d}-{digest(frame)}")

    def heard(self) -> Iterator[bytes]:
        """What was kept by `hear`, in its order; each read when it is asked for.

        Raises:
            ConfigError: a file is gone or damaged.
        """
        return map(_read_frame, sorted(self._path.glob(f"{_HEARD}*")))

    def forget_heard(self) -> None:
        """Remove what was kept by `hear`."""
        for path in self._path.glob(f"{_HEARD}*"):
            path.unlink(missing_ok=True)

    def _states(self) -> list[Path]:
        return list(self._path.glob(f"{KEPT_ROUND}*.safetensors"))


class RoundStore(Protocol):
    """Where clients keep their rounds."""

    def open_round(self, run: str, client: str) -> AbstractContextManager[RoundFolder]:
        """The folder of the client's round, for this process alone.

        Raises:
            ConfigError: it cannot be written.
        """


def _read(path: Path) -> KeptRound | None:
    try:
        if sha256_of(path) != path.stem.removeprefix(KEPT_ROUND):
            raise ValueError("other content than was written")
        with safe_open(path, "pt") as file:
            told = file.metadata()
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  # no mapping
        values, work = json.loads(told[_VALUES]), json.loads(told["work"])
        return KeptRound(**{**values, "work": with_tensors(work, tensors)})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        _log.warning("what a client kept of its round in %s is damaged: %s", path, error)
        return None


def _read_frame(path: Path) -> bytes:
    try:
        if digest(frame := path.read_bytes()) == path.name.rpartition("-")[2]:
            return frame
        found = "other content"
    except OSError as error:
        found = str(error)
    raise ConfigError(f"Expected {path} as it was written, found {found}. Leave what is in state-dir alone.")
