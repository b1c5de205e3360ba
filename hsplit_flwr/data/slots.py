"""How many slots of a meaning representation a text gets right: what perplexity hides, since few tokens are values.

A slot is right if the text says its value and no other value that this slot has anywhere in the set (another
restaurant's name, another food). Only values that people copy word for word are judged. Prices and ratings are
paraphrased ("low-cost", "rated well") and yes or no is never said as such: those slots count neither way. People's own
sentences get 100 % in `restaurants` and 93 % in E2E NLG's validation part ("British" for English).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsplit_flwr.data.e2e import parse_mr
from hsplit_flwr.data.text_batches import SEPARATOR
from hsplit_flwr.errors import ConfigError

PARAPHRASED = {"pricerange", "rating", "customerrating"}
"""Slots, in lower case and without spaces, whose values texts say in words of their own"""
NEVER_SAID = {"yes", "no"}


@dataclass(frozen=True)
class SlotScore:
    """Slots that texts got right, of those that are judged."""

    prompts: int
    """meaning representations with a slot that is judged"""
    right: int
    total: int
    """of slots, over all those prompts; at least 1"""
    right_by_slot: Mapping[str, float]
    """slot -> share of its occurrences that are right, 0..1"""

    @property
    def share(self) -> float:
        """Right of all, 0..1."""
        return self.right / self.total


def score_slots(pairs: Sequence[tuple[str, str]]) -> SlotScore | None:
    """The score of texts for held-out prompts; None where no prompt is a meaning representation with judged slots.

    Args:
        pairs: (prompt, text); a prompt such as ``name[The Eagle], food[French]``, with or without the separator of
            `prompt_text`. Other prompts are passed over. Several texts of one prompt count each.
    """
    judged = [(slots, text) for prompt, text in pairs if (slots := judged_slots(prompt))]
    values: dict[str, set[str]] = defaultdict(set)
    for slots, _ in judged:
        for slot, value in slots.items():
            values[slot].add(value)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for slots, text in judged:
        own = " | ".join(slots.values())  # another restaurant's name may be this one's landmark
        for slot, value in slots.items():
            total[slot] += 1
            others = (other for other in values[slot] if not _says(own, other))
            right[slot] += _says(text, value) and not any(_says(text, other) for other in others)
    if not total:
        return None
    shares = {slot: right[slot] / count for slot, count in total.items()}
    return SlotScore(len(judged), right.total(), total.total(), shares)


def judged_slots(prompt: str) -> dict[str, str]:
    """Slot -> value of those that a text can be held to; {} where `prompt` is no meaning representation."""
    try:
        slots = parse_mr(prompt.rstrip().removesuffix(SEPARATOR.strip()).rstrip())
    except ConfigError:
        return {}
    return {slot: value for slot, value in slots.items() if _is_judged(slot, value)}


def _is_judged(slot: str, value: str) -> bool:
    copied = slot.lower().replace(" ", "") not in PARAPHRASED
    return copied and bool(value.strip()) and value.strip().lower() not in NEVER_SAID


def _says(text: str, value: str) -> bool:
    """Whether `text` has `value` as whole words, in whatever case."""
    return re.search(rf"(?<!\w){re.escape(value.strip())}(?!\w)", text, re.IGNORECASE) is not None
