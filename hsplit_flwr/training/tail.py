"""The shared tail: one set of blocks and adapters that all clients of a round train together.

Here are its rounds and its thread: who takes part in a step, who waits for whom, who gets which answer. The maths of a
step is `tail_step.py`.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from hsplit_flwr.common.optional_work import OptionalWork
from hsplit_flwr.common.out_of_memory import is_out_of_memory
from hsplit_flwr.common.state import State
from hsplit_flwr.errors import ConfigError, ExchangeError
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.training.activity import ActivityLog, Standing, TailActivity
from hsplit_flwr.training.barrier import BarrierLimits, StepBarrier, Turn
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.local_session import Asked, LocalSession, refuse
from hsplit_flwr.training.session import ScoreReply
from hsplit_flwr.training.step import StepReport, TrainedBatch, step_report
from hsplit_flwr.training.tail_step import TailTrainer

__all__ = ["LocalSession", "SharedTail"]
_log = logging.getLogger(__name__)
_LEAST_CLOSING_S = 30.0
"""how long the end of a round waits for the step under way, though `step_limit_s` be less"""


class SharedTail:
    """The tail in the server's process. Rounds are opened and closed; in between, sessions train or score.

    Args:
        segment: the tail's blocks.
        adapters: those in `segment`.
        config: shared by heads and tail.
        limits: waiting times of the step barrier.
        on_step: called after every step, in the tail's thread. What it raises is logged, and training goes on.
    """

    def __init__(
        self,
        segment: Segment,
        adapters: SegmentAdapters,
        config: TrainingConfig,
        limits: BarrierLimits | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        self._trainer = TailTrainer(segment, adapters, config)
        self._config = config
        self._limits = limits or BarrierLimits()
        self._on_step = on_step
        self._progress = OptionalWork("the progress callback (on_step) failed, training goes on")
        self._compute = threading.Lock()
        self._barrier: StepBarrier[Asked] | None = None
        self._worker: threading.Thread | None = None
        self._round_clients = 0
        self._activity = ActivityLog()
        self._failure: BaseException | None = None

    @property
    def segment(self) -> Segment:
        """The tail's blocks."""
        return self._trainer.segment

    @property
    def adapters(self) -> SegmentAdapters:
        """What is trained, in `segment`."""
        return self._trainer.adapters

    @property
    def device(self) -> torch.device:
        """Where the tail computes."""
        return self._trainer.device

    def train_by(self, config: TrainingConfig) -> None:
        """Train by `config` in the rounds that open from now on; its optimizer is the one of before."""
        self._config = self._trainer.config = config

    def open_training(
        self,
        clients: Iterable[str],
        concurrency: int,
        adapter_seed: int,
        keep: Collection[str] = (),
    ) -> None:
        """Start a training round: a barrier over `clients`, fresh adapters and optimizer state.

        Args:
            clients: who is expected.
            concurrency: how many of them train at a time.
            adapter_seed: of the adapters.
            keep: modules whose adapters and optimizer state stay as they are.
        """
        self.close_training()
        self._failure = None
        self._trainer.open_round(adapter_seed, keep)
        members = list(clients)
        self._round_clients = len(members)
        self._activity.fail("")
        self._barrier = StepBarrier(members, concurrency, self._limits, together=self._config.joint_steps)
        self._worker = threading.Thread(target=self._run_steps, args=(self._barrier,), name="tail-steps", daemon=True)
        self._worker.start()

    def close_training(self) -> dict[str, int]:
        """End the round: refuse further steps, wait for the one under way. Returns dropped steps per straggler.

        Raises:
            ExchangeError: ``step_timeout``, that step does not end: the adapters may still move. Call again to wait on.
        """
        if self._barrier is None or self._worker is None:
            return {}
        refuse(self._barrier.close())
        limit_s = max(self._limits.step_limit_s, _LEAST_CLOSING_S)
        self._worker.join(limit_s)
        if self._worker.is_alive():
            raise ExchangeError(
                "step_timeout",
                f"Expected the tail's last step of the round to end within {limit_s} s, found it under way. "
                "Raise step-limit-s or use smaller batches.",
            )
        dropped = self._barrier.dropped
        self._barrier = self._worker = None
        self._progress.close()
        self._trainer.close_round()
        return dropped

    @property
    def failure(self) -> BaseException | None:
        """What kept the tail itself from a step of the round, nothing being wrong with the batch; None: nothing."""
        return self._failure

    def undo_training(self) -> None:
        """See `TailTrainer.undo_round`; of the round that `close_training` ended."""
        self._trainer.undo_round()

    def replace_adapters(self, adapters: SegmentAdapters, keep: Iterable[str] = ()) -> None:
        """See `TailTrainer.replace_adapters`."""
        self._trainer.replace_adapters(adapters, keep)

    def importance(self) -> dict[str, dict[str, float]]:
        """See `TailTrainer.importance`; of the round that `close_training` ended."""
        return self._trainer.importance()

    def join(self, client: str, cut: int, first_step: int, *, trains: bool = True) -> LocalSession:
        """`client` enters the open training round with a head of `cut` blocks; its step 0 is run step `first_step`.

        A head that `trains` nothing is sent gradients only where importance is measured.
        """
        if self._barrier is None:
            raise ExchangeError("round_closed", "Expected an open training round, found none.")
        self._barrier.join(client)
        return LocalSession(
            client=client,
            cut=cut,
            first_step=first_step,
            trains=trains,
            measured_steps=self._config.importance_steps,
            most_parts=self._config.micro_batches,
            micro_steps=self._config.micro_steps,
            step_limit_s=self._limits.step_limit_s,
            barrier=self._barrier,
            score=self.score,
        )

    def activity(self) -> TailActivity:
        """What the tail has done so far and is doing; from any thread, at any time."""
        barrier = self._barrier
        return self._activity.now(barrier.standing() if barrier else Standing())

    def withdraw(self, client: str) -> None:
        """`client` failed before it joined: the start gate no longer waits for it. It may still join."""
        if barrier := self._barrier:
            barrier.withdraw(client)

    def scorer(self, client: str, cut: int) -> LocalSession:
        """A session that can only score."""
        return LocalSession(client=client, cut=cut, score=self.score)

    def score(self, cut: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailTrainer.score`; waits for the step under way."""
        with self._compute:
            return self._trainer.score(cut, activations, attention_mask, labels)

    def state(self) -> State:
        """The adapters and what the optimizer knows of them, between two steps."""
        with self._compute:
            return self._trainer.state()

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave.

        Raises:
            ConfigError: it is of other adapters or another optimizer, or a round is open.
        """
        if self._barrier is not None:
            raise ConfigError("Expected no open round, found one. Load the tail's state before the round is opened.")
        self._trainer.load_state(state)

    def _run_steps(self, barrier: StepBarrier[Asked]) -> None:
        turn: Turn[Asked] | None = None
        taken: list[tuple[TrainedBatch, bool]] = []
        self._activity.begin("waiting")
        try:
            while (turn := barrier.take()) is not None:
                self._activity.begin("computing")
                taken.append((self._train(turn), turn.ends_step))
                if turn.ends_step:
                    self._end_step([(batch, ends) for batch, ends in taken if batch.requests])
                    taken = []
                self._activity.begin("waiting")
        except BaseException as error:  # whatever ends this thread, no client may wait for it, and people must hear why
            self._activity.fail(repr(error))
            self._failure = error
            _log.error("the tail's worker ended, the round cannot go on: %r", error, exc_info=error)
            refusal = ExchangeError(
                "tail_failed", f"Expected the tail to take steps, found its worker ended by {error!r}. See its log."
            )
            refuse([*(turn.requests if turn else []), *barrier.close(refusal)], refusal)
        finally:
            self._activity.begin("idle")

    def _train(self, turn: Turn[Asked]) -> TrainedBatch:
        """Train on a turn; every client of it has its answer."""
        with self._compute:
            batch = self._trainer.train([asked.request for asked in turn.requests], ends_step=turn.ends_step)
        waiting = {asked.request.client: asked.reply for asked in turn.requests}
        for client, failure in batch.refused.items():
            if is_out_of_memory(failure):
                self._failure = failure
            waiting[client].set_exception(failure)
        for client, reply in batch.replies.items():
            waiting[client].set_result(reply)
        self._activity.count(len(batch.replies), batch.tokens, ends_step=turn.ends_step)
        return batch

    def _end_step(self, trained: list[tuple[TrainedBatch, bool]]) -> None:
        """Further passes over a step that all have had their turn in, and its report."""
        with self._compute:
            self._trainer.train_again([(batch.requests, ends) for batch, ends in trained])
        if trained and self._on_step:
            with self._progress.spared():
                self._on_step(step_report([batch for batch, _ in trained], self._round_clients))
