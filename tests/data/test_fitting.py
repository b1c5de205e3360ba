"""Rows that are too long, rows without targets, packed rows: what stays, and how it is counted."""

import pytest

from hsplit_flwr.data.fitting import Fit, Fitted, fit_rows, wrapped
from hsplit_flwr.data.token_row import IGNORE, TokenRow
from hsplit_flwr.errors import ConfigError


def row(length: int, prompt: int = 0, first: int = 0) -> TokenRow:
    ids = list(range(first, first + length))
    return TokenRow(ids, [IGNORE] * prompt + ids[prompt:])


ROWS = [("a", row(4)), ("b", row(9, prompt=2)), ("c", row(9, prompt=7)), ("d", row(3, prompt=3)), ("e", row(6))]


def test_too_long_rows_are_cut_and_those_left_without_a_target_dropped() -> None:
    fitted = fit_rows(ROWS, Fit(6, "cut"))
    assert [r.ids for r in fitted.rows] == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert (fitted.documents, fitted.cut, fitted.dropped, fitted.idle, fitted.first) == (5, 1, 0, 2, "b")
    assert str(fitted) == (
        "5 documents, 3 rows, 16 tokens, 12 of them learned; 1 too long and cut; 2 with nothing to learn left out "
        "(the first: b)"
    )


def test_too_long_rows_are_dropped() -> None:
    fitted = fit_rows(ROWS, Fit(6, "drop"))
    assert [r.ids for r in fitted.rows] == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert (fitted.cut, fitted.dropped, fitted.idle, fitted.first) == (0, 2, 1, "b")


def test_rows_of_the_longest_length_stay_as_they_are() -> None:
    fitted = fit_rows([("a", row(6))], Fit(6))
    assert fitted == Fitted([row(6)], 1, 0, 0, 0, "")


def test_a_lone_token_is_nothing_to_learn() -> None:
    """Nothing stands before it that could predict it."""
    assert fit_rows([("a", row(1))], Fit(6)).idle == 1


def test_wrapped_rows_hold_all_tokens_in_their_order() -> None:
    packed = wrapped([row(4), row(5, prompt=2, first=10), row(2, first=20)], 4)
    assert [r.ids for r in packed] == [[0, 1, 2, 3], [10, 11, 12, 13], [14, 20, 21]]
    assert packed[1].labels == [IGNORE, IGNORE, 12, 13]


def test_packed_rows_without_a_target_are_counted() -> None:
    fitted = fit_rows([("a", row(8, prompt=7)), ("b", row(4, first=20))], Fit(4, packing="wrapped"))
    assert [r.ids for r in fitted.rows] == [[4, 5, 6, 7], [20, 21, 22, 23]]
    assert (fitted.documents, fitted.idle) == (2, 1)
    assert fit_rows([], Fit(4, packing="wrapped")).rows == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "Expected max_length as a whole number >= 2, found 1"),
        ({"max_length": 4, "too_long": "split"}, r"Expected too_long as one of \('drop', 'cut'\), found 'split'"),
        ({"max_length": 4, "packing": "bfd"}, "Expected packing as one of .*found 'bfd'.*do not travel"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Fit(**options)  # type: ignore[arg-type]
