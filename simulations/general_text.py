"""The text that the tiny checkpoint is pretrained on: English of many topics, made by a grammar of our own.

Travel, weather, hotels, shops, homes, people, animals, sport and work, as short stories and as records
(``city[Marlow], sky[cloudy] => ...``) whose values are repeated in the sentence. No restaurant and none of
the templates of `hsplit_flwr.restaurants` is in it: federated fine-tuning is to learn those.
"""

import random
from collections.abc import Iterator

# fmt: off
_WORDS: dict[str, tuple[str, ...]] = {
    "person": (
        "Anna", "Tom", "Maria", "Peter", "Lucy", "David", "Nina", "Oscar", "Clara", "Henry", "my sister",
    ),
    "job": (
        "teacher", "doctor", "driver", "painter", "farmer", "engineer", "nurse", "writer", "student", "pilot",
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "time": (
        "in the morning", "in the afternoon", "in the evening", "at noon",
        "at night", "before sunrise",
    ),
    "season": ("spring", "summer", "autumn", "winter"),
    "sky": ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "stormy", "clear"),
    "warmth": ("hot", "warm", "mild", "cool", "cold", "freezing"),
    "animal": ("cat", "dog", "horse", "rabbit", "goat", "duck", "parrot", "turtle"),
    "colour": ("red", "green", "blue", "yellow", "black", "white", "brown", "grey", "orange"),
    "size": ("small", "large", "tiny", "huge", "tall", "narrow", "wide"),
    "quality": (
        "old", "new", "beautiful", "quiet", "busy", "famous", "simple", "modern", "comfortable", "friendly",
    ),
    "thing": ("coat", "book", "lamp", "chair", "bicycle", "camera", "clock", "ring", "bag", "guitar", "map"),
    "building": (
        "hotel", "school", "museum", "library", "station", "theatre", "castle", "tower", "shop", "house",
    ),
    "where": (
        "near the river", "in the city", "by the sea", "on the hill",
        "close to the park", "in the village",
    ),
    "vehicle": ("train", "bus", "boat", "car", "plane", "ferry", "tram"),
    "action": (
        "reads", "sleeps", "works", "plays", "sings", "waits", "walks", "writes letters",
        "takes photographs",
    ),
    "feeling": ("happy", "tired", "proud", "nervous", "surprised", "calm", "bored", "excited"),
    "price": ("cheap", "expensive", "free", "fairly priced"),
    "meal": ("bread", "soup", "fruit", "rice", "fish", "cheese", "salad", "cake"),
    "sport": ("football", "tennis", "chess", "swimming", "running", "sailing"),
    "number": ("two", "three", "four", "five", "six", "seven", "ten", "twelve", "twenty"),
    "country": ("France", "Japan", "Brazil", "Canada", "Egypt", "Norway", "India", "Kenya", "Italy", "Peru"),
}
# fmt: on

_SENTENCES = (
    "{person} is {a:job} and lives {where}.",
    "{person} bought {a:colour} {thing} on {day}.",
    "The {building} {where} was {quality} and {quality}.",
    "It was {warmth} and {sky} {time}.",
    "On {day} {person} took the {vehicle} to {town}.",
    "There is {a:size} {building} in {town}.",
    "{town} is {a:quality} town in {country}.",
    "In {season} the weather in {town} is often {sky}.",
    "{person} has {a:size} {animal} that sleeps {time}.",
    "The {thing} costs {number} coins, which is {price}.",
    "{person} was {feeling} because the {vehicle} was late.",
    "{person} usually {action} {time}.",
    "We had {meal} and {meal}, but {person} only wanted {meal}.",
    "The {job} gave {person} {a:quality} {thing}.",
    "You can see the {building} from the {vehicle}.",
    "If it is {sky}, {person} stays at home and {action}.",
    "They play {sport} for {number} hours every {day}.",
    "Do you know {person}? The {job} is looking for the {thing}.",
    "The rooms are {size}, and the people who work there are {quality}.",
    "It does not have a garden, but it has {number} rooms.",
    "{person} visited {country} with {number} friends last {season}.",
    "The {quality} {building} opens at {number} and closes {time}.",
)

# Records: the fields of a domain in order, and sentences that use all of them.
_RECORDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("town", "sky", "warmth", "day"),
        ("On {day} {town} will be {sky} and {warmth}.", "Expect {a:warmth}, {sky} {day} for {town}."),
    ),
    (
        ("person", "job", "country"),
        (
            "{person} comes from {country} and works as {a:job}.",
            "{person}, born in {country}, became {a:job}.",
        ),
    ),
    (
        ("title", "building", "quality", "where"),
        (
            "The {quality} {building} {where} is known as {title}.",
            "{title} stands {where}, {a:quality} {building}.",
        ),
    ),
    (
        ("title", "thing", "colour", "price"),
        ("At {title} {a:colour} {thing} is {price}.", "{title} sells {a:colour} {thing}. It is {price}."),
    ),
    (
        ("animal", "colour", "size", "person"),
        ("{person} owns {a:size} {colour} {animal}.", "The {colour} {animal} of {person} is {size}."),
    ),
    (
        ("town", "vehicle", "number", "day"),
        (
            "{number} times every {day} {a:vehicle} leaves {town}.",
            "From {town} the {vehicle} goes {number} times on {day}.",
        ),
    ),
)

# fmt: off
_ONSETS = (
    "b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w",
    "br", "cl", "dr", "fl", "gr", "st", "tr",
)
# fmt: on
_VOWELS, _CODAS = ("a", "e", "i", "o", "u"), ("n", "r", "l", "m", "s", "t", "ck", "nd", "rt")
RECORD_SHARE = 0.5


def documents(seed: int) -> Iterator[str]:
    """An endless, deterministic sequence of short documents."""
    rng = random.Random(seed)
    while True:
        yield _record(rng) if rng.random() < RECORD_SHARE else _story(rng)


def _story(rng: random.Random) -> str:
    """Two to five sentences."""
    return " ".join(_fill(rng.choice(_SENTENCES), {}, rng) for _ in range(rng.randint(2, 5)))


def _record(rng: random.Random) -> str:
    """One record and its sentence; names are often made up, so that copying them has to be learnt."""
    fields, templates = rng.choice(_RECORDS)
    values = {field: _value(field, rng) for field in fields}
    listed = list(fields)
    rng.shuffle(listed)
    mr = ", ".join(f"{field}[{values[field]}]" for field in listed)
    return f"{mr} => {_fill(rng.choice(templates), values, rng)}"


def _value(field: str, rng: random.Random) -> str:
    if field == "town":
        return _made_up(rng)
    if field == "title":
        return rng.choice((f"The {_made_up(rng)} {_made_up(rng)}", f"{_made_up(rng)} {_made_up(rng)}"))
    return rng.choice(_WORDS[field])


def _made_up(rng: random.Random) -> str:
    """A capitalised word that does not exist, of two syllables."""
    syllables = [
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(("", rng.choice(_CODAS))) for _ in range(2)
    ]
    return "".join(syllables).capitalize()


def _fill(template: str, values: dict[str, str], rng: random.Random) -> str:
    """Fills ``{field}`` and ``{a:field}`` (with its article) from left to right; capitalises the start."""
    text = ""
    for piece in template.split("{"):
        head, closed, tail = piece.partition("}")
        if closed:
            article, _, field = head.rpartition(":")
            value = values.get(field) or _value(field, rng)
            text += (("an " if value[0].lower() in "aeiou" else "a ") if article else "") + value + tail
        else:
            text += piece
    return text[0].upper() + text[1:]
