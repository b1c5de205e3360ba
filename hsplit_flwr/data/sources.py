"""Where rows come from: a file (JSON lines, JSON, CSV, Parquet), a folder of ``save_to_disk``, a name of the hub.

Text files are read here, line by line, so that what is wrong is named by its line; the rest is read through the
packages pyarrow and datasets, which are imported only then.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hsplit_flwr.errors import ConfigError

KINDS = "a .jsonl, .json, .csv or .parquet file, a folder written by save_to_disk, or the name of a data set of the hub"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")
_INSTALL = "Run: pip install 'hsplit_flwr[finetune]'."


class Row(NamedTuple):
    """A row and where people find it."""

    place: str
    """such as ``line 17 of my.jsonl``"""
    values: Mapping[str, Any]
    """by column"""


def read_rows(source: str, split: str = "train") -> list[Row]:
    """All rows of `source`, at least one.

    Args:
        source: see `KINDS`.
        split: which part of a folder or of a data set of the hub.

    Raises:
        ConfigError: no such source, one that cannot be read (by line or row), one without rows, or a package missing.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = _read_folder(path, split)
    elif path.is_file():
        rows = _read_file(path)
    else:
        rows = _read_hub(source, split)
    found = list(rows)
    if not found:
        raise ConfigError(f"Expected at least one row in {source}, found none.")
    return found


def _read_file(path: Path) -> Iterator[Row]:
    readers = {".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_json, ".csv": _read_csv}
    reader = {**readers, ".parquet": _read_parquet}.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"Expected {KINDS}, found the file {path}. Rename it if it is one of these.")
    return reader(path)


def _read_lines(path: Path) -> Iterator[Row]:
    """JSON lines. Lines end at a line feed alone: U+2028 and its like may stand inside of a text."""
    for number, line in enumerate(_content(path).split(b"\n"), start=1):
        if line.strip():
            place = f"line {number} of {path.name}"
            yield Row(place, _as_object(_parsed(line, place), place))


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects; files of that name often hold JSON lines instead."""
    content = _content(path)
    if content.lstrip().startswith(b"{"):
        yield from _read_lines(path)
        return
    items = _parsed(content, path.name) if content.strip() else []
    if not isinstance(items, list):
        raise ConfigError(f"Expected a list of objects in {path.name}, found {type(items).__name__}.")
    for number, item in enumerate(items, start=1):
        place = f"row {number} of {path.name}"
        yield Row(place, _as_object(item, place))


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if content.startswith(_WIDE_BOMS):
        raise ConfigError(f"Expected UTF-8 in {path.name}, found UTF-16. Save it as UTF-8.")
    return content.removeprefix(_BOM)


def _parsed(content: bytes, place: str) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"Expected UTF-8 in {place}, found {error}. Save it as UTF-8.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"Expected JSON in {place}, found: {error}.") from error


def _as_object(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ConfigError(f'Expected an object such as {{"text": "..."}} in {place}, found {str(item)[:60]!r}.')
    return item


def _read_csv(path: Path) -> Iterator[Row]:
    """With a header; the place is the row's number below it, as spreadsheets of one line a row show it."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # texts are longer than the 131,072 characters of the default
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    raise ConfigError(
                        f"Expected {len(header)} cells in row {number} of {path.name} (line {reader.line_num}), as in "
                        f"its header, found {len(cells)}. Quote texts with commas."
                    )
                yield Row(f"row {number} of {path.name}", dict(zip(header, cells, strict=True)))
    except UnicodeDecodeError as error:
        raise ConfigError(f"Expected UTF-8 in {path.name} after row {number}, found {error}.") from error
    except csv.Error as error:
        raise ConfigError(f"Expected CSV in {path.name}, found after row {number}: {error}.") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"Expected the package pyarrow to read {path.name}, found none. {_INSTALL}") from error
    try:
        items = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected a Parquet file at {path}, found: {error}") from error
    return _numbered(items, path.name)


def _read_folder(folder: Path, split: str) -> Iterator[Row]:
    datasets = _datasets(str(folder))
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a folder written by save_to_disk, found {folder}: {error} "
            "Name the .jsonl, .json, .csv or .parquet file in it instead."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ConfigError(f"Expected data-split as one of {sorted(found)}, found {split!r}.")
        found = found[split]
    return _numbered(found, folder.name)


def _read_hub(name: str, split: str) -> Iterator[Row]:
    if not _HUB_NAME.fullmatch(name) or Path(name).suffix.lower() in (".jsonl", ".json", ".csv", ".parquet"):
        raise ConfigError(
            f"Expected {KINDS}, found nothing at {name!r} (looked for {Path(name).absolute()}). "
            "Correct data, or give the whole path: relative ones count from where Flower's SuperLink was started."
        )
    datasets = _datasets(name)
    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises its own, requests', httpx' and OSErrors
        raise ConfigError(
            f"Expected {KINDS}, found no file or folder {Path(name).absolute()}, and no data set of the hub "
            f"{name!r} with the split {split!r}: {error}"
        ) from error
    return _numbered(found, name)


def _numbered(items: Any, name: str) -> Iterator[Row]:
    for number, item in enumerate(items, start=1):
        yield Row(f"row {number} of {name}", item)


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"Expected the package datasets to read {name}, found none. {_INSTALL}") from error
    return datasets
