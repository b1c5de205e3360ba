"""The tail for remote heads: who comes in (`Admission`), what is said (`TailProtocol`), how it travels (a transport).

One stream per client and round, and another one where its connection breaks (`Stay`). A client identifies itself with a
one-time token that the server sent it inside its Flower task. What the frames say: `exchange/frames.py`.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from hsplit_flwr.common.log_lines import about
from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.admission import Admission, Ticket
from hsplit_flwr.exchange.batches import check_batch, gradient_tensors
from hsplit_flwr.exchange.codecs import Codec, codec_named
from hsplit_flwr.exchange.delta_frames import packed
from hsplit_flwr.exchange.frames import Frame, Header, decode, encode, expect_header, probe_filler, rounding_seed
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.kept_rows import MOST_ROWS, UNKNOWN_ROWS, ActivationCache, KeptRows
from hsplit_flwr.exchange.positions import traveling
from hsplit_flwr.exchange.read_ahead import read_ahead
from hsplit_flwr.exchange.refusal_log import RefusalLog
from hsplit_flwr.exchange.stay import StreamReplacedError
from hsplit_flwr.exchange.task import Mode
from hsplit_flwr.exchange.traffic import Traffic
from hsplit_flwr.exchange.transport import Caller, transport_of
from hsplit_flwr.lora.delta_update import OwnRound
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.session import BatchPart, TailSession
from hsplit_flwr.training.workload import Workload

MAX_PROBES, MAX_PROBE_BYTES = 64, 16 << 20
BYTES_PER_TOLD_ROW = 64
"""of the largest frame, for each row that a client is told of: all must fit in one"""

DeltaSource = Callable[[int, int, OwnRound | None], tuple[int, bool, dict[str, Tensor]]]
"""(version the client holds, its cut, what it holds of its own training) -> (version it gets to, whether that is the
whole delta, tensors)"""
OnGone = Callable[[Callable[[float], None]], object]
"""told once what to call when the stream is gone, with the seconds that its client has to come back"""


class Sizes(Protocol):
    """What frames are checked against."""

    @property
    def hidden_size(self) -> int:
        """H of the activations."""

    @property
    def vocab_size(self) -> int:
        """Labels are below it."""


class ServedTail(Protocol):
    """What is asked of a tail (`training.tail.SharedTail`)."""

    @property
    def segment(self) -> Sizes:
        """Its blocks."""

    def join(self, client: str, cut: int, first_step: int, *, trains: bool = True) -> TailSession:
        """A session in the open training round."""

    def scorer(self, client: str, cut: int) -> TailSession:
        """A session that can only score."""


class TailProtocol:
    """What the tail says to one client: frames in, frames out; no transport, no thread of its own.

    Args:
        tail: trains and scores.
        deltas: what clients lack of the weights.
        run: every frame must name it.
        activation_codec: what comes up.
        gradient_codec: what goes down.
        max_frame_bytes: larger frames are refused unread, and batches that would need one if they had no padding.
        grace_s: how long a client may take to come back when its frames end without its leave; 0: it leaves, too.
        kept_answers: of one client, for when it comes back: as many as it may have no answer to.
        kept_rows: client -> what is kept of its activations from round to round; None: nothing.
    """

    def __init__(
        self,
        tail: ServedTail,
        deltas: DeltaSource,
        run: str,
        *,
        activation_codec: Codec,
        gradient_codec: Codec,
        max_frame_bytes: int,
        grace_s: float = 0.0,
        kept_answers: int = 0,
        kept_rows: Callable[[str], KeptRows | None] = lambda client: None,
    ) -> None:
        self._tail = tail
        self._deltas = deltas
        self._run = run
        self._up = activation_codec
        self._down = gradient_codec
        self._max_frame_bytes = max_frame_bytes
        self._grace_s = grace_s
        self._kept_answers = kept_answers
        self._kept_rows = kept_rows

    def exchange_by(self, activation_codec: Codec, gradient_codec: Codec, kept_answers: int) -> None:
        """Serve by these from the next client on."""
        self._up, self._down, self._kept_answers = activation_codec, gradient_codec, kept_answers

    def serve(self, frames: Iterable[bytes], ticket: Ticket, on_gone: OnGone = lambda leave: None) -> Iterator[bytes]:
        """The tail's answers to the frames of the client that `ticket` admits; notes its traffic there.

        Args:
            frames: the client's, until it leaves or its connection breaks.
            ticket: its own.
            on_gone: told what to call, and with how many seconds to come back, if the client vanishes while its step
                waits for the others.

        Raises:
            ExchangeError: a frame was refused, or the tail could not answer it; the client's round is over.
        """
        stream = ticket.stay.arrive()
        try:
            yield from self._stream(self._received(frames, ticket, stream), ticket, stream, on_gone)
        except StreamReplacedError:
            return
        except Exception as error:
            refusal = error if isinstance(error, ExchangeError) else None
            if refusal and refusal.code == UNKNOWN_ROWS:
                ticket.stay.break_off(stream, self._grace_s)
            else:
                ticket.stay.leave(stream, refusal)
            raise
        ticket.stay.break_off(stream, self._grace_s)

    def _stream(self, received: Iterator[Frame], ticket: Ticket, stream: int, on_gone: OnGone) -> Iterator[bytes]:
        if ticket.mode == "probe":
            yield from self._echo(received, ticket)
            return
        hello = next(received, None)
        if hello is None:
            return
        is_back = hello.header.kind == "resume"
        self._expect(hello, ticket, "resume" if is_back else "hello")
        if not is_back:
            yield from self._delta(hello.header, ticket)
        at = (hello.header.step, hello.header.part) if is_back else None
        owed = ticket.stay.join(stream, partial(self._session, ticket), at)
        on_gone(partial(ticket.stay.break_off, stream))
        if not is_back:
            yield from self._told(ticket)
        for frame in received:
            self._expect(frame, ticket, ticket.mode)
            step, part = frame.header.step, frame.header.part
            if owed:
                expect_header(frame.header, step=owed[0].step, part=owed[0].part)
                answer = owed.popleft().frame
            else:
                compute = partial(self._answer, frame=frame, ticket=ticket)
                answer = ticket.stay.answer(stream, step, part, compute, self._kept_answers)
            yield self._sent(answer, ticket)

    def _received(self, frames: Iterable[bytes], ticket: Ticket, stream: int) -> Iterator[Frame]:
        """The client's frames up to its leave, which is noted."""
        for data in frames:
            ticket.bytes_up += len(data)
            frame = decode(data, self._max_frame_bytes)
            if frame.header.kind == "leave":
                self._expect(frame, ticket, "leave")
                ticket.stay.leave(stream)
                return
            yield frame

    def _expect(self, frame: Frame, ticket: Ticket, kind: str) -> None:
        expect_header(frame.header, kind=kind, run=self._run, round=ticket.round, client=ticket.client, cut=ticket.cut)

    def _echo(self, received: Iterator[Frame], ticket: Ticket) -> Iterator[bytes]:
        """Answers as large as a probe asks for, up to a limit."""
        for _, frame in zip(range(MAX_PROBES), received, strict=False):
            self._expect(frame, ticket, "probe")
            filler = probe_filler(min(frame.header.left, MAX_PROBE_BYTES))
            yield self._sent(encode(self._header("probe", ticket), filler), ticket)

    def _delta(self, hello: Header, ticket: Ticket) -> Iterator[bytes]:
        own = OwnRound(ticket.client, hello.own) if hello.own else None
        version, whole, tensors = self._deltas(hello.have, ticket.cut, own)
        kept = self._kept_rows(ticket.client)
        if kept is not None and tensors:  # the head changes: what it computed so far does not come again
            kept.clear()
        share = 0 if kept is None else kept.limit_bytes
        parts = packed(tensors)
        for index, part in enumerate(parts):
            left = len(parts) - 1 - index
            header = self._header("delta", ticket, version=version, whole=whole, left=left, share=share)
            frame = encode(header, part)
            ticket.delta_bytes += len(frame)
            yield self._sent(frame, ticket)

    def _told(self, ticket: Ticket) -> Iterator[bytes]:
        """What is kept of the client's activations, if anything ever is."""
        if (kept := self._kept_rows(ticket.client)) is not None:
            yield self._sent(encode(self._header("kept", ticket), kept.told()), ticket)

    def _session(self, ticket: Ticket) -> TailSession:
        if ticket.mode == "train":
            return self._tail.join(ticket.client, ticket.cut, ticket.first_step, trains=ticket.trains)
        return self._tail.scorer(ticket.client, ticket.cut)

    def _answer(self, session: TailSession, frame: Frame, ticket: Ticket) -> bytes:
        header, tensors = frame
        if ticket.max_steps is not None and header.step >= ticket.max_steps:
            raise ExchangeError(
                "too_many_steps",
                f"Expected at most {ticket.max_steps} steps in this round, found a frame of step {header.step} "
                "(counted from 0). Take local-steps from the task.",
            )
        batch = check_batch(
            tensors,
            codec=self._up,
            hidden_size=self._tail.segment.hidden_size,
            vocab_size=self._tail.segment.vocab_size,
            workload=ticket.workload,
            max_bytes=self._max_frame_bytes,
            kept=self._kept_rows(ticket.client),
        )
        if ticket.mode == "train":
            part = BatchPart(header.step, header.part, header.parts)
            _bound_rows(ticket, part, rows=len(batch[-1]))
            arrived_s = time.perf_counter()
            session.send_part(part, *batch)
            reply = session.receive_part()
            ticket.held_s += time.perf_counter() - arrived_s
            ticket.count(reply.loss * reply.tokens, reply.tokens, ends_step=part.is_last)
            if ticket.steps == ticket.max_steps:
                session.close()  # nobody waits for it any more, though its goodbye be lost with its connection
            answer = self._header(
                "gradient", ticket, step=part.step, part=part.number, loss=reply.loss, tokens=reply.tokens
            )
            if reply.gradient is None:
                return encode(answer)
            positions = traveling(*batch[1:])
            return encode(answer, gradient_tensors(reply.gradient, positions, self._down, rounding_seed(answer)))
        score = session.score_step(header.step, *batch)
        ticket.count(score.nll, score.tokens)
        return encode(self._header("score", ticket, step=header.step, nll=score.nll, tokens=score.tokens))

    def _header(self, kind: str, ticket: Ticket, **fields: Any) -> Header:
        return Header(kind, self._run, ticket.round, ticket.client, ticket.cut, **fields)

    @staticmethod
    def _sent(frame: bytes, ticket: Ticket) -> bytes:
        ticket.bytes_down += len(frame)
        return frame


class TailService:
    """Serves a tail to remote heads, from the moment it is made.

    Args:
        tail: trains and scores.
        deltas: what clients lack of the weights.
        run: the run's name, which frames must bear.
        config: where to listen, and what to accept.

    Raises:
        ConfigError: a codec that this version does not have, the address cannot be bound, or the TLS files cannot be
            read.
    """

    def __init__(self, tail: ServedTail, deltas: DeltaSource, run: str, config: ServiceConfig) -> None:
        most_rows = min(MOST_ROWS, config.max_frame_bytes // BYTES_PER_TOLD_ROW)
        self._cache = ActivationCache(config.activation_cache_bytes, most_rows)
        self._protocol = TailProtocol(
            tail,
            deltas,
            run,
            activation_codec=codec_named(config.activation_codec),
            gradient_codec=codec_named(config.gradient_codec),
            max_frame_bytes=config.max_frame_bytes,
            grace_s=config.reconnect_grace_s,
            kept_answers=1 + config.frames_ahead if config.reconnect_grace_s > 0 else 0,
            kept_rows=self._cache.of,
        )
        self.traffic = Traffic()
        self._frames_ahead = config.frames_ahead
        self._grace_s = config.reconnect_grace_s
        self._refusals = RefusalLog()
        self._admission = Admission(returns=config.reconnect_grace_s > 0)
        self._listener = transport_of(config.bind).listen(self._serve, config)
        self._listener.start()

    @property
    def address(self) -> str:
        """What clients connect to."""
        return self._listener.address

    def exchange_by(self, training: TrainingConfig) -> None:
        """Take and send frames by these settings' codecs and parts in flight, in the rounds that open from now on.

        Raises:
            ConfigError: a codec that this version does not have.
        """
        up, down = codec_named(training.activation_codec), codec_named(training.gradient_codec)
        self._protocol.exchange_by(up, down, training.parts_in_flight if self._grace_s > 0 else 0)
        self._frames_ahead = training.parts_in_flight - 1

    @property
    def holds_clients(self) -> bool:
        """See `Listener`."""
        return self._listener.holds_clients

    def open_round(
        self,
        round_number: int,
        mode: Mode,
        cuts: Mapping[str, int],
        first_step: int,
        frozen: Collection[str] = (),
        *,
        steps: int | None = None,
        workload: Workload | None = None,
    ) -> dict[str, str]:
        """See `Admission.open_round` and `ActivationCache.open_round`."""
        self._cache.open_round(cuts, frozen)
        return self._admission.open_round(round_number, mode, cuts, first_step, frozen, steps=steps, workload=workload)

    def open_probe(self, node: str, round_number: int) -> str:
        """See `Admission.open_probe`."""
        return self._admission.open_probe(node, round_number)

    def hears_of(self, client: str) -> bool:
        """See `Admission.hears_of`."""
        return self._admission.hears_of(client)

    def answered(self, client: str) -> None:
        """See `Admission.answered`."""
        self._admission.answered(client)

    def close_round(self) -> dict[str, Ticket]:
        """See `Admission.close_round`."""
        return self._admission.close_round()

    def stop(self) -> None:
        """Stop listening; open streams end at once."""
        self.close_round()
        self._listener.stop()

    def _serve(self, caller: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
        ticket: Ticket | None = None
        try:
            with self._admission.admit(caller) as ticket, self.traffic.stream():
                on_gone = partial(self._on_gone, caller)
                received = read_ahead(self.traffic.received(frames), self._frames_ahead)
                yield from self.traffic.sent(self._protocol.serve(received, ticket, on_gone))
        except ExchangeError as error:
            self.traffic.refuse(error.code)
            if ticket:
                ticket.note_refusal(str(error))
            who = {"client": ticket.client, "round": ticket.round} if ticket else {}
            name = str(who.get("client", "an unknown client"))
            self._refusals.note(name, error, about("refused", code=error.code, **who))
            raise

    def _on_gone(self, caller: Caller, leave: Callable[[float], None]) -> None:
        """Nobody comes back to a stream that has reached its deadline."""
        caller.on_gone(lambda: leave(self._grace_s if caller.seconds_left > 0 else 0.0))


def _bound_rows(ticket: Ticket, part: BatchPart, rows: int) -> None:
    """Parts of a step are together no larger than a batch may be."""
    ticket.step_rows = rows + (ticket.step_rows if part.number else 0)
    if ticket.workload and ticket.step_rows > ticket.workload.batch_size:
        raise ExchangeError(
            "batch_too_large",
            f"Expected at most {ticket.workload.batch_size} rows in all parts of a step, as this round was planned "
            f"for, found {ticket.step_rows}. Raise the strategy's workload (batch-size), or use smaller batches.",
        )
