"""A client's use of a tail in the same process: it asks the barrier for a place in a step, and waits for the answer."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.training.barrier import StepBarrier
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession, is_measured, wants_gradient
from hsplit_flwr.training.step import StepRequest


@dataclass(frozen=True, eq=False)
class Asked:
    """A client's request for the next step, and the place of its answer."""

    request: StepRequest
    reply: "Future[StepReply]" = field(default_factory=Future)


def refuse(untaken: Iterable[Asked], error: ExchangeError | None = None) -> None:
    """Answer those who have no answer yet with `error`; by default that the round ended."""
    for asked in untaken:
        if not asked.reply.done():
            closed = ExchangeError("round_closed", "The round ended before this step was taken.")
            asked.reply.set_exception(error or closed)


@dataclass(kw_only=True)
class LocalSession(TailSession):
    """A `TailSession` in the tail's own process; see `SharedTail.join` and `SharedTail.scorer`."""

    client: str
    cut: int
    score: Callable[[int, Tensor, Tensor, Tensor], ScoreReply]
    barrier: StepBarrier[Asked] | None = None
    """of the training round; None: this session can only score"""
    first_step: int = 0
    """run step of the session's step 0"""
    trains: bool = True
    """the client's head has adapters"""
    measured_steps: int = 0
    """so many steps measure the tail's importance, too"""
    most_parts: int = 1
    """that a step may have"""
    micro_steps: bool = False
    """see `TrainingConfig`"""
    step_limit_s: float = 0.0
    """how long a step may wait for its answer"""
    _due: BatchPart = field(default=BatchPart(0), init=False)
    """the part that comes next; a first one has as many to follow as it says"""
    _asked: deque[Asked] = field(default_factory=deque, init=False)
    """parts without an answer; the first of them is with the barrier"""

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """See `TailSession`."""
        if self.barrier is None:
            raise ExchangeError("wrong_kind", "Expected evaluate frames in an evaluation round, found a train frame.")
        self._expect(part)
        request = StepRequest(
            client=self.client,
            cut=self.cut,
            run_step=self.first_step + part.step,
            activations=activations,
            attention_mask=attention_mask,
            labels=labels,
            number=part.number,
            ends_batch=part.is_last or self.micro_steps,
            wants_gradient=wants_gradient(part, trains=self.trains, importance_steps=self.measured_steps),
            measured=is_measured(part, self.measured_steps),
        )
        self._asked.append(Asked(request))
        if len(self._asked) == 1:
            self._ask_next()

    def receive_part(self) -> StepReply:
        """See `TailSession`."""
        try:
            return self._asked[0].reply.result(self.step_limit_s)
        except FutureTimeoutError:
            raise ExchangeError(
                "step_timeout",
                f"Expected the tail's answer within {self.step_limit_s} s, found none. "
                "Raise step-limit-s or use smaller batches.",
            ) from None
        finally:
            self._asked.popleft()
            if self._asked:
                self._ask_next()

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailSession`."""
        self._expect(BatchPart(step))
        return self.score(self.cut, activations, attention_mask, labels)

    def close(self) -> None:
        """See `TailSession`."""
        if self.barrier is not None and (untaken := self.barrier.leave(self.client)):
            refuse([untaken])

    def _ask_next(self) -> None:
        """The barrier takes one request of a client at a time."""
        assert self.barrier is not None
        asked = self._asked[0]
        try:
            self.barrier.ask(self.client, asked, last=asked.request.ends_batch)
        except ExchangeError as error:  # the round is over: whoever waits for this part's answer hears it
            refuse([asked], error)

    def _expect(self, part: BatchPart) -> None:
        """Parts come in order, and a step has the same number of them throughout."""
        due = self._due if self._due.number else BatchPart(self._due.step, 0, part.parts)
        if part.step != due.step:
            raise ExchangeError("wrong_step", f"Expected step {due.step}, found {part.step}.")
        if part != due or not 1 <= part.parts <= self.most_parts:
            raise ExchangeError(
                "wrong_part",
                f"Expected part {due.number} of {due.parts if due.number else f'at most {self.most_parts}'} of step "
                f"{due.step}, found part {part.number} of {part.parts}. Take micro-batches from the task.",
            )
        self._due = BatchPart(part.step + 1) if part.is_last else part._replace(number=part.number + 1)
