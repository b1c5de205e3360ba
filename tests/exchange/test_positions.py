"""Only real positions travel, and nothing that is learned differs by a bit: losses, gradients, adapters, importance."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.exchange.batches import batch_layout, batch_tensors, check_batch, check_gradient, gradient_tensors
from hsplit_flwr.exchange.codecs import CODECS, Part
from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.exchange.grpc_transport import ServiceConfig, connect
from hsplit_flwr.exchange.positions import (
    BatchForm,
    decode_marks,
    encode_marks,
    in_spans,
    marks_layout,
    traveling,
)
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.tail_service import TailProtocol, TailService
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import segment_from_model
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.head import TrainReport, score_head, train_head
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.workload import Workload
from tests.exchange.test_protocol import Direct, no_delta
from tests.helpers.models import ARCHITECTURES, HIDDEN_SIZE, NUM_BLOCKS, tiny_model
from tests.helpers.replies import gradient_of

pytestmark = pytest.mark.timeout(60)

STEPS, ROWS, WIDTH = 2, 4, 11
Way = Literal["local", "frames", "grpc"]
LORA = LoraSpec(r=2, lora_alpha=4)
CONFIG = TrainingConfig(1, STEPS, 1e-2, warmup_steps=0, importance_steps=STEPS, importance_rows=3)
PADDINGS: dict[str, list[str]] = {
    "none": ["xxxxxxxxxxx"] * ROWS,
    "right": ["xxxxxxxxxxx", "xxxxxxx....", "xx.........", "xxxxx......"],
    "left": ["xxxxxxxxxxx", "....xxxxxxx", ".........xx", "......xxxxx"],
    "mixed": ["xxxxxxxxx..", "..xxxxxxx..", "xxx.xx.xxxx", ".x.x.x.x.x."],
    "empty rows": ["...........", "xxxxxxx....", "...........", "..xxxxxx..."],
    "all empty": ["..........."] * ROWS,
}
"""x: a token"""


def mask_of(rows: list[str]) -> Tensor:
    return torch.tensor([[int(mark == "x") for mark in row] for row in rows])


def batches(padding: str, first_targets: bool = False, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches with a masked prompt of three tokens, or none: then padding on the left predicts the first token."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(STEPS):
        mask = mask_of(PADDINGS[padding])
        ids = torch.randint(3, 97, mask.shape, generator=generator)
        prompt = mask.cumsum(1) <= (0 if first_targets else 3)
        labels = ids.masked_fill((mask == 0) | prompt, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


# ---------------------------------------------------------------------------------------------- what is learned


@dataclass
class Seen:
    """All that a round of one client makes: what a head gets, and what head and tail learn."""

    report: TrainReport
    replies: list[StepReply]
    head: dict[str, Tensor]
    head_gradients: list[Tensor]
    tail: dict[str, Tensor]
    tail_importance: dict[str, float]
    score: ScoreReply
    bytes_up: int
    bytes_down: int


class Watched(TailSession):
    """A session whose replies are kept."""

    def __init__(self, session: TailSession) -> None:
        self._session = session
        self.replies: list[StepReply] = []

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        self._session.send_part(part, activations, attention_mask, labels)

    def receive_part(self) -> StepReply:
        self.replies.append(self._session.receive_part())
        return self.replies[-1]

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        return self._session.score_step(step, activations, attention_mask, labels)

    def close(self) -> None:
        self._session.close()


def factors_of(adapters: SegmentAdapters) -> dict[str, Tensor]:
    pairs = adapters.factors()
    return {f"{name}.{side}": getattr(pair, side).clone() for name, pair in pairs.items() for side in "AB"}


@contextmanager
def session_of(tail: SharedTail, cut: int, mode: Mode, way: Way, training: TrainingConfig) -> Iterator[TailSession]:
    """In the same process (`local`), or by frames, with gRPC between the ends or nothing (`frames`)."""
    if way == "local":
        local = tail.join("0", cut, 0) if mode == "train" else tail.scorer("0", cut)
        yield local
        local.close()
        return
    up, down = training.activation_codec, training.gradient_codec
    workload = Workload(ROWS, WIDTH)
    task = RoundTask("run", 1, "0", mode, "", "", 60.0, 1 << 22, ClientPlan(cut, LORA), training)
    if way == "frames":
        protocol = TailProtocol(
            tail, no_delta, "run", activation_codec=CODECS[up], gradient_codec=CODECS[down], max_frame_bytes=1 << 20
        )
        ticket = Ticket(client="0", round=1, mode=mode, cut=cut, first_step=0, workload=workload)
        with RemoteTail(task, 1 << 22, lambda *_: Direct(protocol, ticket)) as remote:
            remote.fetch_delta(0)
            yield remote
        return
    service = TailService(tail, no_delta, "run", ServiceConfig(activation_codec=up, gradient_codec=down))
    token = service.open_round(1, mode, {"0": cut}, 0, workload=workload)["0"]
    try:
        with RemoteTail(replace(task, address=service.address, token=token), 1 << 22, connect) as remote:
            remote.fetch_delta(0)
            yield remote
    finally:
        service.stop()


def play(name: str, data: Sequence[Batch], cut: int, way: Way, training: TrainingConfig = CONFIG) -> Seen:
    model = tiny_model(name)
    head = segment_from_model(copy.deepcopy(model), 0, cut)
    whole = segment_from_model(model)
    tail_names = [n for n in whole.linear_modules() if n not in head.linear_modules()]
    adapters = SegmentAdapters(head, LORA)
    adapters.reset(5)
    tail = SharedTail(whole, SegmentAdapters(whole, LORA, tail_names), training)
    tail.open_training(["0"], concurrency=1, adapter_seed=77)
    with session_of(tail, cut, "train", way, training) as session:
        watched = Watched(session)
        report = train_head(head, adapters, data, watched, training)
        up, down = (session.bytes_up, session.bytes_down) if isinstance(session, RemoteTail) else (0, 0)
    tail.close_training()
    gradients = [p.grad.clone() for p in adapters.parameters() if p.grad is not None]
    with session_of(tail, cut, "evaluate", way, training) as session:
        score = score_head(head, data, session)
    importance = tail.importance().get("0", {})
    return Seen(
        report, watched.replies, factors_of(adapters), gradients, factors_of(tail.adapters), importance, score, up, down
    )


def require_same(found: Seen, expected: Seen) -> None:
    assert found.report.losses == expected.report.losses
    assert found.report.importance == expected.report.importance
    assert found.tail_importance == expected.tail_importance
    assert found.score == expected.score
    for mine, theirs in zip(found.replies, expected.replies, strict=True):
        assert torch.equal(gradient_of(mine), gradient_of(theirs))
        assert (mine.loss, mine.tokens) == (theirs.loss, theirs.tokens)
    assert all(map(torch.equal, found.head_gradients, expected.head_gradients))
    learned, reference = {**found.head, **found.tail}, {**expected.head, **expected.tail}
    assert learned.keys() == reference.keys()
    for key, tensor in reference.items():
        assert torch.equal(learned[key], tensor), key


CASES = [
    *((name, cut, padding) for name in ("gpt2", "llama") for cut in range(1, NUM_BLOCKS) for padding in PADDINGS),
    *((name, 2, padding) for name in ARCHITECTURES for padding in ("right", "left", "mixed", "empty rows")),
]


@pytest.mark.parametrize(("name", "cut", "padding"), sorted(set(CASES)))
def test_what_is_learned_does_not_differ_by_a_bit(name: str, cut: int, padding: str) -> None:
    """By frames without padding, against the same process, where all positions reach the tail as the head made them."""
    data = batches(padding)
    expected = play(name, data, cut, "local")
    require_same(play(name, data, cut, "frames"), expected)
    if padding != "all empty":
        assert expected.report.tokens > 0
        assert any(value > 0 for value in expected.report.importance.values())
        assert any(value > 0 for value in expected.tail_importance.values())


@pytest.mark.parametrize("padding", PADDINGS)
def test_it_does_not_over_grpc_either(padding: str) -> None:
    data = batches(padding)
    require_same(play("llama", data, 2, "grpc"), play("llama", data, 2, "local"))


@pytest.mark.parametrize("padding", ["left", "mixed", "empty rows"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_that_predicts_a_target_is_no_exception(name: str, padding: str) -> None:
    """Labels on the first token of a left-padded row: the padding before it predicts it, and sees what it likes."""
    data = batches(padding, first_targets=True)
    mask, labels = data[0]["attention_mask"], data[0]["labels"]
    assert traveling(mask, labels).sum() > mask.sum()
    require_same(play(name, data, 2, "frames"), play(name, data, 2, "local"))


@pytest.mark.parametrize("padding", ["none", "left", "right", "mixed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_follows_the_last_target_is_not_missed(name: str, padding: str) -> None:
    """Tokens after the answer, and a row without any target: they were sent, and their gradient, which is zero."""
    data = batches(padding)
    for batch in data:
        batch["labels"][:, 8:] = -100
        batch["labels"][1] = -100
    mask, labels = data[0]["attention_mask"], data[0]["labels"]
    assert (mask.bool() & ~traveling(mask, labels)).sum() >= 9
    require_same(play(name, data, 2, "frames"), play(name, data, 2, "local"))


def before_last_target(mask: Tensor, labels: Tensor) -> int:
    """Tokens of a row (T,) after which a target comes."""
    last = max((place for place, label in enumerate(labels.tolist()) if label != -100), default=0)
    return int(mask[:last].sum())


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_those_of_real_positions(codec: str) -> None:
    """As both sides count them, and as they are predicted from the batches alone."""
    training = replace(CONFIG, activation_codec=codec, gradient_codec=codec)
    workload = Workload.of(training, batch_size=ROWS, sequence_length=WIDTH)
    for padding in ("none", "right", "left", "mixed", "empty rows", "all empty"):
        data = batches(padding)
        found = play("llama", data, 2, "grpc", training)
        forms = [BatchForm.of(batch["attention_mask"], batch["labels"]) for batch in data]
        before = [sum(map(before_last_target, b["attention_mask"], b["labels"])) for b in data]
        # Holes predict: two rows travel whole.
        assert [form.positions for form in forms] == ([36] * STEPS if padding == "mixed" else before)
        delta = len(encode(Header("delta", "run", 1, "0", 2, version=7)))
        up = sum(frame_bytes.step_bytes_up(workload, HIDDEN_SIZE, form) for form in forms)
        down = sum(frame_bytes.step_bytes_down(workload, HIDDEN_SIZE, form) for form in forms)
        assert (found.bytes_up, found.bytes_down) == (frame_bytes.hello_bytes() + up, delta + down)
        assert up <= STEPS * frame_bytes.step_bytes_up(workload, HIDDEN_SIZE)
        assert down <= STEPS * frame_bytes.step_bytes_down(workload, HIDDEN_SIZE)


# ---------------------------------------------------------------------------------------------- the form of a frame

MARKS = st.integers(1, 5).flatmap(
    lambda rows: st.integers(1, 20).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows)
    )
)


@settings(max_examples=200, deadline=None)
@given(MARKS)
def test_marks_come_back(rows: list[list[bool]]) -> None:
    marked = torch.tensor(rows)
    tensors = encode_marks("mask", marked)
    contiguous = all("01" not in "".join(str(int(m)) for m in row).lstrip("0") for row in rows)
    assert in_spans(marked) == contiguous
    layout = marks_layout("mask", len(rows), len(rows[0]), contiguous)
    assert {name: Part(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == layout
    assert torch.equal(decode_marks("mask", tensors, marked.shape[1]), marked)


@settings(max_examples=100, deadline=None)
@given(MARKS, st.randoms(use_true_random=False), st.sampled_from(sorted(CODECS)))
def test_any_batch_comes_back_where_it_counts(rows: list[list[bool]], chance: object, name: str) -> None:
    mask = torch.tensor(rows)
    generator = torch.Generator().manual_seed(chance.getrandbits(32))  # type: ignore[attr-defined]
    labels = torch.randint(0, 11, mask.shape, generator=generator)
    labels[torch.rand(mask.shape, generator=generator) < 0.5] = -100
    activations = torch.randn(*mask.shape, 6, generator=generator)
    codec = CODECS[name]
    tensors = batch_tensors(activations, mask, labels, codec)
    form = BatchForm.of(mask, labels)
    assert {key: Part(tuple(t.shape), t.dtype) for key, t in tensors.items()} == batch_layout(codec, form, 6)
    found, found_mask, found_labels = check_batch(tensors, codec=codec, hidden_size=6, vocab_size=11)
    assert torch.equal(found_mask.bool(), mask)
    assert torch.equal(found_labels.long(), labels)
    positions = traveling(mask, labels)
    assert found[~positions].count_nonzero() == 0
    sent = codec.encode("x", activations[positions])
    assert torch.equal(found[positions], codec.decode("x", sent, (form.positions, 6)))
    gradient = check_gradient(gradient_tensors(activations, positions, codec), positions, 6, codec)
    assert torch.equal(gradient, found)


@pytest.mark.parametrize(
    ("mask", "labels", "expected"),
    [
        ("xxx..", ".123.", "xxx.."),
        ("..xxx", "...12", "..xx."),  # the last token predicts nothing
        ("..xxx", "..012", "xxxxx"),  # position 1 predicts the label of position 2
        ("xxx..", "..1..", "xx..."),
        ("xxxxxx", ".12...", "xx...."),  # what follows the last target
        ("xxxxxx", ".1..2.", "xxxx.."),
        ("xxxxxx", "......", "......"),
        ("xxxxxx", "1.....", "......"),
        ("..xxxx", "..1...", "xxxxxx"),
        ("xx...", "...1.", "xxxxx"),  # a target far in the padding
        (".....", ".....", "....."),
        (".....", "1....", "....."),  # nothing predicts the first label
        (".....", ".1...", "xxxxx"),
        ("x.x.x", "..1..", "xxxxx"),
        ("x.x.x", "...1.", "x.x.."),
    ],
)
def test_which_positions_travel(mask: str, labels: str, expected: str) -> None:
    digits = torch.tensor([[-100 if digit == "." else int(digit) for digit in labels]])
    assert torch.equal(traveling(mask_of([mask]), digits), mask_of([expected]).bool())


def test_bits_take_no_more_than_is_said() -> None:
    """No contiguous batch takes more than the workload's full one; bits add at most B x (T/8 - 8) bytes each."""
    workload, hidden = Workload(3, 200), 1
    full = frame_bytes.step_bytes_up(workload, hidden)
    mask = torch.ones(3, 200, dtype=torch.int64)
    mask[:, 100] = 0
    labels = torch.ones_like(mask)
    labels[:, 50] = -100
    form = BatchForm.of(mask, labels)
    assert not form.mask_in_spans
    assert not form.labels_in_spans
    assert frame_bytes.step_bytes_up(workload, hidden, form) <= full + 2 * 3 * (25 - 8) + 16
    assert frame_bytes.step_bytes_up(workload, hidden, BatchForm(3, 200, 3 * 199, 3 * 200)) < full


@pytest.mark.parametrize("codec", CODECS)
def test_the_most_is_reached_by_padding_that_predicts(codec: str) -> None:
    workload = Workload(3, 20, activation_codec=codec, gradient_codec=codec)
    mask, labels = torch.ones(3, 20, dtype=torch.int64), torch.ones(3, 20, dtype=torch.int64)
    unpadded = BatchForm.of(mask, labels)
    assert unpadded == BatchForm(3, 20, 3 * 19, 3 * 20)
    mask[:, 0] = 0
    form = BatchForm.of(mask, labels)
    assert form == BatchForm.largest(3, 20)
    for count in (frame_bytes.step_bytes_up, frame_bytes.step_bytes_down):
        assert count(workload, HIDDEN_SIZE, unpadded) < count(workload, HIDDEN_SIZE, form)
        assert count(workload, HIDDEN_SIZE, form) == count(workload, HIDDEN_SIZE)


def test_a_head_may_hold_anything_in_its_padding() -> None:
    """NaN there was refused before, though nothing depends on it."""
    batch = batches("right")[0]
    mask, labels = batch["attention_mask"], batch["labels"]
    activations = torch.randn(ROWS, WIDTH, HIDDEN_SIZE).masked_fill(mask.unsqueeze(-1) == 0, float("nan"))
    tensors = batch_tensors(activations, mask, labels, CODECS["int8"])
    found, *_ = check_batch(tensors, codec=CODECS["int8"], hidden_size=HIDDEN_SIZE, vocab_size=97)
    assert torch.isfinite(found).all()
