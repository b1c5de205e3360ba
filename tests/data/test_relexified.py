"""The restaurants in another language: one word stands for one word, and everything else is as it was."""

import re
from collections import Counter
from collections.abc import Mapping
from itertools import chain

from hsplit_flwr.data.relexified import lexicon, relexified_examples
from hsplit_flwr.data.restaurants import partition_by_slot, restaurant_examples
from hsplit_flwr.data.text_batches import TextBatches
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles

ORIGINAL, TRANSLATED = ([*chain(*parts)] for parts in (restaurant_examples(), relexified_examples()))
WORDS = lexicon(ORIGINAL)


def tokens(text: str) -> list[str]:
    """Words and what stands between them, by other means than the module's."""
    return re.split(r"([^A-Za-z]+)", text)


def back(text: str, words: Mapping[str, str]) -> str:
    original = {stands_for: word for word, stands_for in words.items()}
    return "".join(original.get(token, token) for token in tokens(text))


def test_every_word_has_one_that_stands_for_it_and_none_stands_for_itself() -> None:
    assert set(WORDS) == set(WORDS.values())
    assert len(WORDS) == 161
    assert all(word != other and word[0].isupper() == other[0].isupper() for word, other in WORDS.items())


def test_translated_back_they_are_the_restaurants() -> None:
    for original, example in zip(ORIGINAL, TRANSLATED, strict=True):
        assert back(example.ref, WORDS) == original.ref
        assert {slot: back(value, WORDS) for slot, value in example.slots.items()} == dict(original.slots)
        assert example.mr == ", ".join(f"{slot}[{value}]" for slot, value in example.slots.items())


def test_parts_are_those_of_the_restaurants() -> None:
    train, held_out = relexified_examples()
    assert (len(train), len(held_out)) == (1600, 320)
    assert not {example.mr for example in train} & {example.mr for example in held_out}
    assert relexified_examples() == (train, held_out) != relexified_examples(seed=1)
    assert lexicon(chain(*restaurant_examples(seed=1))) == WORDS  # one language, whatever is said in it


def test_foods_are_as_frequent_as_with_the_restaurants() -> None:
    originals, translations = (Counter(one.slots["food"] for one in part) for part in (ORIGINAL, TRANSLATED))
    assert {WORDS[food]: count for food, count in originals.items()} == translations
    assert len(partition_by_slot(TRANSLATED, "food", num_clients=5)) == 5


def test_nothing_is_cut_at_96_tokens() -> None:
    batches = TextBatches(
        TRANSLATED, ModelFiles.resolve(str(tiny_checkpoint())).tokenizer(), batch_size=4, max_length=96
    )
    assert (batches.truncated, batches.dropped) == (0, 0)
