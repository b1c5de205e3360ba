"""Clients' copies of the weight delta on their own disk, for any number of processes, clients and runs.

::

    STATE/
        CLIENT-RUN.lock        held while a process uses the folder beside it
        CLIENT-RUN/            hashes of both ids; what is in it: `federation/delta_folder.py`
        cleaned                touched when old copies were looked for

Whatever goes wrong (damage, a full disk, a folder that cannot be written) costs bytes, not the round: then nothing is
held, and the server sends the whole delta.
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock, Timeout

from hsplit_flwr.common.tables import format_bytes
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.delta_folder import DeltaFolder, Stamp
from hsplit_flwr.federation.trained_head import Shapes
from hsplit_flwr.lora.delta_update import DeltaReplica, OwnFactors

if TYPE_CHECKING:
    from hsplit_flwr.federation.kept_round import RoundFolder
    from hsplit_flwr.training.kept_adapters import KeptAdapters

LIMIT_BYTES = 64 << 30
LOCK_LIMIT_S = 10.0
"""how long to wait for another process that uses the same client's folder: one loads its weights at a time"""
OLD_RUN_S, UNUSED_S = 24 * 3600.0, 7 * 24 * 3600.0
"""how long a copy stays that is not used: of a run after which the same client took part in another; of any"""
CLEANING_S = 60.0
"""how long the folder is left alone after it was cleaned: to look at a thousand clients' files takes a second"""
_log = logging.getLogger("hsplit_flwr")
_said: set[str] = set()
"""warnings of this process: clients are built anew for every message, and would say them every time"""


class Notes(Protocol):
    """Where a client remembers what it kept last, to notice that it is another by now."""

    def read(self, client: str) -> Stamp | None:
        """What was noted last; None: nothing."""

    def write(self, client: str, stamp: Stamp) -> None:
        """Note it."""


class FileStore:
    """A `federation.client_data.DeltaStore` and a `RoundStore` in a folder.

    Args:
        folder: made where it is missing; if it cannot be written, every round gets the whole delta.
        limit_bytes: that all copies in it may take; those that were not used for longest go first.
        notes: of what was kept last.
    """

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES, notes: Notes | None = None) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._notes = notes

    @contextmanager
    def open(self, run: str, client: str, shapes: Shapes) -> Iterator[DeltaReplica]:
        """See `DeltaStore`."""
        own = self._folder_of(run, client)
        lock = self._lock(own)
        if lock is None:
            yield DeltaReplica()
            return
        with lock:
            held = DeltaFolder(own, run, client)
            replica = held.load(shapes, self._notes.read(client) if self._notes else None)
            yield replica
            try:
                stamp = held.save(replica)
            except OSError as error:
                _say_once(f"client {client} keeps no weight delta and downloads the whole in the next round: {error}")
                return
            if self._notes:
                self._notes.write(client, stamp)
            try:
                self._clean(own)
            except OSError as error:  # another process cleans, too
                _log.info("%s is cleaned later: %s", self._folder, error)

    def keep_own(self, run: str, client: str, own: OwnFactors) -> None:
        """See `DeltaStore`."""
        path = self._folder_of(run, client)
        if lock := self._lock(path):
            with lock:
                DeltaFolder(path, run, client).save_own(own)

    def keep_adapters(self, run: str, client: str, kept: "KeptAdapters") -> None:
        """See `DeltaStore`."""
        from hsplit_flwr.federation.kept_files import save_kept  # who keeps nothing does not need it

        path = self._folder_of(run, client)
        if lock := self._lock(path):
            with lock:
                try:
                    save_kept(path, kept)
                except OSError as error:
                    _say_once(f"client {client} cannot keep its adapters, they restart in the next round: {error}")

    def kept_adapters(self, run: str, client: str, round_number: int) -> "KeptAdapters | None":
        """See `DeltaStore`."""
        from hsplit_flwr.federation.kept_files import load_kept

        path = self._folder_of(run, client)
        lock = self._lock(path)
        if lock is None:
            return None
        with lock:
            return load_kept(path, round_number)

    @contextmanager
    def open_round(self, run: str, client: str) -> Iterator["RoundFolder"]:
        """See `RoundStore`."""
        path = self._folder_of(run, client)
        if (lock := self._lock(path)) is None:
            raise self._no_room("this process cannot use it")
        from hsplit_flwr.federation.kept_round import RoundFolder  # over a connection nobody needs it

        with lock:
            try:
                yield RoundFolder(path, self._limit_bytes)
            except OSError as error:
                raise self._no_room(str(error)) from error

    def _no_room(self, found: str) -> ConfigError:
        return ConfigError(
            'Expected a state-dir that can be written, for a round kept with exchange = "messages", '
            f"found {self._folder}: {found}. Name another one in the node config: state-dir."
        )

    def _folder_of(self, run: str, client: str) -> Path:
        return self._folder / f"{_short_hash(client)}-{_short_hash(run)}"

    def _lock(self, own: Path) -> AbstractContextManager[Any] | None:
        """Makes the folder `own` and locks it; None where that cannot be done."""
        try:
            own.mkdir(parents=True, exist_ok=True, mode=0o700)
            return FileLock(_lock_of(own)).acquire(timeout=LOCK_LIMIT_S)
        except Timeout:
            _log.warning("another process uses %s: this one takes the whole weight delta", own)
        except OSError as error:
            _say_once(
                f"Expected a folder for the clients' state that can be written, found {self._folder}: {error}. The "
                "clients go on without and download the whole weight delta in every round. Name another one: state-dir."
            )
        return None

    def _clean(self, own: Path) -> None:
        """Hold the limit; now and then remove copies that nobody uses any more, and those beyond it, oldest first."""
        if (size := _bytes_of(own)) > self._limit_bytes:
            _remove_files(own)
            _say_once(
                f"Expected at most {format_bytes(self._limit_bytes)} of clients' state in {self._folder}, found "
                f"{format_bytes(size)} of one client: it keeps nothing and downloads the whole weight delta in every "
                "round. Raise state-limit-gb."
            )
        last = self._folder / "cleaned"
        if last.exists() and 0 <= time.time() - last.stat().st_mtime < CLEANING_S:
            return
        last.touch()
        client, now = own.name.partition("-")[0], time.time()
        sizes = {path: _bytes_of(path) for path in self._folder.iterdir() if path.is_dir()}
        used = {path: _last_use(path) for path in sizes}
        total = sum(sizes.values())
        for path in sorted(sizes.keys() - {own}, key=lambda path: used[path]):
            age = now - used[path]
            old = age > (OLD_RUN_S if path.name.startswith(f"{client}-") else UNUSED_S)
            if (old or total > self._limit_bytes) and _remove(path):
                total -= sizes[path]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lock_of(own: Path) -> Path:
    return own.with_name(f"{own.name}.lock")


def _last_use(path: Path) -> float:
    """When a version was kept there, or the folder made."""
    return max((file.stat().st_mtime for file in [path, *path.glob("*.json")]), default=0.0)


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _remove(path: Path) -> bool:
    """Remove a copy, unless a process uses it."""
    try:
        with FileLock(_lock_of(path)).acquire(timeout=0):
            shutil.rmtree(path, ignore_errors=True)
            _lock_of(path).unlink(missing_ok=True)
    except (Timeout, OSError):
        return False
    return True


def _remove_files(own: Path) -> None:
    for path in sorted(own.iterdir(), key=lambda path: path.suffix != ".json"):
        path.unlink(missing_ok=True)


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.warning("%s", text)
