"""Every example belongs to one client, by the partitioners of flwr-datasets."""

from collections import Counter
from typing import Any

import pytest

from hsplit_flwr.data.forms import Chat, Example, Instruction, Pair, Text
from hsplit_flwr.data.partitions import Partition, characters, divide, labels_of
from hsplit_flwr.errors import ConfigError

pytest.importorskip("flwr_datasets")

EXAMPLES = [
    Example(f"line {n}", Text("x" * (1 + n % 40)), {"topic": "abcd"[n // 30], "user": f"u{n % 7:02}", "row": n})
    for n in range(120)
]


def rows(part: list[Example]) -> list[int]:
    return [example.columns["row"] for example in part]


@pytest.mark.parametrize("parts", [1, 2, 5, 7])
@pytest.mark.parametrize(
    "partition",
    [
        Partition("iid"),
        Partition("dirichlet", "topic", 0.5),
        Partition("dirichlet", "length", 0.5),
        Partition("natural", "user"),
    ],
    ids=["iid", "by label", "by length", "natural"],
)
def test_every_example_has_one_client(partition: Partition, parts: int) -> None:
    divided = divide(EXAMPLES, parts, partition)
    assert len(divided) == parts
    assert all(divided)
    assert sorted(row for part in divided for row in rows(part)) == list(range(120))
    assert [rows(part) for part in divide(EXAMPLES, parts, partition)] == [rows(part) for part in divided]


def test_iid_parts_are_equal_and_shuffled() -> None:
    divided = divide(EXAMPLES, 4, Partition())
    assert [len(part) for part in divided] == [30] * 4
    assert all(len({example.columns["topic"] for example in part}) == 4 for part in divided)  # the file is sorted by it
    assert [rows(part) for part in divide(EXAMPLES, 4, Partition(seed=1))] != [rows(part) for part in divided]


def skew(divided: list[list[Example]], column: str) -> float:
    """Mean share of a part's commonest value."""
    shares = [max(Counter(example.columns[column] for example in part).values()) / len(part) for part in divided]
    return sum(shares) / len(shares)


def test_a_smaller_alpha_is_less_iid() -> None:
    uneven, even = (divide(EXAMPLES, 4, Partition("dirichlet", "topic", alpha)) for alpha in (0.1, 1000.0))
    assert skew(uneven, "topic") > 0.6
    assert skew(even, "topic") < 0.4


def test_dirichlet_by_length_gives_clients_unequal_lengths() -> None:
    divided = divide(EXAMPLES, 4, Partition("dirichlet", "length", 0.1))
    means = [sum(characters(e.document) for e in part) / len(part) for part in divided]
    assert max(means) > 1.5 * min(means)


def test_natural_parts_keep_every_value_together() -> None:
    divided = divide(EXAMPLES, 3, Partition("natural", "user"))
    assert [sorted({example.columns["user"] for example in part}) for part in divided] == [
        ["u00", "u03", "u06"],
        ["u01", "u04"],
        ["u02", "u05"],
    ]


def test_examples_without_the_column_are_a_label_of_their_own() -> None:
    assert labels_of([*EXAMPLES[:1], Example("x", Text("a"), {})], "topic") == ["a", "none"]


@pytest.mark.parametrize(
    ("document", "length"),
    [
        (Text("abc"), 3),
        (Pair("ab", "c"), 3),
        (Instruction("a", "b", "c"), 3),
        (Chat([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}], 1), 3),
    ],
)
def test_the_length_of_every_form(document: Any, length: int) -> None:
    assert characters(document) == length


@pytest.mark.parametrize(
    ("count", "parts", "partition", "message"),
    [
        (3, 4, Partition(), "Expected at least one example for each of 4 clients, found 3"),
        (
            120,
            4,
            Partition("natural", "topic2"),
            r"Expected partition-by as 'length' or one of the columns \['row', 'to",
        ),
        (120, 8, Partition("natural", "user"), "Expected a value of 'user' for each of 8 clients, found 7"),
        (120, 119, Partition("dirichlet", "topic", 0.01), "Expected 119 parts of at least one example by 'topic'"),
    ],
)
def test_parts_that_cannot_be_made_are_refused(count: int, parts: int, partition: Partition, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        divide(EXAMPLES[:count], parts, partition)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Expected partition as one of \('iid', 'dirichlet', 'natural'\), found 'x'"):
        Partition("x")
    with pytest.raises(ConfigError, match="Expected dirichlet_alpha > 0, found 0"):
        Partition("dirichlet", alpha=0)
