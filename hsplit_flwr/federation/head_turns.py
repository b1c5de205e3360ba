"""A client's round in turns, where the exchange goes over messages: each may find another process than the last one.

Between two turns the client's own disk holds where it is (`federation/kept_round.py`). In a turn, the head is made
again, the forward pass of the step that the tail has answered is computed again, bit for bit, and its backward pass and
optimizer step follow; then the next step's activations go out. Slow, and exact all the same.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from typing import TypeVar

import torch

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.exchange.turns import Said, Suspended, Turn, TurnStream, digest
from hsplit_flwr.federation.kept_round import KeptRound, RoundFolder, RoundStore
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.head import HeadTraining
from hsplit_flwr.training.loss import tensors_of
from hsplit_flwr.training.session import ScoreReply

Result = TypeVar("Result")


def take_turn(
    store: RoundStore, task: RoundTask, turn: Turn, work: Callable[["RoundInTurns"], Result]
) -> Result | Said:
    """What `work` makes of `task` in `turn`: its result at the end of the round, until then what is said to the tail.

    Args:
        store: where the client keeps its round.
        task: of the client.
        turn: what the tail says.
        work: on the whole round; it is suspended where it would have to wait for the tail.

    Raises:
        ConfigError: the round cannot be kept.
        ExchangeError: ``lost_round``: what was kept is not there, or is of another turn; or raised by `work`.
    """
    played = RoundInTurns(store, task, turn)
    if turn.more:
        played.hear_part()
        return Said(turn.number, ())
    try:
        result = work(played)
    except Suspended:
        pass
    else:
        played.keep()
        return result
    played.keep()
    return Said(turn.number, played.stream.said)


class RoundInTurns:
    """A client's round as far as one turn gets it.

    Args:
        store: where it is kept.
        task: of the client.
        turn: what the tail says.

    Raises:
        ConfigError, ExchangeError: see `take_turn`.
    """

    def __init__(self, store: RoundStore, task: RoundTask, turn: Turn) -> None:
        self._store = store
        self._task = task
        self._turn = turn
        self._kept = KeptRound.begun(task, time.time()) if turn.number == 1 else self._recalled()
        self._is_repeated = self._kept.turn == turn.number
        """the message was sent again: its answer was lost on the way, or with the process that was to give it"""
        self._training: HeadTraining | None = None
        self._scores = dict(self._kept.work)
        self.version = self._kept.version
        """of the weight delta that the head has; None: it is still to be fetched"""
        self.load_s = 0.0
        """of making the head in this turn"""
        self.stream = self._stream()

    def connect(self, address: str, token: str, time_limit_s: float, max_receive_bytes: int) -> TurnStream:
        """The stream of this turn; a `Connect`."""
        return self.stream

    def expect_version(self, version: int | None) -> None:
        """Check what the client's copy of the weight delta is at.

        Raises:
            ExchangeError: ``lost_round``.
        """
        if version != self.version:
            raise _lost(f"the weight delta at version {self.version}", f"version {version}")

    def fetched(self, version: int | None) -> None:
        """Note that the client's copy of the weight delta is at `version`: from now on, this turn goes on there."""
        if self.version != version:
            self.version = version
            self.keep()

    def begin(self, training: HeadTraining) -> None:
        """Let `training` go on where the last turn ended; what becomes of it is kept."""
        if self._kept.work:
            training.load_state(self._kept.work)
        self._training = training

    def seconds(self, compute_s: float) -> dict[str, float]:
        """Phase -> seconds of the whole round, of which `compute_s` were computing."""
        load_s = self._kept.load_s + self.load_s
        waited_s = max(0.0, time.time() - self._kept.began - load_s - compute_s)
        return {"load": load_s, "compute": compute_s, "exchange": waited_s}

    def score(self, head: Segment, batches: Iterable[Batch], tail: RemoteTail) -> ScoreReply:
        """As `score_head`; as many batches as a message takes go out in a turn."""
        scores = self._scores = self._scores or {"asked": 0, "answered": 0, "nll": 0.0, "tokens": 0}
        if self._is_repeated:  # what was asked was not heard
            scores["asked"] = scores["answered"]
        for step in range(scores["answered"], scores["asked"]):
            tail.await_score(step)
        self._hear_scores(tail)
        with torch.no_grad():
            for step, batch in enumerate(batches):
                if step < scores["asked"]:
                    continue
                input_ids, mask, labels = tensors_of(batch, head)
                tail.send_to_score(step, head(input_ids, mask), mask, labels)
                scores["asked"] += 1
                if not self.stream.has_room:
                    self._hear_scores(tail)
        self._hear_scores(tail)
        return ScoreReply(scores["nll"], scores["tokens"])

    def hear_part(self) -> None:
        """Keep what the tail says for when it has said all."""
        with self._opened() as folder:
            folder.hear(self._turn.number, self._turn.frames)
            folder.save(replace(self._kept, turn=self._turn.number))

    def keep(self) -> None:
        """Keep where the round is at the end of this turn."""
        kept = replace(
            self._kept,
            turn=self._turn.number,
            said=[digest(frame) for frame in self.stream.said],
            version=self.version,
            load_s=self._kept.load_s + self.load_s,
            work=self._training.state() if self._training else self._scores,
        )
        with self._opened() as folder:
            folder.save(kept)
            folder.forget_heard()

    def _recalled(self) -> KeptRound:
        with self._opened() as folder:
            kept = folder.load()
        expected = KeptRound.begun(self._task, 0.0).token
        if kept is None or kept.token != expected or self._turn.number - kept.turn not in (0, 1):
            found = f"one after turn {kept.turn}" if kept and kept.token == expected else "none of this round"
            raise _lost(f"a kept round before turn {self._turn.number}", found)
        return kept

    def _stream(self) -> TurnStream:
        if self._turn.number == 1 or self._turn.more or self._is_repeated:
            return TurnStream(())
        # What was sent to be scored need not be computed again; a hello and a step are.
        scored = self._task.mode == "evaluate" and self.version is not None
        return TurnStream(chain(self._heard(), self._turn.frames), () if scored else self._kept.said)

    def _heard(self) -> Iterator[bytes]:
        with self._opened() as folder:
            return folder.heard()

    def _hear_scores(self, tail: RemoteTail) -> None:
        scores = self._scores
        while scores["answered"] < scores["asked"]:
            reply = tail.receive_score()
            scores |= {
                "answered": scores["answered"] + 1,
                "nll": scores["nll"] + reply.nll,
                "tokens": scores["tokens"] + reply.tokens,
            }

    def _opened(self) -> AbstractContextManager[RoundFolder]:
        return self._store.open_round(self._task.run, self._task.client)


def _lost(expected: str, found: str) -> ExchangeError:
    return ExchangeError(
        "lost_round",
        f"Expected {expected} in this client's state-dir, found {found}. All of a client's processes need the same "
        'state-dir, which nobody else writes to, with exchange = "messages".',
    )
