"""An experiment as a TOML file: every combination of its lists is a run.

    [run]                     # fields of `RunSpec` that all runs share; what is left out keeps its default
    model = "tiny"
    rounds = 5

    [matrix]
    methods = ["hsplitlora", "splitlora"]
    settings = ["heterogeneous"]
    partitions = ["iid", "dirichlet"]
    seeds = [0, 1, 2]
    cuts = [1, 2]             # optional, as are ranks and learning_rates

    [learning_rates]          # a number per method, where the matrix has no list of them; several for a search
    hsplitlora = 0.003
    splitlora = [0.001, 0.002]

``[audit]`` and ``[[claims]]`` are of what becomes of the runs: see `evidence.audit` and `evidence.claims`.
Runs come seed by seed, so that an interrupted matrix compares all methods on fewer seeds.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from hsplit_flwr.common.toml_file import read_toml
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.records import EMBEDDED_DATA, RunSpec

REQUIRED_LISTS = {"methods": "method", "settings": "setting", "partitions": "partition", "seeds": "seed"}
OPTIONAL_LISTS = {"cuts": "cut", "ranks": "rank", "learning_rates": "learning_rate"}
FIELD_OF_LIST = REQUIRED_LISTS | OPTIONAL_LISTS
SHARED_FIELDS = tuple(name for name in RunSpec.field_names() if name not in FIELD_OF_LIST.values())
_KINDS = get_type_hints(RunSpec)
_WORDS = {int: "a whole number", float: "a finite number", str: "a string"}


def read_experiment(path: str | Path, methods: Collection[str], settings: Collection[str]) -> tuple[RunSpec, ...]:
    """The runs that the file at `path` asks for, first seeds first.

    `data` is the name of an embedded set, a folder or a file; a relative one counts from the file's folder.

    Args:
        path: the TOML file (see the module's docstring).
        methods: names that exist.
        settings: names that exist.

    Raises:
        ConfigError: no such file, not TOML, or a wrong key, type or value; the message names file and key.
    """
    content = read_toml(path, "an experiment")
    try:
        return _specs(content, Path(path).resolve().parent, methods, settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _specs(
    content: Mapping[str, Any], folder: Path, methods: Collection[str], settings: Collection[str]
) -> tuple[RunSpec, ...]:
    _only_keys("the file", content, ("run", "matrix", "learning_rates", "audit", "claims"))
    shared = _shared(_table(content, "run"), folder)
    matrix = _table(content, "matrix")
    _only_keys("[matrix]", matrix, tuple(FIELD_OF_LIST))
    lists = {key: _list(matrix, key) for key in FIELD_OF_LIST if key in REQUIRED_LISTS or key in matrix}
    _only_known("[matrix] methods", lists["methods"], methods)
    _only_known("[matrix] settings", lists["settings"], settings)
    rates = _learning_rates(content, lists, methods)
    return tuple(
        RunSpec(
            method=method,
            setting=setting,
            partition=partition,
            seed=seed,
            learning_rate=rate,
            cut=cut,
            rank=rank,
            **shared,
        )
        for seed, setting, partition, cut, rank, (rate, method) in itertools.product(
            lists["seeds"],
            lists["settings"],
            lists["partitions"],
            lists.get("cuts", [0]),
            lists.get("ranks", [0]),
            _rate_by_rate(lists["methods"], rates),
        )
    )


def _shared(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    _only_keys("[run]", table, SHARED_FIELDS)
    shared = {name: _typed(f"[run] {name}", name, value) for name, value in table.items()}
    if shared.get("data") and shared["data"] not in EMBEDDED_DATA:
        path = (folder / shared["data"]).resolve()
        if path.name in EMBEDDED_DATA:  # a store keeps the last part of a path
            raise ConfigError(
                f"Expected [run] data as a folder by another name than an embedded set, found {shared['data']!r}. "
                f"Rename the folder, or write data = {path.name!r} for the embedded set."
            )
        shared["data"] = str(path)
    return shared


def _learning_rates(
    content: Mapping[str, Any], lists: Mapping[str, list[Any]], methods: Collection[str]
) -> dict[str, list[float]]:
    """Learning rates by method."""
    table = _table(content, "learning_rates")
    if "learning_rates" in lists:
        if table:
            raise ConfigError(
                "Expected learning rates in one place, found both [matrix] learning_rates and [learning_rates]. "
                "Remove one."
            )
        return dict.fromkeys(lists["methods"], lists["learning_rates"])
    _only_known("[learning_rates]", table, methods)
    missing = [method for method in lists["methods"] if method not in table]
    if missing:
        raise ConfigError(
            f"Expected a learning rate for every method in [learning_rates], found none for {', '.join(missing)}. "
            "Add it, or list learning_rates in [matrix]."
        )
    where = "[learning_rates] {}".format
    return {
        method: _distinct(where(method), "learning_rate", value if isinstance(value, list) else [value])
        for method, value in table.items()
    }


def _rate_by_rate(methods: Sequence[str], rates: Mapping[str, list[float]]) -> list[tuple[float, str]]:
    """Every method's first rate, then every method's second, and so on."""
    rounds = itertools.zip_longest(*(rates[method] for method in methods))
    return [(rate, method) for tried in rounds for rate, method in zip(tried, methods, strict=True) if rate is not None]


def _table(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"Expected [{name}] as a table, found {table!r}. Write its keys below a line [{name}].")
    return table


def _list(matrix: Mapping[str, Any], key: str) -> list[Any]:
    return _distinct(f"[matrix] {key}", FIELD_OF_LIST[key], matrix.get(key))


def _distinct(where: str, field: str, values: object) -> list[Any]:
    """`values` as a list of that field's type, none twice."""
    if not isinstance(values, list) or not values:
        found = "nothing" if values is None else repr(values)
        raise ConfigError(f"Expected {where} as a list with at least one value, found {found}.")
    typed = [_typed(where, field, value) for value in values]
    if len(set(typed)) < len(typed):
        raise ConfigError(f"Expected every value of {where} once, found {values!r}.")
    return typed


def _typed(where: str, field: str, value: object) -> Any:
    """`value` as the type of that field of `RunSpec`; whole numbers pass as floats."""
    kind = _KINDS[field]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise ConfigError(f"Expected {where} as {_WORDS[kind]}, found {value!r}.")
    return value


def _only_keys(where: str, table: Mapping[str, Any], known: Collection[str]) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f"Expected only the keys {', '.join(known)} in {where}, found {key!r}.")


def _only_known(where: str, names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"Expected {where} among {', '.join(sorted(known))}, found {name!r}.")
