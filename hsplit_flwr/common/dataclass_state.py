"""Records as plain JSON values and back, exactly: for state that outlives a process.

What a field may hold is read from its type hints, and nothing else is accepted: state comes from a file. Floats keep
every bit (JSON writes the shortest text that reads back the same); those that are not finite, which JSON does not know,
are written as texts.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hsplit_flwr.errors import ConfigError

Record = TypeVar("Record")
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_state(value: Any) -> Any:
    """A record (dataclasses, mappings of texts, sequences, numbers, texts, None) as values that JSON knows.

    Raises:
        ConfigError: something else.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: to_state(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_state(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_state(item) for item in value]
    raise ConfigError(
        f"Expected records of numbers, texts, lists and mappings of texts, found {type(value).__name__}: "
        f"{value!r:.80}. Convert it before it is recorded."
    )


def from_state(kind: type[Record], state: Any) -> Record:
    """The record of dataclass `kind` that `to_state` made `state` of.

    Raises:
        ConfigError: `state` is not of such a record; names the field.
    """
    record: Record = _read(kind, state, kind.__name__)
    return record


def _read(hint: Any, state: Any, where: str) -> Any:
    """`state` as a value of type `hint`; `where`: its place, for messages."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _read_record(hint, state, where)
    if origin in (Union, UnionType) and len(arguments) == 2 and NoneType in arguments:
        inner = next(argument for argument in arguments if argument is not NoneType)
        return None if state is None else _read(inner, state, where)
    if origin is Literal and state in arguments:
        return state
    if origin is tuple and len(arguments) == 2 and arguments[1] is ... and isinstance(state, list):
        return tuple(_read(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(state))
    if origin is Mapping and arguments[0] is str and isinstance(state, dict) and all(isinstance(k, str) for k in state):
        return {key: _read(arguments[1], item, f"{where}[{key!r:.40}]") for key, item in state.items()}
    if hint is float and isinstance(state, str) and state in NOT_FINITE:
        return NOT_FINITE[state]
    if hint is float and isinstance(state, int | float) and not isinstance(state, bool):
        return float(state)
    if hint in (int, str, bool) and type(state) is hint:
        return state
    raise ConfigError(
        f"Expected {_name(hint)} as {where} of a saved state, found {type(state).__name__}: {state!r:.80}. "
        "Take a state that this version wrote."
    )


def _read_record(kind: Any, state: Any, where: str) -> Any:
    hints = _hints(kind)
    if not isinstance(state, dict) or state.keys() != hints.keys():
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ConfigError(
            f"Expected {where} of a saved state to have the fields {sorted(hints)}, found {found!r:.300}. "
            "Take a state that this version wrote."
        )
    return kind(**{name: _read(hint, state[name], f"{where}.{name}") for name, hint in hints.items()})


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    hints = get_type_hints(kind)
    return {entry.name: hints[entry.name] for entry in fields(kind)}


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
