"""Rows as long as a model takes them: what is too long is cut or left out, and counted; or rows are packed.

Packing is concatenation, as TRL's strategy ``wrapped``: all documents one after another, each with its own end, cut
into rows of the longest length. A document then sees what stands before it in its row, and may be cut anywhere. To keep
documents apart in one row takes positions that begin anew and a mask between them, which neither head nor tail has:
that kind of packing (TRL's ``bfd``) is refused.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from hsplit_flwr.common.checks import require, require_whole
from hsplit_flwr.data.token_row import TokenRow
from hsplit_flwr.errors import ConfigError

TOO_LONG = ("drop", "cut")
PACKINGS = ("none", "wrapped")


@dataclass(frozen=True)
class Fit:
    """How rows are made to fit."""

    max_length: int
    """tokens of the longest row"""
    too_long: str = "cut"
    """one of `TOO_LONG`; without meaning where rows are packed"""
    packing: str = "none"
    """one of `PACKINGS`"""

    def __post_init__(self) -> None:
        require_whole("max_length", self.max_length, 2)
        require(self.too_long in TOO_LONG, "too_long", f"as one of {TOO_LONG}", self.too_long)
        if self.packing not in PACKINGS:
            raise ConfigError(
                f"Expected packing as one of {PACKINGS}, found {self.packing!r}. Kinds that keep documents apart in "
                "one row need positions and masks that do not travel between head and tail."
            )


@dataclass(frozen=True)
class Fitted:
    """Rows that fit, and what became of the others."""

    rows: Sequence[TokenRow]
    documents: int
    """given"""
    cut: int
    """rows that were too long and lost their end"""
    dropped: int
    """rows that were too long and are left out"""
    idle: int
    """rows without a target (the prompt alone fills the row, nobody answers), left out"""
    first: str
    """the place of the first row that is not there as it was given; empty: all are"""

    def __str__(self) -> str:
        tokens, targets = sum(len(row.ids) for row in self.rows), sum(row.targets for row in self.rows)
        said = [f"{self.documents} documents, {len(self.rows)} rows, {tokens} tokens, {targets} of them learned"]
        said += [f"{self.cut} too long and cut"] if self.cut else []
        said += [f"{self.dropped} too long and left out"] if self.dropped else []
        said += [f"{self.idle} with nothing to learn left out"] if self.idle else []
        return "; ".join(said) + (f" (the first: {self.first})" if self.first else "")


def fit_rows(rows: Iterable[tuple[str, TokenRow]], fit: Fit) -> Fitted:
    """All of `rows`, each with the place it comes from, that there is something to learn of; maybe none."""
    if fit.packing == "wrapped":
        documents = [row for _, row in rows]
        packed = wrapped(documents, fit.max_length)
        learned = [row for row in packed if row.targets]
        return Fitted(learned, len(documents), 0, 0, len(packed) - len(learned), "")
    kept: list[TokenRow] = []
    touched: list[str] = []
    documents_given = cut = dropped = idle = 0
    for place, row in rows:
        documents_given += 1
        too_long = len(row.ids) > fit.max_length
        fitting = TokenRow(row.ids[: fit.max_length], row.labels[: fit.max_length])
        left_out = too_long and fit.too_long == "drop"
        dropped += left_out
        idle += not left_out and not fitting.targets
        cut += too_long and not left_out and bool(fitting.targets)
        if too_long or not fitting.targets:
            touched.append(place)
        if not left_out and fitting.targets:
            kept.append(fitting)
    return Fitted(kept, documents_given, cut, dropped, idle, touched[0] if touched else "")


def wrapped(rows: Sequence[TokenRow], length: int) -> list[TokenRow]:
    """All `rows` one after another, cut every `length` tokens; the last row may be shorter.

    TRL begins a new row after every 1,000 documents, because it packs that many at a time; here none is begun.
    """
    ids, labels = ([*chain.from_iterable(part)] for part in ((r.ids for r in rows), (r.labels for r in rows)))
    return [TokenRow(ids[at : at + length], labels[at : at + length]) for at in range(0, len(ids), length)]
