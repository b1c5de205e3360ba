"""A data-to-text set in a notation: airport weather reports as codes, and English sentences that read them.

The notation is that of METAR (WMO, FM 15): ``ENGM 24012KT -SN BKN020 M03/M07`` is Oslo, wind from the southwest at
twelve knots, light snow, broken clouds at two thousand feet, three degrees below zero, dew point minus seven. The
embedded model has met neither these codes nor a digit: the digits' embeddings are nearly one (mean cosine 0.98,
letters 0.29), and no word can be copied. Stations are real airports; reports and sentences are made by a grammar of
our own, the same for a seed on every machine. Every sentence says all groups of its report; train and held-out parts
share no report.
"""

import random

from hsplit_flwr.data.grammar import distinct_texts
from hsplit_flwr.data.text_batches import Example

NUM_TRAIN, NUM_HELD_OUT, REFS_PER_REPORT = 400, 80, 4
"""Reports in each part, and different sentences for each of them"""

# fmt: off
STATIONS = {
    "EDDM": "Munich", "EGLL": "London", "ENGM": "Oslo", "LEMD": "Madrid",
    "LFPG": "Paris", "LIMC": "Milan", "LIRF": "Rome", "LOWW": "Vienna",
}
"""Location indicator -> the airport's city"""
WINDS = {
    "360": "north", "040": "northeast", "090": "east", "130": "southeast",
    "180": "south", "240": "southwest", "270": "west", "320": "northwest",
}
"""Degrees that the wind comes from -> the word for it"""
SKY = {"FEW": "few clouds", "SCT": "scattered clouds", "BKN": "broken clouds", "OVC": "overcast"}
WEATHER = {
    "-RA": "light rain", "RA": "rain", "+RA": "heavy rain", "-SN": "light snow", "SN": "snow", "+SN": "heavy snow",
    "DZ": "drizzle", "BR": "mist", "FG": "fog", "TS": "a thunderstorm", "GR": "hail",
}
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on
SLOTS = ("station", "wind", "weather", "clouds", "temperature")
"""Groups in the order of a report; the last three may be missing, but not all"""

_OPENINGS = ("{station} has {wind}", "In {station} {wind}", "{station}: {wind}")
_WINDS = ("a {direction} wind of {speed} knots", "wind from the {direction} at {speed} knots")
_TEMPERATURES = ("It is {air}, dew point {dew}.", "Air {air}, dew point {dew}.")


def metar_examples(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """The train part (1,600 examples of 400 reports) and the held-out part (320 of 80)."""
    rng = random.Random(seed)
    reports: dict[str, dict[str, str]] = {}
    while len(reports) < NUM_TRAIN + NUM_HELD_OUT:
        slots = _random_slots(rng)
        reports[" ".join(slots.values())] = slots
    examples = [Example(report, ref, slots) for report, slots in reports.items() for ref in _references(slots, rng)]
    border = NUM_TRAIN * REFS_PER_REPORT
    return examples[:border], examples[border:]


def _random_slots(rng: random.Random) -> dict[str, str]:
    """Station and wind, and one to three of the other groups."""
    air = rng.randint(-9, 20)
    groups = {
        "station": rng.choice(tuple(STATIONS)),
        "wind": f"{rng.choice(tuple(WINDS))}{rng.randint(2, 20):02}KT",
        "weather": rng.choice(tuple(WEATHER)),
        "clouds": f"{rng.choice(tuple(SKY))}{rng.randint(1, 9):02}0",
        "temperature": f"{_coded(air)}/{_coded(air - rng.randint(1, 6))}",
    }
    chosen = {*SLOTS[:2], *rng.sample(SLOTS[2:], rng.randint(1, 3))}
    return {slot: groups[slot] for slot in SLOTS if slot in chosen}


def _coded(degrees: int) -> str:
    return f"{'M' if degrees < 0 else ''}{abs(degrees):02}"


def _references(slots: dict[str, str], rng: random.Random) -> list[str]:
    """``REFS_PER_REPORT`` different texts, each of which says every group."""
    return distinct_texts(lambda: _realise(slots, rng), REFS_PER_REPORT)


def _realise(slots: dict[str, str], rng: random.Random) -> str:
    """One text: station and wind, what falls and what the sky is like, then the temperatures."""
    direction, speed = WINDS[slots["wind"][:3]], NUMBERS[int(slots["wind"][3:5])]
    wind = rng.choice(_WINDS).format(direction=direction, speed=speed)
    parts = [rng.choice(_OPENINGS).format(station=STATIONS[slots["station"]], wind=wind)]
    if "weather" in slots:
        parts.append(WEATHER[slots["weather"]])
    if "clouds" in slots:
        parts.append(f"{SKY[slots['clouds'][:3]]} at {NUMBERS[int(slots['clouds'][3:5])]} thousand feet")
    listed = [", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts
    first = " and ".join(listed) + "."
    if "temperature" not in slots:
        return first
    air, dew = (_said(coded) for coded in slots["temperature"].split("/"))
    return f"{first} {rng.choice(_TEMPERATURES).format(air=air, dew=dew)}"


def _said(coded: str) -> str:
    return ("minus " if coded.startswith("M") else "") + NUMBERS[int(coded[-2:])]
