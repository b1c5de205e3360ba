"""Rows of activations that the tail keeps, so that a frozen head sends each of them once.

A row is known by a hash of its bytes as they travel, whatever they were computed from. So a reference stands for those
very bytes, whatever became of batches, weights, cuts or codecs since: what is trained on is the same to the bit, and
nothing about the head needs to be believed. A row whose bytes have changed is simply another one.

Tail and head keep the same table of a client's rows, as the two ends of HTTP/2 do with its headers (HPACK, RFC 7541):
with every frame the same rows come in, and those that were not used for longest leave. The tail's table has their
bytes, the head's only how many they are. At the start of a round the tail tells what it holds (`told`), since a head's
process may be another one by then. Where they differ all the same, the tail refuses the reference (``unknown_rows``),
and the head sends whole rows (`remote_tail.py`). How frames refer to rows: `row_references.py`.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.codecs import Layout, Part

UNKNOWN_ROWS = "unknown_rows"
"""code of a refusal after which a head sends whole rows, and its round goes on"""
DIGEST_BYTES = 16
LEAST_ROW_BYTES = 256
"""smaller rows are not kept: there is little to save"""
MOST_ROWS = 1 << 16
"""of a client that is told of them at the start of a round: it has to remember them"""
ENTRY_BYTES = 512
"""the most that a row takes in a table beside its own bytes: Python objects, a place in a dictionary"""
_TOLD_DIGESTS, _TOLD_SIZES = "digests", "sizes"


class PackedRow(NamedTuple):
    """What of a row of a batch travels."""

    digest: bytes
    size: int
    """bytes"""
    data: bytes | None
    """None: at the head, which has no use for it"""


class KeptRows:
    """One client's table of rows, at the tail or at the head. Safe to use from many threads.

    Args:
        limit_bytes: that all rows may take, `ENTRY_BYTES` of each included.
        rows: to begin with, the one that was not used for longest first.
    """

    def __init__(self, limit_bytes: int, rows: Iterable[PackedRow] = ()) -> None:
        self._limit_bytes = limit_bytes
        self._rows: OrderedDict[bytes, PackedRow] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self.note(rows)

    @property
    def limit_bytes(self) -> int:
        """The most that it takes."""
        return self._limit_bytes

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self._bytes

    @property
    def count(self) -> int:
        """Rows in it."""
        return len(self._rows)

    def get(self, digest: bytes) -> PackedRow | None:
        """The row of that hash; None: it is not in the table."""
        return self._rows.get(digest)

    def note(self, rows: Iterable[PackedRow]) -> None:
        """Rows of a frame, in their order: they are the last used ones now."""
        with self._lock:
            for row in rows:
                if row.size < LEAST_ROW_BYTES or ENTRY_BYTES + row.size > self._limit_bytes:
                    continue
                if self._rows.pop(row.digest, None) is None:
                    self._bytes += ENTRY_BYTES + row.size
                self._rows[row.digest] = row
                self._shrink(self._limit_bytes)

    def limit(self, limit_bytes: int, most_rows: int) -> None:
        """Take no more than `limit_bytes` from now on, and no more rows than that for now."""
        with self._lock:
            self._limit_bytes = limit_bytes
            self._shrink(limit_bytes, most_rows)

    def clear(self) -> None:
        """Keep nothing of what is there."""
        with self._lock:
            self._shrink(0)

    def told(self) -> dict[str, Tensor]:
        """The tensors of a ``kept`` frame: digests (K, 16) uint8 and sizes (K,) int32."""
        with self._lock:
            rows = list(self._rows.values())
        sizes = torch.tensor([row.size for row in rows], dtype=torch.int32)
        return {_TOLD_DIGESTS: digest_tensor(row.digest for row in rows), _TOLD_SIZES: sizes}

    @classmethod
    def of_told(cls, tensors: Mapping[str, Tensor], limit_bytes: int) -> Self:
        """The head's table, of the tensors of a ``kept`` frame.

        Raises:
            ExchangeError: ``wrong_tensors``: they are not those.
        """
        found = {name: Part(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        layout = told_layout(tensors[_TOLD_SIZES].numel() if _TOLD_SIZES in tensors else 0)
        if found != layout:
            raise ExchangeError("wrong_tensors", f"Expected what the tail keeps as {layout}, found {found!r:.200}.")
        digests, sizes = digest_list(tensors[_TOLD_DIGESTS]), tensors[_TOLD_SIZES].tolist()
        return cls(limit_bytes, map(PackedRow, digests, sizes, [None] * len(sizes)))

    def _shrink(self, limit_bytes: int, most_rows: int | None = None) -> None:
        while self._bytes > limit_bytes or (most_rows is not None and len(self._rows) > most_rows):
            _, row = self._rows.popitem(last=False)
            self._bytes -= ENTRY_BYTES + row.size


class ActivationCache:
    """The tail's tables of all clients, each with the same share; also of those that are away, which may come back.

    Args:
        limit_bytes: that all of them may take; 0: there are none.
        most_rows: that a client is told of at the start of a round.
    """

    def __init__(self, limit_bytes: int, most_rows: int) -> None:
        self._limit_bytes = limit_bytes
        self._most_rows = most_rows
        self._tables: dict[str, tuple[int, KeptRows]] = {}

    @property
    def nbytes(self) -> int:
        """What all tables take."""
        return sum(table.nbytes for _, table in self._tables.values())

    def open_round(self, cuts: Mapping[str, int], frozen: Collection[str]) -> None:
        """Settle the shares of a round.

        Args:
            cuts: client -> blocks of its head. Rows of another cut than the last one are given up.
            frozen: the clients whose heads train nothing: the others' activations never come again.
        """
        if not self._limit_bytes:
            return
        for client, cut in cuts.items():
            held = self._tables.get(client)
            if client not in frozen:
                self._tables.pop(client, None)
            elif held is None or held[0] != cut:
                self._tables[client] = cut, KeptRows(0)
        for _, table in self._tables.values():
            table.limit(self._limit_bytes // len(self._tables), self._most_rows)

    def of(self, client: str) -> KeptRows | None:
        """The table of `client`; None: it has none."""
        _, table = self._tables.get(client, (0, None))
        return table


def told_layout(count: int) -> Layout:
    """The tensors of a ``kept`` frame that tells of `count` rows."""
    return {_TOLD_DIGESTS: Part((count, DIGEST_BYTES), torch.uint8), _TOLD_SIZES: Part((count,), torch.int32)}


def digest_tensor(digests: Iterable[bytes]) -> Tensor:
    """(K, 16) uint8 of digests."""
    joined = bytearray(b"".join(digests))
    if not joined:
        return torch.empty((0, DIGEST_BYTES), dtype=torch.uint8)
    return torch.frombuffer(joined, dtype=torch.uint8).view(-1, DIGEST_BYTES)


def digest_list(digests: Tensor) -> list[bytes]:
    """The digests in a tensor (K, 16) uint8."""
    return [bytes(digest) for digest in digests.numpy()]
