"""References to rows of activations that the tail keeps (`kept_rows.py`), in the frames of batches.

    kept.rows       (K,) int32: numbers of the rows that are referred to, in order
    kept.digests    (K, 16) uint8: hashes of their bytes

Shapes: B rows, N positions that travel, K rows that are referred to.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.codecs import Layout, Part
from hsplit_flwr.exchange.kept_rows import DIGEST_BYTES, UNKNOWN_ROWS, KeptRows, PackedRow, digest_list, digest_tensor

REFERENCE_BYTES = DIGEST_BYTES + 4
LEAST_SAVED_BYTES = 256
"""of a frame, or its rows are sent whole: so much may the names of the references take"""
_ROWS, _DIGESTS = "kept.rows", "kept.digests"


def reference_layout(count: int) -> Layout:
    """The tensors that refer to `count` rows; none for 0."""
    if not count:
        return {}
    return {_ROWS: Part((count,), torch.int32), _DIGESTS: Part((count, DIGEST_BYTES), torch.uint8)}


def references_in(tensors: Mapping[str, Tensor]) -> int:
    """How many rows a frame refers to, or claims to; its tensors need not be checked yet."""
    return max(1, len(tensors[_ROWS])) if _ROWS in tensors and tensors[_ROWS].ndim else 0


def refer(packed: Mapping[str, Tensor], counts: Sequence[int], kept: KeptRows) -> dict[str, Tensor]:
    """What travels of the `packed` parts (N, ...) of a batch whose rows have `counts` positions (at the head).

    Rows of the table `kept` are left out and referred to, where that saves anything. The rows are noted there.
    """
    packed = {name: part.cpu() for name, part in packed.items()}
    rows = _rows_of(packed, counts, with_data=False)
    known = [number for number, row in enumerate(rows) if kept.get(row.digest)]
    saved = sum(rows[number].size - REFERENCE_BYTES for number in known)
    kept.note(rows)
    if saved < LEAST_SAVED_BYTES:
        return packed
    places = _places(counts, set(range(len(counts))).difference(known))
    return {
        **{name: part[places] for name, part in packed.items()},
        _ROWS: torch.tensor(known, dtype=torch.int32),
        _DIGESTS: digest_tensor(rows[number].digest for number in known),
    }


def referred(tensors: Mapping[str, Tensor], rows: int) -> list[int]:
    """Which of a batch's `rows` rows are referred to; the references have their shapes and dtypes.

    Raises:
        ExchangeError: ``wrong_rows``.
    """
    if _ROWS not in tensors:
        return []
    numbers: list[int] = tensors[_ROWS].tolist()
    if any(first >= second for first, second in pairwise([-1, *numbers, rows])):
        raise ExchangeError("wrong_rows", f"Expected rows of a batch of {rows} in order, found {numbers!r:.100}.")
    return numbers


def restored(
    tensors: Mapping[str, Tensor], layout: Layout, counts: Sequence[int], kept: KeptRows
) -> tuple[dict[str, Tensor], list[PackedRow]]:
    """The parts of `layout`, whole, and the batch's rows to note once all is checked (at the tail).

    Args:
        tensors: of a frame, of the right names, shapes and dtypes.
        layout: of the whole batch.
        counts: positions of each row.
        kept: the client's own table.

    Raises:
        ExchangeError: ``unknown_rows``: a row that is not there, or has another number of positions.
    """
    numbers = referred(tensors, len(counts))
    sent = {name: tensors[name] for name in layout}
    sent_counts = [0 if number in numbers else count for number, count in enumerate(counts)]
    rows = _rows_of(sent, sent_counts, with_data=True)
    per_position = sum(part.nbytes for part in layout.values()) // max(1, sum(counts))
    for number, digest in zip(numbers, digest_list(tensors[_DIGESTS]) if numbers else (), strict=True):
        row = kept.get(digest)
        if row is None or row.size != counts[number] * per_position:
            raise ExchangeError(
                UNKNOWN_ROWS,
                f"Expected references to rows that the tail keeps of this client, found another one in row {number}. "
                "It sends its rows whole until the end of the round.",
            )
        rows[number] = row
    if not numbers:
        return sent, rows
    whole = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in layout.items()}
    ends = list(accumulate(counts, initial=0))
    for (start, stop), row in zip(pairwise(ends), rows, strict=True):
        _unpack(row, {name: part[start:stop] for name, part in whole.items()})
    return whole, rows


def _rows_of(packed: Mapping[str, Tensor], counts: Sequence[int], *, with_data: bool) -> list[PackedRow]:
    """The rows of parts (N, ...), each with the bytes of its positions, part by part."""
    flat = [part.contiguous().view(torch.uint8).flatten(1).numpy() for part in packed.values()]
    rows = []
    for start, stop in pairwise(accumulate(counts, initial=0)):
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for part in flat:
            digest.update(part[start:stop].data)
        data = b"".join(part[start:stop].tobytes() for part in flat) if with_data else None
        rows.append(PackedRow(digest.digest(), sum(part[start:stop].nbytes for part in flat), data))
    return rows


def _unpack(row: PackedRow, into: Mapping[str, Tensor]) -> None:
    """Put the bytes of a row, part by part, where they belong."""
    assert row.data is not None
    start = 0
    for part in into.values():
        if part.numel():
            data = torch.frombuffer(bytearray(row.data[start : start + part.nbytes]), dtype=part.dtype)
            part.copy_(data.view(part.shape))
            start += part.nbytes


def _places(counts: Sequence[int], rows: Collection[int]) -> Tensor:
    """The positions (of N) that belong to `rows`."""
    marks = torch.tensor([number in rows for number in range(len(counts))])
    return marks.repeat_interleave(torch.tensor(counts)).nonzero().squeeze(1)
