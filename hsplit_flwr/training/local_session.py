"""A client's use of a tail in the same process: it asks the barrier for a place in a step, and waits for the answer."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.training.barrier import StepBarrier
from hsplit_flwr.training.session import ScoreReply, StepReply
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
class LocalSession:
    """A `TailSession` in the tail's own process; see `SharedTail.join` and `SharedTail.scorer`."""

    client: str
    cut: int
    score: Callable[[int, Tensor, Tensor, Tensor], ScoreReply]
    barrier: StepBarrier[Asked] | None = None
    """of the training round; None: this session can only score"""
    first_step: int = 0
    """run step of the session's step 0"""
    measured_steps: int = 0
    """so many steps measure the tail's importance, too"""
    step_limit_s: float = 0.0
    """how long a step may wait for its answer"""
    _next_step: int = field(default=0, init=False)

    def train_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> StepReply:
        """See `TailSession`."""
        if self.barrier is None:
            raise ExchangeError("wrong_kind", "Expected evaluate frames in an evaluation round, found a train frame.")
        self._expect_step(step)
        request = StepRequest(
            client=self.client,
            cut=self.cut,
            run_step=self.first_step + step,
            activations=activations,
            attention_mask=attention_mask,
            labels=labels,
            measured=step < self.measured_steps,
        )
        asked = Asked(request)
        self.barrier.ask(self.client, asked)
        try:
            return asked.reply.result(self.step_limit_s)
        except FutureTimeoutError:
            raise ExchangeError(
                "step_timeout",
                f"Expected the tail's answer within {self.step_limit_s} s, found none. "
                "Raise step_limit_s or use smaller batches.",
            ) from None

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailSession`."""
        self._expect_step(step)
        return self.score(self.cut, activations, attention_mask, labels)

    def close(self) -> None:
        """See `TailSession`."""
        if self.barrier is not None and (untaken := self.barrier.leave(self.client)):
            refuse([untaken])

    def _expect_step(self, step: int) -> None:
        if step != self._next_step:
            raise ExchangeError("wrong_step", f"Expected step {self._next_step}, found {step}.")
        self._next_step += 1
