"""The text that the tiny checkpoint is pretrained on: English of many topics, made by a grammar of our own.

Travel, weather, hotels, shops, homes, people, animals, sport and work, as short stories and as records
(``town[Marlow], sky[cloudy] => ...``) whose values are repeated in the sentence; lists of arbitrary values
teach copying. The words of `hsplit_flwr.data.restaurants` occur, as in any general corpus, but no restaurant and
none of its templates: federated fine-tuning is to learn those.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

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
    "sport": ("football", "tennis", "chess", "hockey", "cards", "golf"),
    "number": ("two", "three", "four", "five", "six", "seven", "ten", "twelve", "twenty"),
    "country": ("France", "Japan", "Brazil", "Canada", "Egypt", "Norway", "India", "Kenya", "Italy", "Peru"),
    "grade": ("poor", "fair", "good", "excellent"),
    "people": ("families", "children", "adults", "guests", "students", "visitors"),
    "origin": (
        "Thai", "Mexican", "Greek", "Korean", "Lebanese", "Spanish", "Ethiopian", "Vietnamese", "French",
        "Polish", "Irish", "Dutch",
    ),
    "cost": (
        "low-cost", "inexpensive", "moderately priced", "mid-priced", "reasonably priced", "pricey",
        "high-end", "cheap", "expensive",
    ),
    "landmark": (
        "Opera House", "North Station", "Botanic Park", "Town Library", "Ferry Pier", "Science Museum",
        "City Hall", "South Gate", "Old Mill", "Market Square",
    ),
    "district": ("riverside", "old town", "market", "university", "harbour", "station", "garden", "castle"),
    "house": ("bistro", "diner", "tavern", "tea room", "canteen", "grill", "kitchen", "cellar", "office", "barn"),
    "plain": (
        "blue", "copper", "old", "silver", "quiet", "golden", "crooked", "paper", "stone", "lucky", "painted",
        "midnight", "maple", "salt", "amber", "iron", "wild", "winter", "royal", "velvet", "broken", "early",
        "happy", "wooden", "secret", "little", "grand", "lonely", "purple", "northern",
    ),
    "noun": (
        "otter", "kettle", "lantern", "spoon", "harbour", "fig", "sparrow", "table", "anchor", "garden", "barrel",
        "fox", "oven", "bridge", "pepper", "clock", "mirror", "candle", "river", "feather", "window", "ladder",
        "wolf", "apple", "button", "violin", "island", "pencil", "tiger", "meadow",
    ),
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
    "The guests of {title} gave it {a:grade} review.",
    "The reviews of the play were {grade}, and its rating was {grade}.",
    "{person} is looking for {a:plain} {noun} in the {district} district.",
    "Many {people} like the {landmark}, but few {people} find it.",
    "This {thing} is meant for {people} only, as it is rated {grade}.",
    "The {house} of the {building} is located next to the {landmark}.",
    "The {house} is no place for a child, {person} says, and poorly lit.",
    "Looking at the {noun}, {person} is serving {meal}. You are welcome.",
    "They called the {animal} {title}, and it welcomes all {people}.",
    "{person} serves {meal} to {number} {people} from the {district} area.",
    "For {people} a walk to the {landmark} is a fine choice, and you will like it.",
    "It is a short way from the {house} to the {landmark}, close to the {district} quarter.",
    "{a:origin} {job} named {person} does not want {a:cost} {thing}.",
    "The {thing} has {number} buttons and a menu that can be found near the {noun}.",
    "If you want to try {a:origin} {sport} game, visit {title} down in the {district}.",
    "{person} reads that the {house} of {title} gets {a:plain} {noun} and is well rated by its {people}.",
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
# The list record: any of these keys with any of these values, to be looked up by key.
_KEYS = (
    "name", "area", "near", "kind", "colour", "owner", "price", "size", "food", "rating", "event", "subject",
)
_VALUES = ("title", "plain", "noun", "origin", "cost", "landmark", "district", "house", "grade", "person", "people")

_ONSETS = (
    "b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w",
    "br", "cl", "dr", "fl", "gr", "st", "tr",
)
# fmt: on
_VOWELS, _CODAS = ("a", "e", "i", "o", "u"), ("n", "r", "l", "m", "s", "t", "ck", "nd", "rt")


def documents(seed: int) -> Iterator[str]:
    """An endless, deterministic sequence of short documents."""
    rng = random.Random(seed)
    while True:
        yield rng.choice((_story, _story, _record, _list, _list))(rng)


def _story(rng: random.Random) -> str:
    """Two to five sentences."""
    return " ".join(_fill(rng.choice(_SENTENCES), {}, rng) for _ in range(rng.randint(2, 5)))


def _record(rng: random.Random) -> str:
    """One record and its sentence."""
    fields, templates = rng.choice(_RECORDS)
    values = {field: _value(field, rng) for field in fields}
    listed = rng.sample(fields, len(fields))
    return f"{_brackets(listed, values)} => {_fill(rng.choice(templates), values, rng)}"


def _list(rng: random.Random) -> str:
    """Keys with arbitrary values, and a sentence that gives the values of some in another order."""
    keys = rng.sample(_KEYS, rng.randint(2, 6))
    values = {key: _value(rng.choice(_VALUES), rng) for key in keys}
    said = [f"its {key} is {values[key]}" for key in rng.sample(keys, min(len(keys), 4))]
    text = f"{', '.join(said[:-1])} and {said[-1]}."
    return f"{_brackets(keys, values)} => {text[0].upper()}{text[1:]}"


def _brackets(keys: Sequence[str], values: Mapping[str, str]) -> str:
    return ", ".join(f"{key}[{values[key]}]" for key in keys)


def _value(field: str, rng: random.Random) -> str:
    if field == "town":
        return _made_up(rng)
    if field == "title":
        return f"The {_value('plain', rng).capitalize()} {_value('noun', rng).capitalize()}"
    return rng.choice(_WORDS[field])


def _made_up(rng: random.Random) -> str:
    """A capitalised word that does not exist, of two syllables."""
    syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(("", rng.choice(_CODAS))) for _ in range(2)]
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
