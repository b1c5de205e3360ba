"""The restaurants in another language: their grammar, with every word another one's (relexification).

A lexicon exchanges the words of `restaurants` among each other, always and everywhere, capitalised ones among
themselves: "The Lucky Clock is a tavern" is "Iron Near Garden well called inexpensive". Grammar, punctuation and the
names of fields stay. The embedded model has met every word, but what its first blocks know of each is wrong now, as it
is in a language that it has not met. Train and held-out parts share no meaning representation, as the restaurants' do.
"""

import random
import re
from collections.abc import Iterable, Mapping

from hsplit_flwr.data.restaurants import format_mr, restaurant_examples
from hsplit_flwr.data.text_batches import Example

LEXICON_SEED = 32
"""the first whose words all stand for others and whose examples all have room in 96 tokens of the embedded model"""
_WORD = re.compile(r"[A-Za-z]+")


def relexified_examples(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """The train part (1,600 examples of 400 meaning representations) and the held-out part (320 of 80).

    Args:
        seed: of the restaurants; the lexicon is the same for all.
    """
    train, held_out = restaurant_examples(seed)
    words = lexicon([*train, *held_out])
    return [_translated(example, words) for example in train], [_translated(example, words) for example in held_out]


def lexicon(examples: Iterable[Example]) -> Mapping[str, str]:
    """Word -> the word that stands for it: each word of `examples` once, "The" and "the" being two words."""
    texts = [text for example in examples for text in (*example.slots.values(), example.ref)]
    found = sorted({word for text in texts for word in _WORD.findall(text)})
    rng = random.Random(LEXICON_SEED)
    exchanged: dict[str, str] = {}
    for capital in (True, False):
        words = [word for word in found if word[0].isupper() == capital]
        exchanged |= dict(zip(words, rng.sample(words, len(words)), strict=True))
    return exchanged


def _translated(example: Example, words: Mapping[str, str]) -> Example:
    def translate(text: str) -> str:
        return _WORD.sub(lambda word: words[word[0]], text)

    slots = {slot: translate(value) for slot, value in example.slots.items()}
    return Example(format_mr(slots), translate(example.ref), slots)
