"""Frames: every tensor comes back as it went, and every bad frame is an `ExchangeError` with a stable code."""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, replace
from enum import Enum
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.batches import batch_tensors, check_batch, check_gradient
from hsplit_flwr.exchange.codecs import CODECS, Codec
from hsplit_flwr.exchange.frames import (
    KINDS,
    MAX_HEADER_BYTES,
    Header,
    decode,
    encode,
    expect_header,
)
from hsplit_flwr.exchange.task import PROTOCOL_VERSION

pytestmark = pytest.mark.timeout(20)

LIMIT = 1 << 22
MAX_OVERHEAD = 0.02
"""largest share of a training frame that is not payload, at 8 x 64 tokens and hidden size 576 in fp32"""
MAX_MESSAGE = 600
"""characters of the longest refusal: it travels in the gRPC trailers and is logged"""
HEADER = Header("train", "run-1", 3, "client-7", 2, step=5)
HIDDEN, VOCAB = 4, 11


def with_header(header: Mapping[str, Any] | str, tensors: dict[str, Tensor] | None = None) -> bytes:
    """A well-formed safetensors buffer around any header."""
    text = header if isinstance(header, str) else json.dumps(header)
    frame: bytes = save_tensors(tensors or {}, metadata={"hsplit": text})
    return frame


def changed(**fields: Any) -> bytes:
    return with_header({**asdict(HEADER), **fields})


def without(name: str) -> bytes:
    return with_header({key: value for key, value in asdict(HEADER).items() if key != name})


def raw(safetensors_header: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(safetensors_header) if length is None else length) + safetensors_header + body


def raw_tensor(dtype: str, shape: list[int], size: int) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = {"__metadata__": {"hsplit": json.dumps(asdict(HEADER))}, "x": entry}
    return raw(json.dumps(header).encode(), body=bytes(size))


GOOD = encode(HEADER, {"x": torch.arange(6.0).view(2, 3)})


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 1, 4), (8, 64, 16), (3, 0, 2)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.int64], ids=str
)
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 50).to(dtype)
    header, tensors = decode(encode(HEADER, {"x": tensor}), LIMIT)
    assert header == HEADER
    assert tensors.keys() == {"x"}
    assert tensors["x"].dtype == dtype
    assert tensors["x"].shape == tensor.shape
    assert torch.equal(tensors["x"], tensor)


def test_non_finite_values_survive_the_round_trip() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    found = decode(encode(HEADER, {"x": tensor}), LIMIT).tensors["x"]
    assert torch.equal(found.view(torch.int32), tensor.view(torch.int32))


@pytest.mark.parametrize("tensors", [None, {}], ids=["none", "empty"])
def test_a_frame_without_tensors(tensors: dict[str, Tensor] | None) -> None:
    hello = Header("hello", "r", 1, "c", 1, have=9)
    assert decode(encode(hello, tensors), LIMIT) == (hello, {})


@pytest.mark.parametrize("kind", KINDS)
def test_every_header_field_comes_back(kind: str) -> None:
    header = Header(kind, "räksmörgås", 2, 'c"\n\\', 3, 4, 5, 6, 7, 8, True, 9, loss=0.1, nll=1e-300, tokens=10, own=11)
    assert decode(encode(header), LIMIT).header == header


def test_views_that_require_grad_are_sent_as_values() -> None:
    base = torch.randn(4, 6, requires_grad=True)
    view = base.t()[1:3]
    found = decode(encode(HEADER, {"x": view}), LIMIT).tensors["x"]
    assert torch.equal(found, view.detach())
    assert not found.requires_grad


def test_overhead_of_a_training_frame() -> None:
    batch, length, hidden = 8, 64, 576
    mask = torch.ones(batch, length, dtype=torch.int64)
    tensors = batch_tensors(torch.randn(batch, length, hidden), mask, mask, CODECS["fp32"])
    activation_bytes = batch * length * hidden * 4
    assert len(encode(HEADER, tensors)) <= activation_bytes * (1 + MAX_OVERHEAD)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_halves_the_activation_bytes(name: str) -> None:
    activations, labels = torch.randn(4, 16, 64), torch.ones(4, 16)
    mask = torch.arange(16).expand(4, 16) > 0  # padding that predicts: all positions travel
    sizes = {key: batch_tensors(activations, mask, labels, CODECS[key])["activations"].nbytes for key in ("fp32", name)}
    assert sizes[name] * 2 == sizes["fp32"] == activations.nbytes


# ---------------------------------------------------------------------------------------------- malformed frames


class Malformed(Enum):
    """A frame and the code it must be refused with."""

    EMPTY = b"", "malformed_frame"
    SHORTER_THAN_A_LENGTH = b"\x01\x02\x03", "malformed_frame"
    LENGTH_ONLY = struct.pack("<Q", 0), "malformed_frame"
    TRUNCATED_HEADER = GOOD[:40], "malformed_frame"
    TRUNCATED_TENSOR = GOOD[:-1], "malformed_frame"
    TRAILING_BYTES = GOOD + b"\0", "malformed_frame"
    LENGTH_HUGE = raw(b"{}", length=1 << 62), "malformed_frame"
    LENGTH_LOOKS_NEGATIVE = raw(b"{}", length=(1 << 64) - 1), "malformed_frame"
    LENGTH_PAST_THE_END = raw(b"{}", length=3), "malformed_frame"
    LENGTH_TOO_SHORT = raw(b'{"__metadata__":{}}', length=5), "malformed_frame"
    HEADER_ABOVE_ITS_LIMIT = raw(b" " * (MAX_HEADER_BYTES + 1) + b"{}"), "malformed_frame"
    BAD_JSON = raw(b'{"__metadata__":'), "malformed_frame"
    NOT_UTF8 = raw(b"\xff\xfe\xfd{}"), "malformed_frame"
    HEADER_IS_A_LIST = raw(b"[1, 2]"), "malformed_frame"
    HEADER_IS_A_NUMBER = raw(b"7"), "malformed_frame"
    METADATA_MISSING = save_tensors({"x": torch.zeros(1)}), "malformed_frame"
    METADATA_OF_OTHERS = save_tensors({}, metadata={"format": "pt"}), "malformed_frame"
    METADATA_NOT_A_MAPPING = raw(b'{"__metadata__": 3}'), "malformed_frame"
    METADATA_NOT_TEXT = raw(b'{"__metadata__": {"hsplit": {"protocol": 1}}}'), "malformed_frame"
    INNER_BAD_JSON = with_header("{"), "malformed_frame"
    INNER_EMPTY = with_header(""), "malformed_frame"
    INNER_LIST = with_header("[1]"), "malformed_frame"
    INNER_TEXT = with_header('"protocol"'), "malformed_frame"
    INNER_NUMBER = with_header("1"), "malformed_frame"
    INNER_NULL = with_header("null"), "malformed_frame"
    DEEPLY_NESTED = raw(b'{"__metadata__":' + b"[" * 200_000), "malformed_frame"
    DEEPLY_NESTED_INNER = with_header("[" * 200_000), "malformed_frame"
    DEEPLY_NESTED_VALUE = (
        with_header(f'{{"protocol":{PROTOCOL_VERSION},"run":' + "[" * 900 + "]" * 900 + "}"),
        "malformed_frame",
    )
    UNKNOWN_KIND = changed(kind="steal"), "malformed_frame"
    KIND_OF_ANOTHER_CASE = changed(kind="Train"), "malformed_frame"
    UNKNOWN_FIELD = changed(surprise=1), "malformed_frame"
    MISSING_RUN = without("run"), "malformed_frame"
    MISSING_KIND = without("kind"), "malformed_frame"
    BOOL_FOR_INT = changed(step=True), "malformed_frame"
    INT_FOR_BOOL = changed(whole=1), "malformed_frame"
    BOOL_FOR_FLOAT = changed(loss=False), "malformed_frame"
    FLOAT_FOR_INT = changed(round=3.0), "malformed_frame"
    TEXT_FOR_INT = changed(cut="2"), "malformed_frame"
    INT_FOR_TEXT = changed(client=7), "malformed_frame"
    NULL_FOR_TEXT = changed(run=None), "malformed_frame"
    LIST_FOR_TEXT = changed(run=["run-1"]), "malformed_frame"
    NAN = changed(loss=float("nan")), "malformed_frame"
    INFINITY = changed(nll=float("inf")), "malformed_frame"
    OVERFLOWING_FLOAT = with_header(json.dumps(asdict(HEADER)).replace('"nll": 0.0', '"nll": 1e999')), "malformed_frame"
    INT_BEYOND_FLOAT = changed(step=10**400), "malformed_frame"
    INT_BEYOND_64_BITS = changed(have=1 << 64), "malformed_frame"
    NEGATIVE_INT = changed(have=-1), "malformed_frame"
    INT_OF_TOO_MANY_DIGITS = with_header('{"protocol": 1' + "0" * 5000 + "}"), "malformed_frame"
    OTHER_PROTOCOL = changed(protocol=PROTOCOL_VERSION + 1), "protocol_version"
    NO_PROTOCOL = without("protocol"), "protocol_version"
    PROTOCOL_AS_TEXT = changed(protocol=str(PROTOCOL_VERSION)), "protocol_version"
    PROTOCOL_AS_FLOAT = changed(protocol=float(PROTOCOL_VERSION)), "malformed_frame"
    FUTURE_FIELDS_OF_ANOTHER_PROTOCOL = changed(protocol=PROTOCOL_VERSION + 1, surprise=1), "protocol_version"
    UNKNOWN_DTYPE = raw_tensor("F7", [1], 4), "malformed_frame"
    DTYPE_UNKNOWN_TO_TORCH = raw_tensor("F8_E8M0", [4], 4), "malformed_frame"
    SHAPE_BEYOND_THE_DATA = raw_tensor("F32", [1 << 40], 4), "malformed_frame"
    SHAPE_OVERFLOWS = raw_tensor("F32", [1 << 62, 1 << 62], 4), "malformed_frame"
    EMPTY_SHAPE_OVERFLOWS = raw_tensor("F32", [0, (1 << 63) - 1, 1 << 20], 0), "malformed_frame"
    EMPTY_SHAPE_BEYOND_INT64 = raw_tensor("F32", [0, (1 << 64) - 1], 0), "malformed_frame"
    NEGATIVE_SHAPE = raw_tensor("F32", [-1], 4), "malformed_frame"


@pytest.mark.parametrize("case", Malformed, ids=lambda case: case.name.lower())
def test_malformed_frames_are_refused(case: Malformed) -> None:
    frame, code = case.value
    with pytest.raises(ExchangeError, match="Expected") as refusal:
        decode(frame, LIMIT)
    assert refusal.value.code == code
    assert len(str(refusal.value)) <= MAX_MESSAGE


def test_a_frame_above_the_limit_is_refused_before_it_is_parsed() -> None:
    assert decode(GOOD, len(GOOD)).header == HEADER
    with pytest.raises(ExchangeError, match=f"at most {len(GOOD) - 1} bytes, found {len(GOOD)}.*max-frame-mib") as e:
        decode(GOOD, len(GOOD) - 1)
    assert e.value.code == "frame_too_large"
    with pytest.raises(ExchangeError) as e:
        decode(b"\xff" * 100, 99)
    assert e.value.code == "frame_too_large"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ExchangeError) as refusal:
        decode(data, LIMIT)
    assert refusal.value.code == "malformed_frame"


def code_of(frame: bytes) -> str | None:
    """None: accepted."""
    try:
        decode(frame, LIMIT)
    except ExchangeError as refusal:
        return refusal.code
    return None


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_harmless(position: int, flip: int) -> None:
    """A bit flip may land in a value; what it must not do is raise anything but `ExchangeError`."""
    data = bytearray(GOOD)
    data[position] ^= flip
    assert code_of(bytes(data)) in {None, "malformed_frame", "protocol_version"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(asdict(HEADER))), JSON, min_size=1, max_size=4))
def test_headers_of_any_json_are_refused_or_typed(fields: dict[str, Any]) -> None:
    frame = changed(**fields)
    if (code := code_of(frame)) is None:
        header = decode(frame, LIMIT).header
        assert all(type(value) is type(getattr(HEADER, name)) for name, value in asdict(header).items())
    else:
        assert code in {"malformed_frame", "protocol_version"}


# ---------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "hello"), ("run", "run-2"), ("round", 4), ("client", "c"), ("cut", 1), ("step", 6)]
)
def test_expect_header_names_the_field_that_differs(field: str, value: Any) -> None:
    expect_header(HEADER, **asdict(HEADER))
    with pytest.raises(ExchangeError, match=rf"Expected {field}=.* found {value!r}") as refusal:
        expect_header(replace(HEADER, **{field: value}), **asdict(HEADER))
    assert refusal.value.code == f"wrong_{field}"


def test_a_refusal_does_not_repeat_a_huge_value() -> None:
    with pytest.raises(ExchangeError) as refusal:
        expect_header(replace(HEADER, run="x" * 10**6), run="run-1")
    assert len(str(refusal.value)) <= MAX_MESSAGE


ALL_TRAVEL = torch.ones(2, 3, dtype=torch.bool)


def good_batch() -> dict[str, Tensor]:
    labels = torch.tensor([[-100, 0, VOCAB - 1], [1, -100, 2]])
    return batch_tensors(torch.randn(2, 3, HIDDEN), torch.tensor([[1, 1, 0], [0, 1, 1]]), labels, CODECS["bf16"])


def check(tensors: Mapping[str, Tensor]) -> None:
    check_batch(tensors, codec=CODECS["bf16"], hidden_size=HIDDEN, vocab_size=VOCAB)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_good_batch_passes(codec: Codec, length: int) -> None:
    mask = torch.ones(2, length, dtype=torch.bool)
    labels = torch.full((2, length), -100)
    tensors = decode(encode(HEADER, batch_tensors(torch.randn(2, length, HIDDEN), mask, labels, codec)), LIMIT).tensors
    check_batch(tensors, codec=codec, hidden_size=HIDDEN, vocab_size=VOCAB)
    check(good_batch())


def at(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


BEYOND = torch.tensor([[7], [8]], dtype=torch.uint8)
"""bit 3 of a row of three"""
BAD_BATCHES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no_labels": ({"labels": None}, "wrong_tensors"),
    "no_tensors": ({"labels": None, "mask": None, "activations": None}, "wrong_tensors"),
    "one_too_many": ({"extra": torch.zeros(1)}, "wrong_tensors"),
    "activations_fp32": ({"activations": torch.zeros(4, HIDDEN)}, "wrong_dtype"),
    "activations_int": ({"activations": torch.zeros(4, HIDDEN, dtype=torch.int32)}, "wrong_dtype"),
    "mask_int64": ({"mask.spans": torch.ones(2, 2, dtype=torch.int64)}, "wrong_dtype"),
    "size_int64": ({"size": torch.ones(2, dtype=torch.int64)}, "wrong_dtype"),
    "labels_int64": ({"labels": torch.ones(4, dtype=torch.int64)}, "wrong_dtype"),
    "labels_float": ({"labels": torch.ones(4)}, "wrong_dtype"),
    "hidden_size": ({"activations": torch.zeros(4, HIDDEN + 1, dtype=torch.bfloat16)}, "wrong_shape"),
    "with_padding": ({"activations": torch.zeros(6, HIDDEN, dtype=torch.bfloat16)}, "wrong_shape"),
    "three_dimensions": ({"activations": torch.zeros(2, 2, HIDDEN, dtype=torch.bfloat16)}, "wrong_shape"),
    "scalar": ({"activations": torch.zeros((), dtype=torch.bfloat16)}, "wrong_shape"),
    "no_rows": ({"size": torch.tensor([0, 3], dtype=torch.int32)}, "wrong_shape"),
    "no_tokens": ({"size": torch.tensor([2, 0], dtype=torch.int32)}, "wrong_shape"),
    "negative_size": ({"size": torch.tensor([-2, -3], dtype=torch.int32)}, "wrong_shape"),
    "no_activations": ({"activations": torch.zeros(0, HIDDEN, dtype=torch.bfloat16)}, "wrong_shape"),
    "mask_of_more_rows": ({"mask.spans": torch.ones(3, 2, dtype=torch.int32)}, "wrong_shape"),
    "mask_broadcasts": ({"mask.spans": torch.ones(1, 2, dtype=torch.int32)}, "wrong_shape"),
    "labels_too_short": ({"labels": torch.zeros(3, dtype=torch.int32)}, "wrong_shape"),
    "activations_nan": ({"activations": at(good_batch()["activations"], float("nan"))}, "non_finite"),
    "activations_inf": ({"activations": at(good_batch()["activations"], float("inf"))}, "non_finite"),
    "activations_minus_inf": ({"activations": at(good_batch()["activations"], -float("inf"))}, "non_finite"),
    "mask_beyond_its_row": ({"mask.spans": at(good_batch()["mask.spans"], 3)}, "wrong_mask"),
    "mask_negative": ({"mask.spans": at(good_batch()["mask.spans"], -1)}, "wrong_mask"),
    "mask_overflows": ({"mask.spans": torch.full((2, 2), 2**31 - 1, dtype=torch.int32)}, "wrong_mask"),
    "mask_twice": ({"mask.bits": torch.ones(2, 1, dtype=torch.uint8)}, "wrong_tensors"),
    "mask_of_other_tokens": ({"mask.spans": torch.tensor([[0, 3], [0, 3]], dtype=torch.int32)}, "wrong_shape"),
    "labels_beyond_their_row": ({"labels.spans": None, "labels.bits": BEYOND}, "wrong_labels"),
    "labels_elsewhere": ({"labels.bits": None, "labels.spans": torch.zeros(2, 2, dtype=torch.int32)}, "wrong_shape"),
    "label_is_vocab_size": ({"labels": at(good_batch()["labels"], VOCAB)}, "wrong_labels"),
    "label_negative": ({"labels": at(good_batch()["labels"], -1)}, "wrong_labels"),
    "label_below_ignore": ({"labels": at(good_batch()["labels"], -101)}, "wrong_labels"),
    "label_ignored": ({"labels": at(good_batch()["labels"], -100)}, "wrong_labels"),
    "label_smallest": ({"labels": at(good_batch()["labels"], -(2**31))}, "wrong_labels"),
    "label_largest": ({"labels": at(good_batch()["labels"], 2**31 - 1)}, "wrong_labels"),
}
"""Changes to a good batch, and the code of the refusal."""


@pytest.mark.parametrize(("changes", "code"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_bad_batches_are_refused(changes: dict[str, Tensor | None], code: str) -> None:
    tensors = {name: tensor for name, tensor in {**good_batch(), **changes}.items() if tensor is not None}
    with pytest.raises(ExchangeError, match=r"Expected .* found") as refusal:
        check(tensors)
    assert refusal.value.code == code


def test_many_strange_tensor_names_make_a_short_refusal() -> None:
    with pytest.raises(ExchangeError) as refusal:
        check({f"tensor-{i}": torch.zeros(1) for i in range(1000)})
    assert refusal.value.code == "wrong_tensors"
    assert len(str(refusal.value)) <= MAX_MESSAGE


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({}, "wrong_tensors"),
        ({"gradient": torch.zeros(6, HIDDEN), "extra": torch.zeros(1)}, "wrong_tensors"),
        ({"gradient": torch.zeros(6, HIDDEN, dtype=torch.float16)}, "wrong_dtype"),
        ({"gradient": torch.zeros(3, HIDDEN)}, "wrong_shape"),
        ({"gradient": at(torch.zeros(6, HIDDEN), float("nan"))}, "non_finite"),
        ({"gradient": at(torch.zeros(6, HIDDEN), float("inf"))}, "non_finite"),
    ],
    ids=["missing", "extra", "dtype", "shape", "nan", "inf"],
)
def test_bad_gradients_are_refused(tensors: dict[str, Tensor], code: str) -> None:
    with pytest.raises(ExchangeError, match=r"Expected .* found") as refusal:
        check_gradient(tensors, ALL_TRAVEL, HIDDEN, codec=CODECS["fp32"])
    assert refusal.value.code == code


def test_a_good_gradient_passes_unchanged() -> None:
    gradient = torch.randn(6, HIDDEN, dtype=torch.float16)
    found = check_gradient({"gradient": gradient}, ALL_TRAVEL, HIDDEN, CODECS["fp16"])
    assert found.shape == (2, 3, HIDDEN)
    assert torch.equal(found.view(6, HIDDEN), gradient)
    assert found.data_ptr() == gradient.data_ptr()  # not copied


def test_the_numbers_of_a_header_do_not_change_the_size_of_a_frame() -> None:
    tensors = {"x": torch.zeros(2, 3)}
    sizes = {len(encode(replace(HEADER, loss=loss, step=step), tensors)) for loss in (0.0, 1 / 3) for step in (0, 999)}
    assert len(sizes) == 1
