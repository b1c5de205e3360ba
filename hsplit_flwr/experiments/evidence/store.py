"""The results store: one tidy CSV with a row per evaluation, all rows of a run or none.

Any number of processes may append. Each writes the whole file anew beside it and renames, under a lock: whatever
happens to a process, the store holds whole runs only.
"""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from filelock import FileLock, Timeout

from hsplit_flwr.common import provenance
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.records import Evaluation, RunSpec
from hsplit_flwr.reports.text_intervals import TextIntervals
from hsplit_flwr.reports.text_metrics import TextScores

PACKAGES = ("python", "torch", "transformers", "peft", "hsplit_flwr")
DIRTY_MARK = "+changes"
LOCK_SECONDS = 60.0
REMEDY = "Restore the file, or remove all rows of that run."


@dataclass(frozen=True)
class Origin:
    """What produced a row."""

    commit: str
    """commit of the checkout; empty: an installed copy"""
    dirty: bool
    """tracked files differed from the commit"""
    versions: Mapping[str, str]
    """versions by `PACKAGES`; empty: not installed"""
    command: str

    @classmethod
    def of_this_process(cls) -> "Origin":
        """The code that runs now."""
        commit, versions = provenance.commit() or "", provenance.versions()
        return cls(
            commit=commit.removesuffix(DIRTY_MARK),
            dirty=commit.endswith(DIRTY_MARK),
            versions={package: versions.get(package) or "" for package in PACKAGES},
            command=provenance.command(),
        )


@dataclass(frozen=True)
class StoredEvaluation:
    """A row of the store."""

    spec: RunSpec
    evaluation: Evaluation
    origin: Origin


def stored_spec(spec: RunSpec) -> RunSpec:
    """`spec` without the machine's folders: of `data`, and of `model` if absolute, only the last part of the path."""
    model = Path(spec.model).name if Path(spec.model).is_absolute() else spec.model
    return replace(spec, data=Path(spec.data).name, model=model)


def key_of(spec: RunSpec) -> str:
    """The key of `spec` in a store, the same on every machine."""
    return stored_spec(spec).key


@dataclass(frozen=True)
class _Column:
    """How values of one Python type stand in the file; an empty cell is None where None may be."""

    kind: type
    optional: bool = False

    def text(self, value: Any) -> str:
        if value is None and self.optional:
            return ""
        if self.kind is bool:
            return "true" if value else "false"
        return str(self.kind(value))  # numpy's numbers would print differently

    def value(self, text: str) -> Any:
        if not text and self.optional:
            return None
        if self.kind is bool:
            return {"true": True, "false": False}[text]
        return self.kind(text)


def _columns_of(record: type, skipped: Sequence[str] = (), *, optional: bool = False) -> dict[str, _Column]:
    columns = {}
    for name, hint in get_type_hints(record).items():
        if name not in skipped:
            kinds = [kind for kind in get_args(hint) if kind is not NoneType] or [hint]
            columns[name] = _Column(kinds[0], optional or NoneType in get_args(hint))
    return columns


_SPEC = _columns_of(RunSpec)
_EVALUATION = _columns_of(Evaluation, skipped=("scores", "intervals"))
_SCORES = _columns_of(TextScores, optional=True)
_ORIGIN = {name: _Column(str) for name in ("commit", *PACKAGES, "command")} | {"dirty": _Column(bool)}
_ENDS = {end: {f"{name}_{end}": column for name, column in _SCORES.items()} for end in ("low", "high")}
"""of `TextIntervals`; the last columns, which files that were begun without them lack"""
FORMER_COLUMNS = {"key": _Column(str), **_SPEC, **_EVALUATION, **_SCORES, **_ORIGIN}
COLUMNS = {**FORMER_COLUMNS, **_ENDS["low"], **_ENDS["high"]}


class Store:
    """The CSV at `path`. Creating a `Store` touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()

    @cached_property
    def _origin(self) -> Origin:
        return Origin.of_this_process()

    def prepare(self) -> None:
        """Get ready to append: the file exists, and the commit that rows will name is the one checked out now.

        Raises:
            ConfigError: the file cannot be created, or is not a store.
        """
        self._changed(lambda text: text)
        assert self._origin  # read from git once

    def done_keys(self) -> frozenset[str]:
        """The keys (`key_of`) of the runs in the store; none if there is no file yet.

        Raises:
            ConfigError: the file is not a store.
        """
        return self._keys(self._text()) if self.path.exists() else frozenset()

    def append(self, spec: RunSpec, evaluations: Sequence[Evaluation]) -> bool:
        """Add a finished run; False if the store has a run of this key already, which then stays as it is.

        Raises:
            ConfigError: no evaluations, the file is not a store or cannot be written, or its lock is held.
        """
        if not evaluations:
            raise ConfigError(f"Expected at least one evaluation of {spec.method}, found none.")
        run = _lines(stored_spec(spec), evaluations, self._origin)
        return self._changed(lambda text: text if key_of(spec) in self._keys(text) else self._widened(text) + run)

    def rows(self) -> list[StoredEvaluation]:
        """All rows in the order of the file.

        Raises:
            ConfigError: no such file, or not a store: other columns, a value of the wrong type, an edited row.
        """
        lines = self._cells(self._text())
        specs: dict[tuple[str, ...], RunSpec] = {}  # a run's rows share theirs
        return [self._row(number, cells, specs) for number, cells in enumerate(lines, start=2)]

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"Expected a results store at {self.path}, found: {error}. Check the path, or fill it with `run`."
            ) from error

    def _changed(self, change: Callable[[str], str]) -> bool:
        """Replace the file's text by `change` of it, alone and at once; returns whether it became another."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=LOCK_SECONDS):
                existed = self.path.exists()
                old = self.path.read_text(encoding="utf-8") if existed else _header()
                self._keys(old)
                new = change(old if old.endswith("\n") else f"{old}\n")
                if new != old or not existed:
                    self._write(new)
                return new != old
        except Timeout as error:
            raise ConfigError(
                f"Expected the lock of {self.path} within {LOCK_SECONDS:.0f} s, found it held. "
                "End the process that holds it."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"Expected a results store that can be written at {self.path}, found: {error}. "
                "Choose another path, or free the disk."
            ) from error

    def _write(self, text: str) -> None:
        unfinished = self.path.with_name(f".{self.path.name}.new")  # one name will do: the lock is held
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path)

    def _widened(self, text: str) -> str:
        """`text` with all `COLUMNS`."""
        return text if text.startswith(_header()) else _csv([list(COLUMNS), *self._cells(text)])

    def _keys(self, text: str) -> frozenset[str]:
        return frozenset(cells[0] for cells in self._cells(text))

    def _cells(self, text: str) -> list[list[str]]:
        """The lines below the header, each with a cell per column."""
        try:
            lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise ConfigError(f"Expected a CSV at {self.path}, found: {error}. Restore the file.") from error
        header = lines[0] if lines else []
        if header not in (list(COLUMNS), list(FORMER_COLUMNS)):
            other = sorted(set(header) ^ set(COLUMNS)) or ["their order"]
            raise ConfigError(
                f"Expected the {len(COLUMNS)} columns of this version in {self.path}, found {len(header)} columns "
                f"that differ in {', '.join(other[:5])}. Use another file for new results."
            )
        for number, cells in enumerate(lines[1:], start=2):
            if len(cells) != len(header):
                raise ConfigError(
                    f"Expected {len(header)} cells in row {number} of {self.path}, found {len(cells)}. {REMEDY}"
                )
        lacking = [""] * (len(COLUMNS) - len(header))
        return [cells + lacking for cells in lines[1:]]

    def _row(self, number: int, cells: Sequence[str], specs: dict[tuple[str, ...], RunSpec]) -> StoredEvaluation:
        where, texts = f"row {number} of {self.path}", dict(zip(COLUMNS, cells, strict=True))
        values = {}
        for name, column in COLUMNS.items():
            try:
                values[name] = column.value(texts[name])
            except (ValueError, KeyError):
                raise ConfigError(
                    f"Expected {column.kind.__name__} as {name} in {where}, found {texts[name]!r}. {REMEDY}"
                ) from None
        same_run = (texts["key"], *(texts[name] for name in _SPEC))
        if same_run not in specs:
            specs[same_run] = _checked_spec(where, values)
        low, high = (_scores_in(values, f"_{end}") for end in _ENDS)
        evaluation = Evaluation(
            **{name: values[name] for name in _EVALUATION},
            scores=_scores_in(values),
            intervals=TextIntervals(low, high) if low and high else None,
        )
        versions = {package: values[package] for package in PACKAGES}
        origin = Origin(values["commit"], values["dirty"], versions, values["command"])
        return StoredEvaluation(specs[same_run], evaluation, origin)


def _scores_in(values: Mapping[str, Any], suffix: str = "") -> TextScores | None:
    scores = {name: values[name + suffix] for name in _SCORES}
    return None if None in scores.values() else TextScores(**scores)


def _checked_spec(where: str, values: Mapping[str, Any]) -> RunSpec:
    try:
        spec = RunSpec(**{name: values[name] for name in _SPEC})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error} {REMEDY}") from error
    if spec.key != values["key"]:
        raise ConfigError(f"Expected key {spec.key} in {where}, by its values, found {values['key']}. {REMEDY}")
    return spec


def _header() -> str:
    return _csv([list(COLUMNS)])


def _lines(spec: RunSpec, evaluations: Sequence[Evaluation], origin: Origin) -> str:
    fixed = {"key": spec.key, "commit": origin.commit, "dirty": origin.dirty, "command": origin.command}
    fixed |= {**origin.versions, **{name: getattr(spec, name) for name in _SPEC}}
    lines = []
    for evaluation in evaluations:
        values = fixed | {name: getattr(evaluation, name) for name in _EVALUATION}
        values |= {name: getattr(evaluation.scores, name, None) for name in _SCORES}
        ends = {end: getattr(evaluation.intervals, end, None) for end in _ENDS}
        values |= {f"{name}_{end}": getattr(scores, name, None) for end, scores in ends.items() for name in _SCORES}
        lines.append([column.text(values[name]) for name, column in COLUMNS.items()])
    return _csv(lines)


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
