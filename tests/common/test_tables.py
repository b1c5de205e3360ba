import pytest

from hsplit_flwr.common.tables import describe_ranks, format_bytes, format_number, format_seconds


@pytest.mark.parametrize(("ranks", "text"), [([], "0"), ([8, 8], "8"), ([4, 2, 16], "2-16")])
def test_describe_ranks(ranks: list[int], text: str) -> None:
    assert describe_ranks(ranks) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (3 * 10**15, "3000.0 TB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_format_numbers_and_seconds() -> None:
    assert [format_number(v) for v in (1.23456, 812.34, 50257.0, 3e7)] == [
        "1.235",
        "812.3",
        "50,257.0",
        "3e+07",
    ]
    assert [format_seconds(v) for v in (0.0042, 0.9999, 61.26)] == ["0.004", "1.0", "61.3"]
