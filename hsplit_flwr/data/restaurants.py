"""A data-to-text set made by a grammar: restaurants as meaning representations, and sentences for them.

The form is that of E2E NLG (Novikova, Dušek, Rieser 2017, arXiv:1706.09254), ``name[The Blue Otter],
food[Thai]``; names, values, wording and grammar are our own. It needs no file and no download, and is the
same for a seed on every machine. Every sentence says all of its slots; train and held-out parts share no
meaning representation.
"""

import random
from collections.abc import Sequence

import numpy as np

from hsplit_flwr.data.grammar import distinct_texts
from hsplit_flwr.data.text_batches import Example
from hsplit_flwr.errors import ConfigError

__all__ = ["Example", "check_partitions", "partition_by_slot", "restaurant_examples"]

NUM_TRAIN, NUM_HELD_OUT, REFS_PER_MR = 400, 80, 4
"""Meaning representations in each part, and different sentences for each of them"""

# fmt: off
_NAME_FIRST = (
    "Blue", "Copper", "Old", "Silver", "Quiet", "Golden", "Crooked", "Paper",
    "Stone", "Lucky", "Painted", "Midnight", "Maple", "Salt", "Amber", "Iron",
)
_NAME_SECOND = (
    "Otter", "Kettle", "Lantern", "Spoon", "Harbour", "Fig", "Sparrow", "Table",
    "Anchor", "Garden", "Barrel", "Fox", "Oven", "Bridge", "Pepper", "Clock",
)
# fmt: on

VALUES: dict[str, tuple[str, ...]] = {
    "eatType": ("bistro", "diner", "tavern", "tea room", "canteen", "grill"),
    "food": ("Thai", "Mexican", "Greek", "Korean", "Lebanese", "Spanish", "Ethiopian", "Vietnamese"),
    "priceRange": ("cheap", "moderate", "expensive"),
    "area": ("riverside", "old town", "market", "university", "harbour"),
    "rating": ("poor", "fair", "good", "excellent"),
    "childFriendly": ("yes", "no"),
    "near": ("Opera House", "North Station", "Botanic Park", "Town Library", "Ferry Pier", "Science Museum"),
}
"""Every slot but ``name``, in the order of a meaning representation, with its values"""

_PRICE_ADJECTIVE = {
    "cheap": ("cheap", "low-cost", "inexpensive"),
    "moderate": ("moderately priced", "mid-priced", "reasonably priced"),
    "expensive": ("expensive", "pricey", "high-end"),
}
_RATING_CLAUSE = {
    "poor": ("has a poor rating", "is rated poorly by its guests", "gets poor reviews"),
    "fair": ("has a fair rating", "is rated as fair by its guests", "gets fair reviews"),
    "good": ("has a good rating", "is rated well by its guests", "gets good reviews"),
    "excellent": ("has an excellent rating", "is rated as excellent by its guests", "gets excellent reviews"),
}
_CHILD_CLAUSE = {
    "yes": ("welcomes children", "is a fine choice for families", "is child friendly"),
    "no": ("does not welcome children", "is meant for adults only", "is not child friendly"),
}
_NEAR = ("near the {}", "close to the {}", "next to the {}", "a short walk from the {}")
_AREA = ("in the {} area", "in the {} district", "in the {} quarter")

# {full}: "cheap Thai diner"; {dish}: "cheap Thai food"; {place}: " in the old town near the Opera House" or
# nothing.
_OPENINGS = (
    "{name} is {a_full}{place}.",
    "There is {a_full} called {name}{place}.",
    "{name} is {a_kind}{place} that serves {dish}.",
    "If you want {dish}, try {name}, {a_kind}{place}.",
    "Looking for {dish}? {name} is {a_kind}{place} you will like.",
    "You can find {a_full}{place}, and its name is {name}.",
    "The {full} named {name} can be found{place}.",
    "{name}, {a_kind}{place}, has {dish} on its menu.",
)
_FRONTED = (
    "{Place}, {name} is {a_kind} serving {dish}.",
    "{Place}, you will find {a_full} called {name}.",
    "{Place} there is {a_kind} with {dish}, {name}.",
)
_LATER_PLACE = ("It is{place}.", "You will find it{place}.", "The {kind} is located{place}.")
_SUBJECTS = ("It", "The place", "This {kind}")


def restaurant_examples(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """The train part (1,600 examples of 400 meaning representations) and the held-out part (320 of 80)."""
    rng = random.Random(seed)
    meanings: dict[str, dict[str, str]] = {}
    while len(meanings) < NUM_TRAIN + NUM_HELD_OUT:
        slots = _random_slots(rng)
        meanings[format_mr(slots)] = slots
    examples = [Example(mr, ref, slots) for mr, slots in meanings.items() for ref in _references(slots, rng)]
    border = NUM_TRAIN * REFS_PER_MR
    return examples[:border], examples[border:]


def format_mr(slots: dict[str, str]) -> str:
    """``{"name": "The Blue Otter", "food": "Thai"}`` -> ``name[The Blue Otter], food[Thai]``."""
    return ", ".join(f"{slot}[{value}]" for slot, value in slots.items())


def _random_slots(rng: random.Random) -> dict[str, str]:
    """A name, a kind of place and a food, and two to five of the other slots."""
    optional = [slot for slot in VALUES if slot not in ("eatType", "food")]
    chosen = {"eatType", "food", *rng.sample(optional, rng.randint(2, len(optional)))}
    slots = {"name": f"The {rng.choice(_NAME_FIRST)} {rng.choice(_NAME_SECOND)}"}
    return slots | {slot: rng.choice(values) for slot, values in VALUES.items() if slot in chosen}


def _references(slots: dict[str, str], rng: random.Random) -> list[str]:
    """``REFS_PER_MR`` different texts, each of which says every slot."""
    return distinct_texts(lambda: _realise(slots, rng), REFS_PER_MR)


def _realise(slots: dict[str, str], rng: random.Random) -> str:
    """One text: an opening (name, kind, food, price), the place in one of three positions, then the rest."""
    place = _place(slots, rng)
    position = rng.choice(("front", "middle", "later")) if place else "none"
    words = _words(slots, place, rng)
    if position == "front":
        sentences = [rng.choice(_FRONTED).format(**words)]
    else:
        opening = rng.choice([text for text in _OPENINGS if position == "middle" or "found{place}" not in text])
        sentences = [opening.format(**words | ({} if position == "middle" else {"place": ""}))]
    rest = _clauses(slots, words, rng)
    if position == "later":
        rest.insert(rng.randint(0, len(rest)), rng.choice(_LATER_PLACE).format(**words))
    return " ".join(sentences + rest)


def _words(slots: dict[str, str], place: str, rng: random.Random) -> dict[str, str]:
    """What the templates are filled with; the price, if any, is an adjective before the food."""
    price = rng.choice(_PRICE_ADJECTIVE[slots["priceRange"]]) + " " if "priceRange" in slots else ""
    kind, full = slots["eatType"], f"{price}{slots['food']} {slots['eatType']}"
    return {
        "name": slots["name"],
        "kind": kind,
        "a_kind": _with_article(kind),
        "full": full,
        "a_full": _with_article(full),
        "dish": f"{price}{slots['food']} food",
        "place": place and " " + place,
        "Place": place[:1].upper() + place[1:],
    }


def _place(slots: dict[str, str], rng: random.Random) -> str:
    """Area and landmark in either order, or an empty text."""
    parts = [rng.choice(_AREA).format(slots["area"])] if "area" in slots else []
    parts += [rng.choice(_NEAR).format(slots["near"])] if "near" in slots else []
    rng.shuffle(parts)
    return " ".join(parts)


def _clauses(slots: dict[str, str], words: dict[str, str], rng: random.Random) -> list[str]:
    """Rating and children, in either order, as one sentence ("but" where they disagree) or as two."""
    clauses: list[tuple[str, bool]] = []
    if "rating" in slots:
        clauses.append((rng.choice(_RATING_CLAUSE[slots["rating"]]), slots["rating"] in ("good", "excellent")))
    if "childFriendly" in slots:
        clauses.append((rng.choice(_CHILD_CLAUSE[slots["childFriendly"]]), slots["childFriendly"] == "yes"))
    rng.shuffle(clauses)
    subject = rng.choice(_SUBJECTS).format(**words)
    if len(clauses) == 2 and rng.random() < 0.6:
        (first, likes_first), (second, likes_second) = clauses
        return [f"{subject} {first} {'and' if likes_first == likes_second else 'but'} {second}."]
    return [f"{subject if index == 0 else 'It'} {clause}." for index, (clause, _) in enumerate(clauses)]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"  # no value starts with a "u" that needs "an"


def partition_by_slot(
    examples: Sequence[Example],
    slot: str = "food",
    num_clients: int = 5,
    alpha: float = 0.3,
    seed: int = 0,
    *,
    min_examples: int = 8,
) -> list[list[Example]]:
    """Non-IID parts: the examples of each value of ``slot`` go to the clients in Dirichlet(``alpha``) shares.

    Every example is in exactly one part. This is the label skew of Hsu et al. 2019 (arXiv:1909.06335) with a
    slot as the label; a missing slot counts as a value of its own. Small ``alpha`` means more skew. The
    shares are drawn again until every part has ``min_examples``.

    Raises:
        ConfigError: a value out of range, a slot that no example has, or no such partition was found.
    """
    if num_clients < 1 or min_examples < 1 or alpha <= 0 or seed < 0:
        raise ConfigError(
            "Expected num_clients >= 1, min_examples >= 1, alpha > 0 and seed >= 0, "
            f"found {num_clients}, {min_examples}, {alpha} and {seed}."
        )
    labels = np.array([example.slots.get(slot, "none") for example in examples])
    if not any(slot in example.slots for example in examples):
        known = sorted({key for example in examples for key in example.slots})
        raise ConfigError(f"Expected slot to be one of {known}, found {slot!r}.")
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        owner = np.empty(len(examples), dtype=np.int64)
        for label in np.unique(labels):
            owner[labels == label] = rng.choice(
                num_clients, size=int((labels == label).sum()), p=rng.dirichlet([alpha] * num_clients)
            )
        if np.bincount(owner, minlength=num_clients).min() >= min_examples:
            parts = [np.flatnonzero(owner == client).tolist() for client in range(num_clients)]
            return [[examples[i] for i in part] for part in parts]
    raise ConfigError(
        f"Expected {num_clients} parts of at least {min_examples} examples each, found no such partition of "
        f"{len(examples)} examples with alpha={alpha}. Lower num_clients or min_examples, or raise alpha "
        "(dirichlet-alpha)."
    )


def check_partitions(num_clients: int, *, slot: str = "food", alpha: float = 0.3, seed: int = 0) -> None:
    """Make the parts of the train examples once, so that a server finds out before its clients do.

    Raises:
        ConfigError: as `partition_by_slot` would in every client.
    """
    train, _ = restaurant_examples()
    partition_by_slot(train, slot, num_clients, alpha, seed)
