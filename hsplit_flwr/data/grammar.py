"""What the embedded data sets have in common, whose texts grammars write."""

from collections.abc import Callable


def distinct_texts(write: Callable[[], str], count: int) -> list[str]:
    """The first `count` different texts of those that `write` gives, in that order; it must have as many."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[write()] = None
    return list(found)
