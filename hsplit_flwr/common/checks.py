"""Checks of configured values: every error names the field, what was expected, what was found and the key to set."""

import math

from hsplit_flwr.errors import ConfigError


def require(condition: bool, field: str, expected: str, found: object, key: str | None = None) -> None:
    """Refuse the value `found` of `field` unless `condition` holds.

    Args:
        condition: whether the value is good.
        field: of the dataclass that is checked.
        expected: what is good, to be read after the field's name: ``"> 0 s"``, ``"as a whole number >= 1"``.
        found: the value.
        key: what people type for it in a run config; default: the field's name with dashes.

    Raises:
        ConfigError: ``Expected FIELD EXPECTED, found FOUND (run config: KEY).``
    """
    if not condition:
        key = field.replace("_", "-") if key is None else key
        where = f" (run config: {key})" if key != field else ""
        raise ConfigError(f"Expected {field} {expected}, found {found!r}{where}.")


def require_whole(field: str, found: object, least: int, key: str | None = None) -> None:
    """Refuse all but a whole number >= `least`; True and False are none.

    Raises:
        ConfigError: see `require`.
    """
    require(is_whole(found, least), field, f"as a whole number >= {least}", found, key)


def is_whole(value: object, least: int) -> bool:
    """Whether `value` is a whole number >= `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_above(value: object, least: float) -> bool:
    """Whether `value` is a finite number > `least`."""
    return _is_number(value) and value > least  # type: ignore[operator]


def is_at_least(value: object, least: float) -> bool:
    """Whether `value` is a finite number >= `least`."""
    return _is_number(value) and value >= least  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
