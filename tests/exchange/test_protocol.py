"""What the tail says to one client, with lists of frames: no transport, no thread, no model."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange import delta_frames, frame_bytes
from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.exchange.batches import batch_tensors, check_batch, check_gradient
from hsplit_flwr.exchange.codecs import CODECS
from hsplit_flwr.exchange.frames import Frame, Header, decode, encode, probe_filler, rounding_seed
from hsplit_flwr.exchange.positions import BatchForm, traveling
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.tail_service import MAX_PROBE_BYTES, MAX_PROBES, DeltaSource, TailProtocol
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.lora.delta_update import OwnRound
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession
from hsplit_flwr.training.workload import Workload
from tests.helpers.replies import gradient_of

pytestmark = pytest.mark.timeout(20)

LIMIT = 1 << 20
ROWS, WIDTH, HIDDEN, VOCAB = 2, 4, 6, 11
CUT = 2
FULL = BatchForm(ROWS, WIDTH, ROWS * (WIDTH - 1), ROWS * WIDTH)
LOSS = 0.5


@dataclass
class Session(TailSession):
    """Doubles activations and calls that their gradient; every position is a target of loss `LOSS`."""

    joined: tuple[Any, ...]
    trains: bool = True
    steps: list[tuple[str, int]] = field(default_factory=list)
    closed: int = 0
    replies: list[StepReply] = field(default_factory=list)

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        self.steps.append(("train", part.step))
        gradient = 2 * activations.float() if self.trains else None
        self.replies.append(StepReply(gradient, LOSS, labels.numel()))

    def receive_part(self) -> StepReply:
        return self.replies.pop(0)

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        self.steps.append(("evaluate", step))
        return ScoreReply(LOSS * labels.numel(), labels.numel())

    def close(self) -> None:
        self.closed += 1


@dataclass
class Sizes:
    hidden_size: int = HIDDEN
    vocab_size: int = VOCAB


class Tail:
    """A tail without a model, and the sessions that were opened at it."""

    def __init__(self) -> None:
        self.segment = Sizes()
        self.sessions: list[Session] = []

    def join(self, client: str, cut: int, first_step: int, *, trains: bool = True) -> Session:
        self.sessions.append(Session((client, cut, first_step), trains))
        return self.sessions[-1]

    def scorer(self, client: str, cut: int) -> Session:
        self.sessions.append(Session((client, cut)))
        return self.sessions[-1]


def no_delta(have: int, cut: int, own: OwnRound | None) -> tuple[int, bool, dict[str, Tensor]]:
    return 7, False, {}


def protocol(tail: Tail, deltas: DeltaSource = no_delta, codec: str = "fp32", down: str = "") -> TailProtocol:
    up, down_codec = CODECS[codec], CODECS[down or codec]
    return TailProtocol(tail, deltas, "run", activation_codec=up, gradient_codec=down_codec, max_frame_bytes=LIMIT)


def ticket(mode: Mode = "train", **limits: Any) -> Ticket:
    return Ticket(client="me", round=3, mode=mode, cut=CUT, first_step=40, **limits)


def head(kind: str, **fields: Any) -> Header:
    return Header(kind, "run", 3, "me", CUT, **fields)


def batch(rows: int = ROWS, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, width, HIDDEN), torch.ones(rows, width), torch.ones(rows, width, dtype=torch.int64)


def step(
    number: int, kind: str = "train", codec: str = "fp32", rows: int = ROWS, width: int = WIDTH, **part: int
) -> bytes:
    header = head(kind, step=number, **part)
    return encode(header, batch_tensors(*batch(rows, width), CODECS[codec], rounding_seed(header)))


def there_and_back(values: Tensor, codec: str, header: Header) -> Tensor:
    """What arrives of `values` (B, T, H) in the frame of `header`, where all are tokens: the last predicts nothing."""
    sent = values[:, :-1]
    flat = sent.flatten(0, 1)
    parts = CODECS[codec].encode("x", flat, rounding_seed(header))
    return F.pad(CODECS[codec].decode("x", parts, tuple(flat.shape)).view(sent.shape), (0, 0, 0, 1))


HELLO = encode(head("hello", have=5))


def served(tail: Tail, own: Ticket, *frames: bytes, **settings: Any) -> list[Frame]:
    return [decode(frame, LIMIT) for frame in protocol(tail, **settings).serve(list(frames), own)]


def refusal(tail: Tail, own: Ticket, *frames: bytes) -> ExchangeError:
    """Of the last frame; those before it are answered."""
    answers = protocol(tail).serve(list(frames), own)
    for _ in frames[:-1]:
        next(answers)
    with pytest.raises(ExchangeError, match=r"Expected .*found") as error:
        next(answers)
    return error.value


# ---------------------------------------------------------------------------------------------- a round


@pytest.mark.parametrize("codec", CODECS)
def test_a_training_round(codec: str) -> None:
    tail, own = Tail(), ticket()
    sent = [HELLO, *(step(number, codec=codec) for number in range(3))]
    answers = list(protocol(tail, codec=codec).serve(sent, own))
    delta, *gradients = (decode(answer, LIMIT) for answer in answers)
    assert delta == (head("delta", version=7), {})
    for number, (frame, gradient) in enumerate(zip(sent[1:], gradients, strict=True)):
        assert gradient.header == head("gradient", step=number, loss=LOSS, tokens=ROWS * WIDTH)
        sent_tensors = decode(frame, LIMIT).tensors
        activations, mask, labels = check_batch(
            sent_tensors, codec=CODECS[codec], hidden_size=HIDDEN, vocab_size=VOCAB, workload=Workload(ROWS, WIDTH)
        )
        found = check_gradient(gradient.tensors, traveling(mask, labels), HIDDEN, CODECS[codec])
        assert torch.equal(found, there_and_back(2 * activations.float(), codec, gradient.header))
    (session,) = tail.sessions
    assert session.joined == ("me", CUT, 40)
    assert session.steps == [("train", number) for number in range(3)]
    assert session.closed == 1
    assert (own.bytes_up, own.bytes_down) == (sum(map(len, sent)), sum(map(len, answers)))
    assert (own.steps, own.tokens, own.nll) == (3, 3 * ROWS * WIDTH, 3 * ROWS * WIDTH * LOSS)
    assert own.delta_bytes == len(answers[0])
    workload = Workload(ROWS, WIDTH, activation_codec=codec, gradient_codec=codec)
    assert {len(frame) for frame in sent[1:]} == {frame_bytes.step_bytes_up(workload, HIDDEN, FULL)}
    assert {len(answer) for answer in answers[1:]} == {frame_bytes.step_bytes_down(workload, HIDDEN, FULL)}
    assert len(HELLO) == frame_bytes.hello_bytes()


def test_an_evaluation() -> None:
    tail, own = Tail(), ticket("evaluate")
    delta, score = served(tail, own, HELLO, step(0, "evaluate"))
    assert delta.header.kind == "delta"
    assert score == (head("score", nll=LOSS * ROWS * WIDTH, tokens=ROWS * WIDTH), {})
    (session,) = tail.sessions
    assert (session.joined, session.steps, session.closed) == (("me", CUT), [("evaluate", 0)], 1)
    assert (own.steps, own.tokens, own.nll) == (1, ROWS * WIDTH, LOSS * ROWS * WIDTH)


def test_an_answer_comes_before_the_next_frame_is_looked_at() -> None:
    tail = Tail()
    read = []

    def frames() -> Iterator[bytes]:
        for name, frame in (("hello", HELLO), ("0", step(0)), ("1", step(1))):
            read.append(name)
            yield frame

    answers = protocol(tail).serve(frames(), ticket())
    seen = [list(read) for _ in answers]
    assert seen == [["hello"], ["hello", "0"], ["hello", "0", "1"]]


@pytest.mark.parametrize("heard", [0, 1, 2])
def test_a_client_may_leave_at_any_time(heard: int) -> None:
    tail, own = Tail(), ticket()
    frames = [HELLO, step(0)][:heard]
    assert len(served(tail, own, *frames)) == heard
    assert [session.closed for session in tail.sessions] == [1] * min(1, heard)
    assert own.steps == max(0, heard - 1)


def test_a_client_that_vanishes_leaves_the_round() -> None:
    """The transport calls `on_gone` while a step waits; that it drops the answers then changes nothing."""
    tail = Tail()
    actions: list[Callable[[float], None]] = []
    answers = protocol(tail).serve([HELLO, step(0)], ticket(), actions.append)
    next(answers)
    assert actions == []  # nothing to leave yet
    next(answers)
    (session,) = tail.sessions
    actions[0](0.0)
    assert session.closed == 1
    answers.close()  # type: ignore[attr-defined]
    assert session.closed == 1


def test_the_delta_goes_in_frames_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_frames, "DELTA_FRAME_BYTES", 1000)
    tensors = {f"t{i}": torch.randn(size) for i, size in enumerate([100, 100, 100, 5000, 1])}
    asked_for = []

    def deltas(have: int, cut: int, own: OwnRound | None) -> tuple[int, bool, dict[str, Tensor]]:
        asked_for.append((have, cut))
        return 9, True, tensors

    own = ticket()
    found = served(Tail(), own, HELLO, deltas=deltas)
    assert asked_for == [(5, CUT)]
    assert [sorted(frame.tensors) for frame in found] == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]
    assert [frame.header for frame in found] == [head("delta", version=9, whole=True, left=3 - i) for i in range(4)]
    assert own.delta_bytes == own.bytes_down


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (step(0), "wrong_kind"),
        (encode(replace(head("hello"), run="other")), "wrong_run"),
        (encode(replace(head("hello"), round=4)), "wrong_round"),
        (encode(replace(head("hello"), client="you")), "wrong_client"),
        (encode(replace(head("hello"), cut=1)), "wrong_cut"),
        (b"noise", "malformed_frame"),
        (bytes(LIMIT + 1), "frame_too_large"),
    ],
)
def test_a_bad_hello_never_joins(frame: bytes, code: str) -> None:
    tail, own = Tail(), ticket()
    assert refusal(tail, own, frame).code == code
    assert tail.sessions == []
    assert (own.bytes_up, own.bytes_down) == (len(frame), 0)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (HELLO, "wrong_kind"),
        (step(1, "evaluate"), "wrong_kind"),
        (encode(head("train", step=1)), "wrong_tensors"),
        (step(1, codec="bf16"), "wrong_dtype"),
        (b"noise", "malformed_frame"),
    ],
)
def test_a_bad_step_ends_the_round_of_its_client(frame: bytes, code: str) -> None:
    tail, own = Tail(), ticket()
    assert refusal(tail, own, HELLO, step(0), frame).code == code
    (session,) = tail.sessions
    assert (session.steps, session.closed) == ([("train", 0)], 1)
    assert own.steps == 1


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_more_steps_than_the_round_has_are_refused_before_anything_is_computed(mode: Mode) -> None:
    """An admitted client trained the tail for 100 steps in a round of 20."""
    tail, own = Tail(), ticket(mode, max_steps=2)
    error = refusal(tail, own, HELLO, step(0, mode), step(1, mode), step(2, mode))
    assert error.code == "too_many_steps"
    assert "at most 2 steps in this round, found a frame of step 2" in str(error)
    (session,) = tail.sessions
    assert session.steps == [(mode, 0), (mode, 1)]
    assert own.steps == 2


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize(("rows", "width"), [(ROWS + 1, 1), (1, WIDTH + 1)])
def test_batches_larger_than_planned_are_refused_before_anything_is_computed(mode: Mode, rows: int, width: int) -> None:
    tail, own = Tail(), ticket(mode, workload=Workload(ROWS, WIDTH))
    error = refusal(tail, own, HELLO, step(0, mode), step(1, mode, rows=rows, width=width))
    assert error.code == "batch_too_large"
    assert tail.sessions[0].steps == [(mode, 0)]
    assert own.steps == 1


def test_parts_of_a_step_are_answered_one_by_one_and_make_one_step() -> None:
    tail, own = Tail(), ticket(workload=Workload(ROWS, WIDTH), max_steps=1)
    parts = [step(0, rows=1, part=0, parts=2), step(0, rows=1, part=1, parts=2)]
    _, *answers = served(tail, own, HELLO, *parts)
    assert [(header.kind, header.step, header.part) for header, _ in answers] == [
        ("gradient", 0, 0),
        ("gradient", 0, 1),
    ]
    assert (own.steps, own.tokens) == (1, 2 * WIDTH)


def test_a_step_is_not_larger_for_coming_in_parts() -> None:
    tail, own = Tail(), ticket(workload=Workload(ROWS, WIDTH))
    parts = [step(0, rows=ROWS, part=0, parts=2), step(0, rows=1, part=1, parts=2)]
    error = refusal(tail, own, HELLO, *parts)
    assert error.code == "batch_too_large"
    assert f"Expected at most {ROWS} rows in all parts of a step" in str(error)
    assert own.steps == 0


def test_without_limits_there_are_none() -> None:
    own = ticket()
    found = served(Tail(), own, HELLO, step(0, rows=50, width=50), step(10**6))
    assert len(found) == 3


# ---------------------------------------------------------------------------------------------- probes


def probe(up: int, down: int) -> bytes:
    return encode(Header("probe", "run", 0, "node", 1, left=down), probe_filler(up))


def prober() -> Ticket:
    return Ticket(client="node", round=0, mode="probe", cut=1, first_step=0)


def test_a_probe_is_echoed_as_large_as_it_asks() -> None:
    tail, own = Tail(), prober()
    frames = [probe(10, 1000), probe(5000, 0)]
    answers = list(protocol(tail).serve(frames, own))
    assert [decode(answer, LIMIT).tensors["filler"].numel() for answer in answers] == [1000, 0]
    assert (own.bytes_up, own.bytes_down) == (sum(map(len, frames)), sum(map(len, answers)))
    assert tail.sessions == []


def test_a_probe_has_its_limits() -> None:
    answers = list(protocol(Tail()).serve([probe(0, 1)] * (MAX_PROBES + 5), prober()))
    assert len(answers) == MAX_PROBES
    (answer,) = protocol(Tail()).serve([probe(0, 1 << 60)], prober())
    assert decode(answer, 2 * MAX_PROBE_BYTES).tensors["filler"].numel() == MAX_PROBE_BYTES
    assert refusal(Tail(), prober(), HELLO).code == "wrong_kind"


# ---------------------------------------------------------------------------------------------- both ends


class Direct:
    """A transport in a few lines: a `FrameStream` that runs the protocol when an answer is asked for."""

    def __init__(self, serving: TailProtocol, own: Ticket) -> None:
        self._sent: deque[bytes] = deque()
        self._answers = serving.serve(iter(lambda: self._sent.popleft() if self._sent else b"", b""), own)

    def send(self, frame: bytes) -> None:
        self._sent.append(frame)

    def receive(self) -> bytes | None:
        return next(self._answers, None)

    def close(self) -> None:
        list(self._answers)


@pytest.mark.parametrize("down", CODECS)
@pytest.mark.parametrize("codec", CODECS)
def test_a_remote_tail_over_any_transport(codec: str, down: str) -> None:
    tail, own = Tail(), ticket()
    weights = {"w": torch.randn(3)}
    task = RoundTask(
        run="run",
        round=3,
        client="me",
        mode="train",
        address="nowhere",
        token="t0k3n",
        time_limit_s=60.0,
        max_frame_bytes=LIMIT,
        plan=ClientPlan(CUT, LoraSpec()),
        training=TrainingConfig(activation_codec=codec, gradient_codec=down),
    )
    asked = []

    def connect(*args: object) -> Direct:
        asked.append(args)
        return Direct(protocol(tail, lambda have, cut, own: (8, True, weights), codec, down), own)

    with RemoteTail(task, LIMIT, connect) as remote:
        version, whole, tensors = remote.fetch_delta(0)
        activations, mask, labels = batch()
        reply = remote.train_step(0, activations, mask, labels)
    assert asked == [("nowhere", "t0k3n", 60.0, LIMIT)]
    assert (version, whole, json.dumps(tensors["w"].tolist())) == (8, True, json.dumps(weights["w"].tolist()))
    arrived = there_and_back(activations, codec, head("train"))
    assert torch.equal(gradient_of(reply), there_and_back(2 * arrived.float(), down, head("gradient")))
    assert (reply.loss, reply.tokens) == (LOSS, ROWS * WIDTH)
    assert (remote.bytes_up, remote.bytes_down) == (own.bytes_up, own.bytes_down)
    assert [session.closed for session in tail.sessions] == [1]


def test_a_remote_tail_that_is_not_connected_says_so() -> None:
    task = RoundTask("run", 3, "me", "train", "a", "t", 1.0, LIMIT, ClientPlan(CUT, LoraSpec()), TrainingConfig())
    remote = RemoteTail(task, LIMIT, lambda *args: Direct(protocol(Tail()), ticket()))
    with pytest.raises(ExchangeError, match=r"Use `with RemoteTail"):
        remote.fetch_delta(0)
    remote.close()
