"""Errors of configured values: the field, what was expected, what was found, the key that people type."""

import math

import pytest

from hsplit_flwr.common.checks import is_above, is_at_least, is_whole, require, require_whole
from hsplit_flwr.errors import ConfigError


def message(field: str, expected: str, found: object, key: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        require(False, field, expected, found, key)
    return str(caught.value)


def test_the_message_names_field_value_and_key() -> None:
    assert message("gate_s", "> 0 s", -1.0) == "Expected gate_s > 0 s, found -1.0 (run config: gate-s)."
    assert message("ranks", "> 0", (0,), "candidate-ranks").endswith("(run config: candidate-ranks).")
    assert message("rounds", "> 0", "5") == "Expected rounds > 0, found '5'."
    assert message("max_length", "> 0", 0, "max_length") == "Expected max_length > 0, found 0."
    require(True, "rounds", "> 0", 0)


@pytest.mark.parametrize("value", [1, 2, 10**30])
def test_whole_numbers(value: object) -> None:
    assert is_whole(value, 1)
    require_whole("count", value, 1)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None, math.nan])
def test_what_is_no_whole_number(value: object) -> None:
    assert not is_whole(value, 1)
    with pytest.raises(ConfigError, match=f"Expected count as a whole number >= 1, found {value!r}"):
        require_whole("count", value, 1)


def test_finite_numbers() -> None:
    assert is_above(1e-30, 0)
    assert is_at_least(0, 0)
    assert not is_above(0, 0)
    assert not is_at_least(-1e-30, 0)
    for value in (math.nan, math.inf, True, "1", None):
        assert not is_above(value, 0)
        assert not is_at_least(value, 0)
