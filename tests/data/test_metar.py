"""Weather reports in METAR's notation: every sentence says what its codes mean, read by rules of the test's own."""

import re
from collections import Counter

import torch

from hsplit_flwr.data.metar import SLOTS, STATIONS, metar_examples
from hsplit_flwr.data.restaurants import partition_by_slot
from hsplit_flwr.data.text_batches import TextBatches
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles

TRAIN, HELD_OUT = metar_examples()
EXAMPLES = TRAIN + HELD_OUT
COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
TEENS = [f"{start}teen" for start in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
COVERS = {"FEW": "few clouds", "SCT": "scattered clouds", "BKN": "broken clouds", "OVC": "overcast"}
FALLING = {"RA": "rain", "SN": "snow", "DZ": "drizzle", "BR": "mist", "FG": "fog", "TS": "thunderstorm", "GR": "hail"}


def number(digits: str) -> str:
    return [*SMALL, *TEENS, "twenty"][int(digits)]


def degrees(code: str) -> str:
    return f"minus {number(code[1:])}" if code.startswith("M") else number(code)


def read(slot: str, code: str) -> list[str]:
    """Texts that a sentence must have for `code`."""
    if slot == "wind":
        compass = COMPASS[round(int(code[:3]) / 45) % 8]
        return [f"{compass} wind of {number(code[3:5])} knots", f"from the {compass} at {number(code[3:5])} knots"]
    if slot == "weather":
        strength = {"-": "light ", "+": "heavy "}.get(code[0], "")
        return [strength + FALLING[code.lstrip("+-")]]
    if slot == "clouds":
        return [f"{COVERS[code[:3]]} at {number(code[3:5])} thousand feet"]
    if slot == "temperature":
        air, dew = map(degrees, code.split("/"))
        return [f"It is {air}, dew point {dew}.", f"Air {air}, dew point {dew}."]
    return [STATIONS[code]]


def test_sizes_and_several_different_sentences() -> None:
    assert (len(TRAIN), len(HELD_OUT)) == (1600, 320)
    assert set(Counter(example.mr for example in EXAMPLES).values()) == {4}
    assert len({(example.mr, example.ref) for example in EXAMPLES}) == 1920


def test_no_report_is_in_both_parts_and_the_seed_decides() -> None:
    assert not {example.mr for example in TRAIN} & {example.mr for example in HELD_OUT}
    assert metar_examples(0) == (TRAIN, HELD_OUT)
    assert metar_examples(1)[0] != TRAIN


def test_a_report_is_its_groups_in_order() -> None:
    for example in EXAMPLES:
        assert example.mr == " ".join(example.slots.values())
        assert list(example.slots) == [slot for slot in SLOTS if slot in example.slots]
        assert len(example.slots) >= 3
        assert re.fullmatch(r"[A-Z]{4} \d{5}KT( [+-]?[A-Z]{2})?( [A-Z]{3}\d{3})?( M?\d\d/M?\d\d)?", example.mr), example


def test_every_sentence_says_each_group_and_no_other() -> None:
    for example in EXAMPLES:
        for slot, code in example.slots.items():
            assert any(text in example.ref for text in read(slot, code)), (slot, example)
        assert ("dew point" in example.ref) == ("temperature" in example.slots)
        assert ("feet" in example.ref) == ("clouds" in example.slots)
        assert any(word in example.ref for word in FALLING.values()) == ("weather" in example.slots)
        assert re.fullmatch(r"[A-Z](?!.*  )[A-Za-z ,:.]*\.", example.ref), example


def test_the_dew_point_is_below_the_air() -> None:
    for example in EXAMPLES:
        if "temperature" in example.slots:
            air, dew = (int(code.replace("M", "-")) for code in example.slots["temperature"].split("/"))
            assert dew < air


def test_stations_are_spread_unevenly_and_nobody_loses_an_example() -> None:
    parts = partition_by_slot(TRAIN, "station", 5, 0.3, 0)
    assert sum(map(len, parts)) == len(TRAIN)
    largest = [max(Counter(e.slots["station"] for e in part).values()) / len(part) for part in parts]
    assert max(largest) > 0.3  # 1/8 where stations are even
    assert {example.slots["station"] for example in TRAIN} == set(STATIONS)


def test_every_row_fits_and_no_sentence_is_cut() -> None:
    tokenizer = ModelFiles.resolve(str(tiny_checkpoint())).tokenizer()
    batches = TextBatches(EXAMPLES, tokenizer, batch_size=4, max_length=96)
    assert (batches.truncated, batches.dropped) == (0, 0)


def test_the_embedded_model_can_hardly_tell_digits_apart() -> None:
    """What the shift rests on: no digit was in pretraining, every letter was."""
    files = ModelFiles.resolve(str(tiny_checkpoint()))
    embeddings, tokenizer = files.read("transformer.wte.weight"), files.tokenizer()

    def mean_cosine(characters: str) -> float:
        rows = torch.nn.functional.normalize(embeddings[tokenizer.convert_tokens_to_ids(list(characters))], dim=1)
        cosines = rows @ rows.T
        return float((cosines.sum() - len(rows)) / (len(rows) ** 2 - len(rows)))

    assert mean_cosine("0123456789") > 0.95
    assert mean_cosine("abcdefghijklmnopqrstuvwxyz") < 0.4
