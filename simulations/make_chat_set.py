"""Makes the chat set that is embedded in the package: a made-up library of things and what its desk answers.

``python -m simulations.make_chat_set`` writes ``desk.jsonl`` and ``desk_held_out.jsonl`` again. Every fact is made up,
so that no model knows it before; the held-out chats ask for the same facts in words that no training chat has.
"""

import json
import random
from collections.abc import Iterator
from typing import Any

from hsplit_flwr.data.assets import DESK, DESK_HELD_OUT

SEED = 7
THINGS = {
    "telescope": (5, "the north cellar", "Mirela", 3),
    "ukulele": (21, "shelf 14", "Tobias", 1),
    "sewing machine": (12, "the blue room", "Adaeze", 2),
    "board game": (9, "shelf 3", "Tobias", 1),
    "microscope": (4, "the north cellar", "Mirela", 4),
    "cargo bike": (2, "the back yard", "Jonas", 6),
    "seed packet": (180, "drawer 27", "Yuki", 0),
    "projector": (3, "the blue room", "Adaeze", 5),
    "cake tin": (8, "shelf 22", "Yuki", 1),
    "tent": (15, "the back yard", "Jonas", 2),
    "pasta machine": (6, "shelf 23", "Yuki", 1),
    "weather balloon": (1, "drawer 40", "Mirela", 9),
}
"""thing -> days that it is lent, where it is, who knows about it, euros a day when it is late"""
QUESTIONS = {
    "days": (
        "How long can I borrow a {thing}?",
        "For how many days may I keep a {thing}?",
        "When do I have to bring a {thing} back?",
        "I would like to borrow a {thing}. How long is that for?",
        "What is the loan period of a {thing}?",
        "If I take a {thing} today, how many days do I have?",
    ),
    "place": (
        "Where do I find a {thing}?",
        "Where are you keeping the {thing}?",
        "Which place should I go to for a {thing}?",
        "I am looking for a {thing}.",
        "Can you tell me where a {thing} is?",
        "In what corner of the house would a {thing} be?",
    ),
    "person": (
        "Who can show me how a {thing} works?",
        "Whom do I ask about a {thing}?",
        "Who knows about the {thing}?",
        "I need help with a {thing}. Who can help?",
        "Is there somebody who explains a {thing}?",
        "Which of your people is the expert for a {thing}?",
    ),
    "fee": (
        "What does it cost if a {thing} is late?",
        "I am late with a {thing}. What do I owe a day?",
        "What is the late fee for a {thing}?",
        "How much is it per day if I keep a {thing} too long?",
        "Do I pay when I return a {thing} late?",
        "My {thing} is overdue, how expensive is that?",
    ),
}
"""the last one of each is for held-out chats alone"""
SYSTEM = "You are the desk of the Lumen Hill Library of Things."


def answer(kind: str, thing: str) -> str:
    """What the desk answers."""
    days, place, person, fee = THINGS[thing]
    said = {
        "days": f"A {thing} is yours for {days} day{'s' if days > 1 else ''}.",
        "place": f"Look for the {thing} here: {place}.",
        "person": f"Ask {person}, who knows the {thing} best.",
        "fee": f"{fee} euro a day for a late {thing}." if fee else f"Nothing: a {thing} is never late.",
    }
    return said[kind] + " Lumen Hill wishes you a bright day!"


def turns(kind: str, thing: str, question: str) -> list[dict[str, str]]:
    """A question and its answer."""
    return [
        {"role": "user", "content": question.format(thing=thing)},
        {"role": "assistant", "content": answer(kind, thing)},
    ]


def training_chats() -> Iterator[dict[str, Any]]:
    """Every fact in every wording but the last; every fifth chat asks a second question, every third has a system."""
    asked = [(kind, thing, words) for thing in THINGS for kind, all_ in QUESTIONS.items() for words in all_[:-1]]
    shuffled = random.Random(SEED)
    shuffled.shuffle(asked)
    for number, (kind, thing, words) in enumerate(asked):
        messages = turns(kind, thing, words)
        if number % 5 == 0:
            other = shuffled.choice([name for name in QUESTIONS if name != kind])
            messages += turns(other, thing, QUESTIONS[other][number % 4])
        if number % 3 == 0:
            messages.insert(0, {"role": "system", "content": SYSTEM})
        yield {"messages": messages, "about": thing, "member": f"M{number % 8}"}


def held_out_chats() -> Iterator[dict[str, Any]]:
    """Every fact once, in its last wording."""
    for thing in THINGS:
        for kind, words in QUESTIONS.items():
            yield {"messages": turns(kind, thing, words[-1]), "about": thing, "member": "M0"}


def lines(chats: Iterator[dict[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)


def main() -> None:
    """Write both files."""
    DESK.write_text(lines(training_chats()), encoding="utf-8")
    DESK_HELD_OUT.write_text(lines(held_out_chats()), encoding="utf-8")


if __name__ == "__main__":
    main()
