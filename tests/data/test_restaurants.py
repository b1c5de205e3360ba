import hashlib
import re
from collections import Counter
from typing import Any

import pytest

from hsplit_flwr.data.restaurants import VALUES, Example, check_partitions, partition_by_slot, restaurant_examples
from hsplit_flwr.errors import ConfigError

TRAIN, HELD_OUT = restaurant_examples()
# Words of which a sentence must contain one, written apart from the grammar's own tables.
SAYS = {
    ("priceRange", "cheap"): r"\b(cheap|low-cost|inexpensive)\b",
    ("priceRange", "moderate"): r"\b(moderately|mid-|reasonably) ?priced\b",
    ("priceRange", "expensive"): r"\b(expensive|pricey|high-end)\b",
    ("rating", "poor"): r"\bpoor(ly)?\b",
    ("rating", "fair"): r"\bfair\b",
    ("rating", "good"): r"\bgood\b|\brated well\b",
    ("rating", "excellent"): r"\bexcellent\b",
    ("childFriendly", "yes"): r"\b(welcomes children|families|is child friendly)\b",
    ("childFriendly", "no"): r"\b(not welcome children|adults only|not child friendly)\b",
}


def says(text: str, slot: str, value: str) -> bool:
    return re.search(SAYS.get((slot, value), rf"\b{re.escape(value)}\b"), text) is not None


def test_sizes_and_several_different_references() -> None:
    assert (len(TRAIN), len(HELD_OUT)) == (1600, 320)
    references = Counter(example.mr for example in TRAIN + HELD_OUT)
    assert len(references) == 480
    assert set(references.values()) == {4}
    assert len({(example.mr, example.ref) for example in TRAIN + HELD_OUT}) == 1920


def test_no_meaning_representation_is_in_both_parts() -> None:
    assert not {example.mr for example in TRAIN} & {example.mr for example in HELD_OUT}
    assert not {frozenset(e.slots.items()) for e in TRAIN} & {frozenset(e.slots.items()) for e in HELD_OUT}


def test_meaning_representation_spells_its_slots() -> None:
    for example in TRAIN + HELD_OUT:
        assert dict(re.findall(r"(\w+)\[([^\]]+)\]", example.mr)) == example.slots
        assert list(example.slots) == [slot for slot in ("name", *VALUES) if slot in example.slots]


def test_every_sentence_says_each_slot_and_no_other() -> None:
    for example in TRAIN + HELD_OUT:
        for slot, value in example.slots.items():
            assert says(example.ref, slot, value), (slot, example)
        body = example.ref.replace(example.slots["name"], "")
        for slot in ("area", "near", "rating", "childFriendly", "priceRange"):
            if slot not in example.slots:
                assert not any(says(body, slot, value) for value in VALUES[slot]), (slot, example)


def test_sentences_are_well_formed() -> None:
    for example in TRAIN + HELD_OUT:
        assert re.fullmatch(r"[A-Z][A-Za-z ,?.-]*\.", example.ref), example
        assert not re.search(r"  | [.,?]|[{}]", example.ref), example
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiouAEIOU]", example.ref), example


def test_sentences_vary() -> None:
    """With names and values blanked, many patterns remain, and none dominates."""
    patterns: Counter[str] = Counter()
    for example in TRAIN:
        text = example.ref
        for value in sorted(example.slots.values(), key=len, reverse=True):
            text = text.replace(value, "_")
        patterns[text] += 1
    assert len(patterns) > 1000
    assert patterns.most_common(1)[0][1] < 0.02 * len(TRAIN)


def test_same_seed_same_text_everywhere() -> None:
    """A pinned digest: Python versions and machines agree; change it only with the grammar."""
    text = "\n".join(f"{example.mr}\t{example.ref}" for example in TRAIN + HELD_OUT)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "ccd6e821a417fdc6"
    assert restaurant_examples(0) == (TRAIN, HELD_OUT)
    assert restaurant_examples(1)[0] != TRAIN


@pytest.mark.parametrize("slot", ["food", "area"])
def test_partition_holds_every_example_once_and_each_client_enough(slot: str) -> None:
    parts = partition_by_slot(TRAIN, slot, num_clients=5, alpha=0.3, seed=3, min_examples=40)
    assert len(parts) == 5
    assert min(map(len, parts)) >= 40
    together = [(example.mr, example.ref) for part in parts for example in part]
    assert Counter(together) == Counter((example.mr, example.ref) for example in TRAIN)


def largest_share(parts: list[list[Example]]) -> float:
    """Mean over clients of the share of the client's most frequent food."""
    counts = [Counter(example.slots["food"] for example in part) for part in parts]
    return sum(count.most_common(1)[0][1] / count.total() for count in counts) / len(counts)


def test_small_alpha_skews_and_large_alpha_does_not() -> None:
    skewed = [largest_share(partition_by_slot(TRAIN, alpha=0.1, seed=seed)) for seed in range(5)]
    even = [largest_share(partition_by_slot(TRAIN, alpha=1000.0, seed=seed)) for seed in range(5)]
    assert min(skewed) > 0.4  # 8 foods: 0.125 is no skew
    assert max(even) < 0.25


def test_partition_is_decided_by_its_seed() -> None:
    assert partition_by_slot(TRAIN, seed=1) == partition_by_slot(TRAIN, seed=1)
    assert partition_by_slot(TRAIN, seed=1) != partition_by_slot(TRAIN, seed=2)


def test_impossible_or_unknown_partitions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Expected slot to be one of \['area', .*\], found 'colour'"):
        partition_by_slot(TRAIN, "colour")
    with pytest.raises(ConfigError, match=r"Expected 5 parts of at least 8 examples .* 30 examples .* Lower"):
        partition_by_slot(TRAIN[:30])
    with pytest.raises(ConfigError, match=r"alpha > 0 .* found 5, 8, 0 and 0"):
        partition_by_slot(TRAIN, alpha=0)


@pytest.mark.parametrize("options", [{"num_clients": 100, "alpha": 0.3}, {"num_clients": 3, "slot": "colour"}])
def test_a_server_can_find_out_what_every_client_would(options: dict[str, Any]) -> None:
    """100 SuperNodes with dirichlet-alpha 0.3 each found out by themselves, in every round: 173 s, 'completed'."""
    with pytest.raises(ConfigError) as of_a_client:
        partition_by_slot(TRAIN, **options)
    with pytest.raises(ConfigError) as of_the_server:
        check_partitions(**options)
    assert str(of_the_server.value) == str(of_a_client.value)
    check_partitions(5)
    check_partitions(100, alpha=100.0)
