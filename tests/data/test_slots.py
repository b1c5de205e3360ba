"""Slots that a text gets right, on texts whose answer is plain."""

import pytest

from hsplit_flwr.data.restaurants import restaurant_examples
from hsplit_flwr.data.slots import SlotScore, judged_slots, score_slots
from hsplit_flwr.data.text_batches import prompt_text

EAGLE = "name[The Eagle], eatType[coffee shop], food[French], near[Burger King], familyFriendly[yes]"
GOLDEN = "name[The Golden Palace], food[Thai], near[The Eagle]"


def score(*pairs: tuple[str, str]) -> SlotScore:
    found = score_slots(pairs)
    assert found is not None
    return found


def test_every_value_that_the_text_says_is_right_in_whatever_case() -> None:
    found = score((EAGLE, "Near Burger King, the eagle is a Coffee Shop with FRENCH food."))
    assert (found.prompts, found.right, found.total, found.share) == (1, 4, 4, 1.0)


def test_a_value_is_whole_words() -> None:
    assert score(("name[The Fig]", "The Figs is a bistro.")).right == 0
    assert score(("name[The Fig]", "Try The Fig, a bistro.")).right == 1
    assert score(("area[caf\u00e9 (old)]", "It is in the caf\u00e9 (old).")).right == 1


def test_another_restaurants_value_beside_the_right_one_is_wrong() -> None:
    pairs = [(EAGLE, "The Eagle is a coffee shop near Burger King with French and Thai food."), (GOLDEN, "")]
    assert score(*pairs).right_by_slot["food"] == 0.0
    assert score(pairs[0]).right_by_slot["food"] == 1.0  # nobody else here has Thai food


def test_a_landmark_that_is_another_restaurants_name_is_right() -> None:
    found = score((EAGLE, "-"), (GOLDEN, "The Golden Palace near The Eagle serves Thai food."))
    assert found.right_by_slot == {"name": 0.5, "eatType": 0.0, "food": 0.5, "near": 0.5}
    assert (found.right, found.total) == (3, 7)


def test_paraphrased_slots_and_yes_or_no_count_neither_way() -> None:
    mr = "name[Cotto], priceRange[cheap], customer rating[5 out of 5], rating[good], childFriendly[no]"
    assert judged_slots(mr) == {"name": "Cotto"}
    assert score((mr, "Cotto.")).total == 1


@pytest.mark.parametrize("prompt", ["", "Once upon a time", "name : Alimentum", "rating[good], familyFriendly[no] =>"])
def test_other_prompts_are_not_measured(prompt: str) -> None:
    assert score_slots([(prompt, "The Eagle")]) is None
    assert score(("name[The Eagle]", "The Eagle"), (prompt, "nothing")).prompts == 1
    assert score_slots([]) is None


def test_our_own_sentences_say_all_their_slots_and_no_others() -> None:
    _, held_out = restaurant_examples()
    found = score(*((prompt_text(example.mr), example.ref) for example in held_out))
    assert (found.prompts, found.share) == (320, 1.0)
    others = [*held_out[4:], *held_out[:4]]
    swapped = score(*((prompt_text(a.mr), b.ref) for a, b in zip(held_out, others, strict=True)))
    assert swapped.right_by_slot["name"] == 0.0
    assert swapped.share < 0.2
