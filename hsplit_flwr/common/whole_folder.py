"""Folders that are there whole or not at all: written beside their place and renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new, empty folder to fill, which takes the place of `target` at the end of the ``with`` block.

    Whatever ends the block early leaves `target` as it was. Files are on the disk itself before the rename: one that
    outlives a power cut must not name empty files.

    Raises:
        OSError: a full disk or an unwritable folder.
    """
    unfinished = _hidden(target, "unfinished")
    _remove(unfinished)  # of a process that was killed while it wrote
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                _flush(path)
        discard(target)
        unfinished.rename(target)
    finally:
        _remove(unfinished)


def discard(folder: Path) -> None:
    """Remove `folder`; at no time does half of it look like one."""
    if folder.exists():
        gone = _hidden(folder, "gone")
        _remove(gone)
        folder.rename(gone)
        _remove(gone)


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Remove what killed processes left of folders in `parent` whose names match `pattern`."""
    for left in parent.glob(f".{pattern}"):
        _remove(left)


def _hidden(folder: Path, why: str) -> Path:
    return folder.with_name(f".{folder.name}.{why}")


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
