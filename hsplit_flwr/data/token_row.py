"""One row of tokens, and which of them are learned: what every form of data becomes. No torch here."""

from typing import NamedTuple

IGNORE = -100
"""The label of a position that has no loss."""


class TokenRow(NamedTuple):
    """Token ids of a row, and the labels of its positions, as many."""

    ids: list[int]
    labels: list[int]
    """the token id where it is learned, `IGNORE` elsewhere; not shifted"""

    @classmethod
    def masked(cls, ids: list[int], learned: list[bool]) -> "TokenRow":
        """The row of `ids` that learns those of its tokens that `learned` says."""
        return cls(ids, [token if one else IGNORE for token, one in zip(ids, learned, strict=True)])

    @property
    def targets(self) -> int:
        """How many tokens are predicted: the first one has nothing before it."""
        return sum(label != IGNORE for label in self.labels[1:])
