"""Wire codecs: one table, whose rows alone decide what is sent, what is refused and how many bytes are predicted."""

import math
from collections.abc import Callable, Mapping
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.batches import batch_layout, batch_tensors, check_batch, check_gradient, gradient_tensors
from hsplit_flwr.exchange.codecs import CODECS, Codec, Layout, Part, Shape
from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.exchange.positions import BatchForm, traveling
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.training.config import WIRE_CODECS
from hsplit_flwr.training.workload import WEIGHT_DTYPES, Workload

pytestmark = pytest.mark.timeout(30)

HEADER = Header("train", "run", 1, "client", 2)
HIDDEN, VOCAB = 6, 11


class ScaledInt8:
    """A codec of two parts: whole numbers of -127..127, and what they are to be multiplied by, row by row."""

    float_copies = 2

    def layout(self, name: str, shape: Shape) -> Layout:
        return {name: Part(shape, torch.int8), f"{name}.scale": Part((*shape[:-1], 1), torch.float16)}

    def encode(self, name: str, values: Tensor, seed: int = 0) -> dict[str, Tensor]:
        scale = (values.abs().amax(-1, keepdim=True) / 127).half()
        return {name: (values / scale.clamp_min(1e-7)).round().to(torch.int8), f"{name}.scale": scale}

    def decode(self, name: str, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return parts[name].float() * parts[f"{name}.scale"].float()


ALL: dict[str, Codec] = {**CODECS, "of two parts": ScaledInt8()}
WORST = {"int4": 1 / 13.8, "int4_stochastic": 1 / 6.9}
"""share of a position's largest value that another one is wrong by, where it is more than 1/127"""


POSITIONS = 4
"""of `batch()` that travel: its last tokens predict nothing"""


def batch(rows: int = 2, width: int = 3, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.ones(rows, width, dtype=torch.int64)
    return torch.randn(rows, width, hidden), mask, torch.arange(rows * width).view(rows, width) % VOCAB


def checked(tensors: Mapping[str, Tensor], codec: Codec, workload: Workload | None = None) -> tuple[Tensor, ...]:
    return check_batch(tensors, codec=codec, hidden_size=HIDDEN, vocab_size=VOCAB, workload=workload)


def refusal(tensors: Mapping[str, Tensor], codec: Codec, workload: Workload | None = None) -> str:
    with pytest.raises(ExchangeError, match=r"Expected .*found") as error:
        checked(tensors, codec, workload)
    return error.value.code


# ---------------------------------------------------------------------------------------------- the names


def test_the_settings_know_the_codecs_by_name() -> None:
    """The settings' room lies below this one and repeats the names."""
    assert tuple(CODECS) == WIRE_CODECS
    assert tuple(DTYPES) == WEIGHT_DTYPES


@pytest.mark.parametrize("name", DTYPES)
def test_a_codec_named_like_a_dtype_sends_one_tensor_of_it(name: str) -> None:
    activations = torch.randn(2, 3, HIDDEN)
    (sent,) = CODECS[name].encode("activations", activations).items()
    assert sent[0] == "activations"
    assert sent[1].dtype == DTYPES[name]
    assert torch.equal(sent[1], activations.to(DTYPES[name]))


# ---------------------------------------------------------------------------------------------- every codec


@pytest.mark.parametrize("name", ALL)
def test_a_batch_and_a_gradient_come_back(name: str) -> None:
    codec = ALL[name]
    activations, mask, labels = batch()
    found = checked(batch_tensors(activations, mask, labels, codec), codec)
    positions = traveling(mask, labels)
    assert found[0][~positions].count_nonzero() == 0
    error = ((found[0].float() - activations).abs().amax(-1) / activations.abs().amax(-1))[positions]
    assert error.max() < WORST.get(name, 1 / 127)
    assert torch.equal(found[1].long(), mask)
    assert torch.equal(found[2].long(), labels)
    gradient = check_gradient(gradient_tensors(activations, positions, codec), positions, HIDDEN, codec)
    assert torch.equal(gradient, found[0])


@pytest.mark.parametrize("codec", ALL.values(), ids=ALL)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 40), hidden=st.integers(1, 300))
def test_predicted_bytes_are_those_of_frames(codec: Codec, rows: int, width: int, hidden: int) -> None:
    tensors = batch_tensors(*batch(rows, width, hidden), codec)
    layout = batch_layout(codec, BatchForm(rows, width, rows * (width - 1), rows * width), hidden)
    assert {name: Part(tuple(t.shape), t.dtype) for name, t in tensors.items()} == layout
    assert frame_bytes._frame_bytes(layout) == len(encode(HEADER, tensors))
    gradient = codec.encode("gradient", torch.randn(rows * width, hidden))
    assert frame_bytes._frame_bytes(codec.layout("gradient", (rows * width, hidden))) == len(encode(HEADER, gradient))


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=5),
        st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(list(frame_bytes._NAMES))),
        max_size=6,
    )
)
def test_predicted_bytes_hold_for_tensors_of_any_dtype(parts: dict[str, tuple[list[int], torch.dtype]]) -> None:
    """A codec of the future may send what it likes: the order in a frame goes by dtype, and decides on digits."""
    layout = {name: Part(tuple(shape), dtype) for name, (shape, dtype) in parts.items()}
    tensors = {name: torch.zeros(part.shape, dtype=part.dtype) for name, part in layout.items()}
    assert frame_bytes._frame_bytes(layout) == len(encode(HEADER, tensors))


@pytest.mark.parametrize("name", CODECS)
def test_payload_bytes_are_those_of_the_values(name: str) -> None:
    parts = CODECS[name].encode("activations", torch.randn(15, HIDDEN))
    workload = Workload(3, 5, activation_codec=name, gradient_codec=name)
    assert frame_bytes.payload_bytes(workload, HIDDEN) == sum(tensor.nbytes for tensor in parts.values())


@pytest.mark.parametrize(("up", "down", "copies"), [("fp32", "bf16", 0), ("bf16", "int8", 2), ("int4", "int8", 3)])
def test_packing_takes_the_copies_of_the_codec_that_makes_more(up: str, down: str, copies: int) -> None:
    workload = Workload(3, 5, activation_codec=up, gradient_codec=down)
    assert frame_bytes.packing_bytes(workload, HIDDEN) == copies * 4 * 3 * 5 * HIDDEN


@pytest.mark.parametrize("name", CODECS)
def test_no_more_copies_are_alive_than_are_said(name: str) -> None:
    """What torch's allocator saw while the values were packed and unpacked, in units of their float32 bytes."""
    codec, values = CODECS[name], torch.randn(256, 320)

    def peak(action: Callable[[], object]) -> float:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            action()
        changes = [e.nbytes() for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(accumulate(changes), default=0) / (4 * values.numel())

    parts = codec.encode("x", values)
    sent = sum(part.nbytes for part in parts.values()) / (4 * values.numel())
    assert peak(lambda: codec.encode("x", values, 1)) <= codec.float_copies + sent + 0.01
    assert peak(lambda: codec.decode("x", parts, (256, 320))) <= codec.float_copies + 0.01


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"activations.scale": None}, "wrong_tensors"),
        ({"activations.zero": torch.zeros(1)}, "wrong_tensors"),
        ({"activations": torch.zeros(POSITIONS, HIDDEN)}, "wrong_dtype"),
        ({"activations.scale": torch.ones(POSITIONS, 1)}, "wrong_dtype"),
        ({"activations": torch.zeros(POSITIONS, HIDDEN + 1, dtype=torch.int8)}, "wrong_shape"),
        ({"activations.scale": torch.ones(POSITIONS, HIDDEN, dtype=torch.float16)}, "wrong_shape"),
        ({"activations.scale": torch.ones((), dtype=torch.float16)}, "wrong_shape"),
        ({"activations.scale": torch.full((POSITIONS, 1), math.nan, dtype=torch.float16)}, "non_finite"),
        ({"activations.scale": torch.full((POSITIONS, 1), math.inf, dtype=torch.float16)}, "non_finite"),
    ],
)
def test_every_part_of_a_codec_is_checked(changes: dict[str, Tensor | None], code: str) -> None:
    codec = ScaledInt8()
    tensors = {**batch_tensors(*batch(), codec), **changes}
    assert refusal({name: tensor for name, tensor in tensors.items() if tensor is not None}, codec) == code


# ---------------------------------------------------------------------------------------------- too large


class Untouched(ScaledInt8):
    """A codec that must not be asked for values."""

    def decode(self, name: str, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        raise AssertionError("computed on a batch that was to be refused")


@pytest.mark.parametrize(("rows", "width"), [(3, 4), (2, 5), (3, 1), (1, 5), (100, 100)])
def test_a_batch_larger_than_planned_is_refused_before_anything_is_computed(rows: int, width: int) -> None:
    """A row of 8,000 tokens at 192 planned ones was trained on: one step took 43 s and 3.1 GB."""
    codec = Untouched()
    tensors = batch_tensors(*batch(rows, width), codec)
    with pytest.raises(
        ExchangeError, match=rf"at most 2 x 4 tokens.*found {rows} x {width}.*batch-size, max-length"
    ) as e:
        checked(tensors, codec, Workload(2, 4))
    assert e.value.code == "batch_too_large"


@pytest.mark.parametrize(("rows", "width"), [(2, 4), (1, 1), (2, 1)])
def test_a_batch_as_planned_or_smaller_passes(rows: int, width: int) -> None:
    for workload in (Workload(2, 4), None):
        checked(batch_tensors(*batch(rows, width), CODECS["fp32"]), CODECS["fp32"], workload)


def test_no_limit_is_dodged_by_labels_of_another_size() -> None:
    """The limit is read off the size and the marks: activations that do not fit them are refused too."""
    tensors = batch_tensors(*batch(100, 4), CODECS["fp32"])
    small = {"size": torch.tensor([2, 4], dtype=torch.int32)}
    assert refusal({**tensors, **small}, CODECS["fp32"], Workload(2, 4)) == "wrong_shape"
    small |= {f"{name}.spans": tensors[f"{name}.spans"][:2] for name in ("mask", "labels")}
    small["labels"] = tensors["labels"][:8]
    assert refusal({**tensors, **small}, CODECS["fp32"], Workload(2, 4)) == "wrong_shape"
    assert checked({**tensors, **small, "activations": tensors["activations"][:6]}, CODECS["fp32"], Workload(2, 4))


def test_padding_does_not_dodge_the_size_of_a_frame() -> None:
    """A frame of 1 KB could ask for a terabyte of zeros: what counts is what its batch would take without padding."""
    tensors = batch_tensors(*batch(2, 4), CODECS["fp32"])
    wide = {**tensors, "size": torch.tensor([2, 1 << 30], dtype=torch.int32)}
    with pytest.raises(
        ExchangeError, match=r"at most 192 bytes without padding, found 2 x 1073741824.*max-frame-mib"
    ) as e:
        check_batch(wide, codec=CODECS["fp32"], hidden_size=HIDDEN, vocab_size=VOCAB, max_bytes=2 * 4 * HIDDEN * 4)
    assert e.value.code == "batch_too_large"
    check_batch(tensors, codec=CODECS["fp32"], hidden_size=HIDDEN, vocab_size=VOCAB, max_bytes=2 * 4 * HIDDEN * 4)
