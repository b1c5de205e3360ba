"""Rows of activations that the tail keeps: tables and frames, without a transport and without a model."""

import gc
import hashlib
import tracemalloc
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.absence import Absence
from hsplit_flwr.exchange.batches import batch_tensors, check_batch, without_kept
from hsplit_flwr.exchange.codecs import CODECS
from hsplit_flwr.exchange.frames import Header, decode, encode
from hsplit_flwr.exchange.kept_rows import (
    DIGEST_BYTES,
    ENTRY_BYTES,
    LEAST_ROW_BYTES,
    ActivationCache,
    KeptRows,
    PackedRow,
    told_layout,
)
from hsplit_flwr.exchange.positions import BatchForm, traveling
from hsplit_flwr.training.workload import Workload

pytestmark = pytest.mark.timeout(60)

HIDDEN, VOCAB, LIMIT = 64, 11, 1 << 24
HEADER = Header("train", "run", 1, "me", 2)
Batch = tuple[Tensor, Tensor, Tensor]
EXACT = [name for name in CODECS if name != "int4_stochastic"]


def row(number: int, size: int = 1000) -> PackedRow:
    return PackedRow(number.to_bytes(DIGEST_BYTES, "big"), size, bytes(size))


def numbers_in(table: KeptRows) -> list[int]:
    return [int.from_bytes(bytes(digest), "big") for digest in table.told()["digests"].numpy()]


def batch_of(rows: Sequence[int], activations: Tensor, lengths: Sequence[int]) -> Batch:
    """The rows of those numbers, as wide as the longest, padded on the right."""
    width = max(lengths[number] for number in rows)
    mask = torch.zeros(len(rows), width)
    labels = torch.full((len(rows), width), -100)
    for place, number in enumerate(rows):
        mask[place, : lengths[number]] = 1
        labels[place, 1 : lengths[number]] = number % VOCAB
    return activations[list(rows), :width], mask, labels


def sent(batch: Batch, codec: str, head: KeptRows) -> bytes:
    tensors = batch_tensors(*batch, CODECS[codec])
    return encode(HEADER, without_kept(tensors, *batch[1:], CODECS[codec], head))


def arrived(frame: bytes, codec: str, tail: KeptRows | None) -> Batch:
    tensors = decode(frame, LIMIT).tensors
    return check_batch(tensors, codec=CODECS[codec], hidden_size=HIDDEN, vocab_size=VOCAB, kept=tail)


# ---------------------------------------------------------------------------------------------- tables


def test_the_row_that_was_not_used_for_longest_leaves_first() -> None:
    table = KeptRows(3 * (1000 + ENTRY_BYTES))
    table.note([row(0), row(1), row(2)])
    table.note([row(0)])
    table.note([row(3)])
    assert numbers_in(table) == [2, 0, 3]
    assert (table.count, table.nbytes) == (3, 3 * (1000 + ENTRY_BYTES))
    table.note([row(4, 2000)])
    assert numbers_in(table) == [3, 4]


def test_rows_that_are_too_small_or_too_large_are_not_kept() -> None:
    table = KeptRows(1000 + ENTRY_BYTES)
    table.note([row(0, LEAST_ROW_BYTES - 1), row(1, 1001), row(2, 0)])
    assert (table.count, table.nbytes) == (0, 0)
    table.note([row(3, LEAST_ROW_BYTES), row(4, 1000)])
    assert numbers_in(table) == [4]


def test_a_smaller_limit_holds_at_once() -> None:
    table = KeptRows(LIMIT, map(row, range(5)))
    table.limit(LIMIT, most_rows=4)
    assert numbers_in(table) == [1, 2, 3, 4]
    table.limit(2 * (1000 + ENTRY_BYTES), most_rows=4)
    assert numbers_in(table) == [3, 4]
    table.note([row(5)])
    assert numbers_in(table) == [4, 5]
    table.clear()
    assert (table.count, table.nbytes) == (0, 0)


def test_an_entry_takes_what_is_counted_for_it() -> None:
    count = 20_000
    gc.collect()
    tracemalloc.start()
    table = KeptRows(
        LIMIT * 100, (PackedRow(hashlib.sha256(b"%d" % n).digest()[:16], 300, bytes(300)) for n in range(count))
    )
    found, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert table.count == count
    assert found <= table.nbytes


def test_nobody_pushes_out_what_others_have() -> None:
    cache = ActivationCache(10 * (1000 + ENTRY_BYTES), most_rows=100)
    cache.open_round({"a": 1, "b": 1}, frozen=["a", "b"])
    a, b = cache.of("a"), cache.of("b")
    assert a is not None
    assert b is not None
    a.note(map(row, range(3)))
    b.note(map(row, range(1000)))
    assert numbers_in(a) == [0, 1, 2]
    assert numbers_in(b) == [995, 996, 997, 998, 999]
    cache.open_round({"b": 1, "c": 1}, frozen=["b", "c"])  # a was not sampled: its rows stay
    assert [cache.of(client).limit_bytes for client in "abc"] == [10 * (1000 + ENTRY_BYTES) // 3] * 3  # type: ignore[union-attr]
    assert numbers_in(a) == [0, 1, 2]
    assert numbers_in(b) == [997, 998, 999]
    assert cache.nbytes == 6 * (1000 + ENTRY_BYTES)


def test_rows_of_a_head_that_trains_or_has_another_cut_are_given_up() -> None:
    cache = ActivationCache(LIMIT, most_rows=100)
    cache.open_round({"a": 1, "b": 1}, frozen=["a", "b"])
    for client in "ab":
        cache.of(client).note([row(1)])  # type: ignore[union-attr]
    cache.open_round({"a": 1, "b": 2}, frozen=["b"])
    assert cache.of("a") is None
    assert numbers_in(cache.of("b")) == []  # type: ignore[arg-type]
    assert cache.of("nobody") is None


def test_without_a_limit_there_is_no_table() -> None:
    cache = ActivationCache(0, most_rows=100)
    cache.open_round({"a": 1}, frozen=["a"])
    assert cache.of("a") is None


def test_what_the_tail_tells_is_what_the_head_knows() -> None:
    table = KeptRows(LIMIT, [row(3), row(1, 500), row(2)])
    told = table.told()
    assert {name: tuple(part.shape) for name, part in told.items()} == {n: p.shape for n, p in told_layout(3).items()}
    head = KeptRows.of_told(told, LIMIT)
    assert numbers_in(head) == [3, 1, 2]
    assert head.nbytes == table.nbytes
    assert len(encode(HEADER, told)) == frame_bytes.kept_bytes(3)
    assert numbers_in(KeptRows.of_told(KeptRows(LIMIT).told(), LIMIT)) == []


TOLD = KeptRows(LIMIT, [row(1), row(2)]).told()
WRONGLY_TOLD: dict[str, Mapping[str, Tensor]] = {
    "nothing": {},
    "no sizes": {"digests": TOLD["digests"]},
    "more": {**TOLD, "more": torch.zeros(1)},
    "fewer digests": {**TOLD, "digests": TOLD["digests"][:1]},
    "long digests": {**TOLD, "digests": torch.zeros(2, 32, dtype=torch.uint8)},
    "sizes of another type": {**TOLD, "sizes": TOLD["sizes"].long()},
    "one size": {**TOLD, "sizes": torch.tensor(1, dtype=torch.int32)},
}


@pytest.mark.parametrize("tensors", WRONGLY_TOLD.values(), ids=WRONGLY_TOLD)
def test_a_head_checks_what_it_is_told(tensors: Mapping[str, Tensor]) -> None:
    with pytest.raises(ExchangeError, match=r"Expected what the tail keeps.*found") as error:
        KeptRows.of_told(tensors, LIMIT)
    assert error.value.code == "wrong_tensors"


# ---------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("limit", [2_000, 12_000, LIMIT], ids=["one or two rows", "some rows", "all rows"])
@pytest.mark.parametrize("codec", EXACT)
def test_what_arrives_is_what_would_without(codec: str, limit: int) -> None:
    """Random batches of 12 rows that come again in other company and other widths; both tables stay the same."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 25, (12,), generator=generator).tolist()
    activations = torch.randn(12, 24, HIDDEN, generator=generator)
    activations[3:5] = activations[5:7]  # equal rows
    head, tail = KeptRows(limit), KeptRows(limit)
    workload = Workload(4, 24, activation_codec=codec)
    saved = 0
    for _ in range(40):
        rows = torch.randint(0, 12, (4,), generator=generator).tolist()
        batch = batch_of(rows, activations, lengths)
        whole = encode(HEADER, batch_tensors(*batch, CODECS[codec]))
        before = tail.told()["digests"].tolist()
        frame = sent(batch, codec, head)
        found, expected = arrived(frame, codec, tail), arrived(whole, codec, None)
        assert all(map(torch.equal, found, expected))
        assert found[0].dtype == expected[0].dtype
        assert numbers_in(head) == numbers_in(tail)
        assert head.nbytes == tail.nbytes <= limit
        form = BatchForm.of(*batch[1:])
        referred = decode(frame, LIMIT).tensors.get("kept.rows", torch.empty(0)).tolist()
        if referred:
            digests = decode(frame, LIMIT).tensors["kept.digests"].tolist()
            assert all(digest in before for digest in digests)
            counts = traveling(*batch[1:]).sum(1)
            form = form._replace(kept_rows=len(referred), kept_positions=int(counts[referred].sum()))
            assert len(frame) < len(whole)
        else:
            assert frame == whole
        assert len(frame) == frame_bytes.step_bytes_up(workload, HIDDEN, form)
        saved += len(whole) - len(frame)
    assert saved > 0 or limit == 2_000


def test_equal_rows_at_another_place_of_another_batch_are_found() -> None:
    activations, lengths = torch.randn(4, 9, HIDDEN), [9, 9, 5, 7]
    head, tail = KeptRows(LIMIT), KeptRows(LIMIT)
    arrived(sent(batch_of([0, 1, 2], activations, lengths), "fp32", head), "fp32", tail)
    frame = sent(batch_of([2, 3], activations, lengths), "fp32", head)
    assert decode(frame, LIMIT).tensors["kept.rows"].tolist() == [0]
    assert decode(frame, LIMIT).tensors["activations"].shape == (6, HIDDEN)
    found = arrived(frame, "fp32", tail)
    expected = arrived(
        encode(HEADER, batch_tensors(*batch_of([2, 3], activations, lengths), CODECS["fp32"])), "fp32", None
    )
    assert all(map(torch.equal, found, expected))


def test_where_little_is_saved_rows_are_sent_whole() -> None:
    batch = (torch.randn(1, 2, HIDDEN), torch.ones(1, 2), torch.tensor([[-100, 1]]))
    head = KeptRows(LIMIT)
    first, again = (sent(batch, "fp32", head) for _ in range(2))
    assert head.count == 1
    assert first == again


# ---------------------------------------------------------------------------------------------- refusals


ACTIVATIONS, LENGTHS = torch.randn(4, 9, HIDDEN), [9, 9, 9, 7]


def referring(rows: Sequence[int] = (0, 1), **changes: Any) -> tuple[dict[str, Tensor], KeptRows]:
    """The tensors of a frame that refers to two rows of three, `rows` and `changes` apart; the tail's table."""
    head, tail = KeptRows(LIMIT), KeptRows(LIMIT)
    arrived(sent(batch_of([0, 1], ACTIVATIONS, LENGTHS), "fp32", head), "fp32", tail)
    tensors = decode(sent(batch_of([0, 1, 2], ACTIVATIONS, LENGTHS), "fp32", head), LIMIT).tensors
    assert tensors["kept.rows"].tolist() == [0, 1]
    return {**tensors, "kept.rows": torch.tensor(rows, dtype=torch.int32), **changes}, tail


def refusal(tensors: Mapping[str, Tensor], tail: KeptRows | None) -> ExchangeError:
    before = tail.told() if tail else {}
    with pytest.raises(ExchangeError, match=r"Expected .*found") as error:
        check_batch(tensors, codec=CODECS["fp32"], hidden_size=HIDDEN, vocab_size=VOCAB, kept=tail)
    assert tail is None or all(torch.equal(tail.told()[name], tensor) for name, tensor in before.items())
    return error.value


@pytest.mark.parametrize("rows", [(0, 0), (1, 0), (-1, 0), (0, 3), (2**31 - 1, 0)], ids=str)
def test_rows_that_the_batch_does_not_have_are_refused(rows: Sequence[int]) -> None:
    assert refusal(*referring(rows)).code == "wrong_rows"


DIGESTS = torch.zeros(2, DIGEST_BYTES, dtype=torch.uint8)
MALFORMED: dict[str, tuple[dict[str, Tensor], str]] = {
    "floats": ({"kept.rows": torch.zeros(2)}, "wrong_dtype"),
    "one number": ({"kept.rows": torch.tensor(0, dtype=torch.int32)}, "wrong_tensors"),
    "no rows": ({"kept.rows": torch.zeros(0, dtype=torch.int32)}, "wrong_shape"),
    "a table": ({"kept.rows": torch.zeros(2, 1, dtype=torch.int32)}, "wrong_shape"),
    "fewer digests": ({"kept.digests": DIGESTS[:1]}, "wrong_shape"),
    "short digests": ({"kept.digests": DIGESTS[:, :8]}, "wrong_shape"),
    "digests of another type": ({"kept.digests": DIGESTS.int()}, "wrong_dtype"),
    "activations of all rows": ({"activations": torch.zeros(24, HIDDEN)}, "wrong_shape"),
    "no activations": ({"activations": torch.zeros(0, HIDDEN)}, "wrong_shape"),
}


@pytest.mark.parametrize(("changes", "code"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_references_are_refused(changes: dict[str, Any], code: str) -> None:
    assert refusal(*referring(**changes)).code == code


def test_digests_alone_or_rows_alone_are_refused() -> None:
    for name in ("kept.rows", "kept.digests"):
        tensors, tail = referring()
        del tensors[name]
        assert refusal(tensors, tail).code == "wrong_tensors"


def test_references_where_nothing_is_kept_are_refused() -> None:
    tensors, _ = referring()
    assert refusal(tensors, None).code == "wrong_tensors"


def test_a_row_that_the_tail_has_not_is_refused() -> None:
    tensors, tail = referring()
    assert refusal({**tensors, "kept.digests": DIGESTS}, tail).code == "unknown_rows"
    tail.clear()
    assert refusal(tensors, tail).code == "unknown_rows"


def test_a_row_of_another_length_is_refused() -> None:
    """Its bytes would be another row's activations."""
    head, tail = KeptRows(LIMIT), KeptRows(LIMIT)
    arrived(sent(batch_of([0, 3], ACTIVATIONS, LENGTHS), "fp32", head), "fp32", tail)
    tensors = decode(sent(batch_of([0, 3], ACTIVATIONS, LENGTHS), "fp32", head), LIMIT).tensors
    assert tensors["kept.rows"].tolist() == [0, 1]
    assert refusal({**tensors, "kept.digests": tensors["kept.digests"].flip(0)}, tail).code == "unknown_rows"


def test_what_is_refused_is_not_kept() -> None:
    tail = KeptRows(LIMIT)
    tensors = batch_tensors(*batch_of([0, 1], ACTIVATIONS.clone().fill_(torch.nan), LENGTHS), CODECS["fp32"])
    assert refusal(tensors, tail).code == "non_finite"
    assert tail.count == 0


def test_a_head_comes_back_after_a_refused_reference_though_it_was_just_back() -> None:
    """A connection that broke and a reference that is refused then: no answer came in between."""
    away = Absence(grace_s=0.2)
    away.wait(ExchangeError("tail_lost", "Expected a connection, found none."))
    refused = ExchangeError("unknown_rows", "Expected another reference, found this.")
    away.wait(refused)
    with pytest.raises(ExchangeError, match=r"Expected the tail back within 0\.2 s"):  # but not for ever
        away.wait(refused)
    with pytest.raises(ExchangeError) as error:
        Absence(grace_s=0.0).wait(refused)
    assert error.value is refused


def test_a_client_has_no_use_for_what_others_sent() -> None:
    """Who knows a hash of another client's row learns nothing by it, and trains nothing with it."""
    tensors, tail = referring()
    cache = ActivationCache(LIMIT, most_rows=100)
    cache.open_round({"owner": 1, "thief": 1}, frozen=["owner", "thief"])
    owners, thiefs = cache.of("owner"), cache.of("thief")
    assert owners is not None
    owners.note(found for digest in tail.told()["digests"].numpy() if (found := tail.get(bytes(digest))))
    check_batch(tensors, codec=CODECS["fp32"], hidden_size=HIDDEN, vocab_size=VOCAB, kept=owners)
    assert refusal(tensors, thiefs).code == "unknown_rows"
