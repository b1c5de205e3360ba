"""Does error feedback help a lossy wire? What an encoding lacked is added before the next one is made.

Trained as in `simulations/evidence/results.toml` (embedded model, heterogeneous devices, non-IID, 5 rounds of 8 steps),
with what each codec makes of activations and gradients. Feedback is of what was last sent at the same place of a batch
(*place*: another row's error), or of the same row's last encoding (*row*). That needs rows that come again, which few
do in 40 steps; so it is tried on 32 rows of each client, which come five times. Always in both directions.

    python simulations/benchmarks/error_feedback.py --json OUT
"""

import argparse
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _provenance import provenance
from torch import Tensor

from hsplit_flwr.common.tables import format_table
from hsplit_flwr.data.row_batches import BatchOrder, RowBatches
from hsplit_flwr.exchange.codecs import CODECS, Codec
from hsplit_flwr.exchange.positions import gathered, scattered, traveling
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.experiments.local_rounds import LocalDoor
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.experiments.split_model import SplitTrainer
from hsplit_flwr.experiments.task import Task, spread
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession
from hsplit_flwr.training.tail import SharedTail

SPEC = RunSpec(
    "hsplitlora_fp32", "heterogeneous", "dirichlet", 0, 0.01, local_steps=8, warmup_steps=5, eval_examples=100
)
SEEDS = (0, 1, 2)
ROWS = {"all rows": 0, "32 rows": 32}
"""of each client; 0: all"""
FEEDBACK = {"all rows": ("none", "place"), "32 rows": ("none", "row")}
Errors = dict[tuple[Any, ...], Tensor]
"""what an encoding lacked (n, H), by what it was of"""


class Lossy:
    """One direction of a client's wire: `codec`, with feedback of `kind`."""

    def __init__(self, codec: Codec, kind: str) -> None:
        self._codec = codec
        self._kind = kind
        self._errors: Errors = {}

    def sent(self, values: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """What arrives of (B, T, H) `values`."""
        positions = traveling(mask, labels)
        found = gathered(values.detach().float(), positions)
        keys = [self._key(*row) for row in zip(range(len(labels)), labels, positions, strict=True)]
        counts = positions.sum(1).tolist()
        if self._kind != "none":
            errors = [self._errors.get(key) for key in keys]
            found = found + torch.cat(
                [_fitting(error, (n, found.shape[1])) for error, n in zip(errors, counts, strict=True)]
            )
        arrived = self._codec.decode("x", self._codec.encode("x", found), tuple(found.shape)).float()
        for key, error in zip(keys, torch.split(found - arrived, counts), strict=True):
            self._errors[key] = error
        return scattered(arrived, positions)

    def _key(self, number: int, labels: Tensor, positions: Tensor) -> tuple[Any, ...]:
        """What feedback is by: a row is known by its targets and where they stand."""
        return (number,) if self._kind == "place" else tuple(labels[: 1 + int(positions.sum())].tolist())


def _fitting(error: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """`error` cut or filled up with zeros to `shape` (n, H)."""
    fitting = torch.zeros(shape)
    if error is not None:
        common = min(len(error), shape[0])
        fitting[:common] = error[:common]
    return fitting


class LossySession(TailSession):
    """`session` behind a lossy wire."""

    def __init__(self, session: TailSession, up: Lossy, down: Lossy) -> None:
        self._session, self._up, self._down = session, up, down
        self._unanswered: deque[tuple[Tensor, Tensor]] = deque()

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """See `TailSession`."""
        self._session.send_part(part, self._up.sent(activations, attention_mask, labels), attention_mask, labels)
        self._unanswered.append((attention_mask, labels))

    def receive_part(self) -> StepReply:
        """See `TailSession`."""
        reply = self._session.receive_part()
        of = self._unanswered.popleft()
        return reply if reply.gradient is None else reply._replace(gradient=self._down.sent(reply.gradient, *of))

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailSession`."""
        return self._session.score_step(step, activations, attention_mask, labels)

    def close(self) -> None:
        """See `TailSession`."""
        self._session.close()


class LossyDoor(LocalDoor):
    """A door whose sessions are lossy; what a client's encodings lacked is kept from round to round."""

    def __init__(self, tail: SharedTail, task: Task, codec: str, feedback: str) -> None:
        super().__init__(tail, task.training, task.costs.workload)
        self._ways = {client: [Lossy(CODECS[codec], feedback) for _ in range(2)] for client in task.devices}

    def enter(self, task: RoundTask) -> TailSession:
        """See `LocalDoor`."""
        return LossySession(super().enter(task), *self._ways[task.client])


class LossyTrainer(SplitTrainer):
    """HSplitLoRA behind `LossyDoor`."""

    def __init__(self, task: Task, codec: str, feedback: str) -> None:
        self._wire = codec, feedback
        super().__init__(task, METHODS[task.spec.method])

    def _open_door(self, tail: SharedTail, *_: object) -> LocalDoor:
        self._door = LossyDoor(tail, self._task, *self._wire)
        return self._door


def task_of(seed: int, rows: int) -> Task:
    """The surroundings, with `rows` of each client's alone."""
    task = Task.of(replace(SPEC, seed=seed))
    if not rows:
        return task
    streams: dict[str, Callable[[int], Iterator[Batch]]] = {}
    for client, stream in task.streams.items():
        data = stream.__self__  # type: ignore[attr-defined]
        streams[client] = RowBatches(spread(data.rows, rows), BatchOrder(SPEC.batch_size, seed), pad_id=0).stream
    return replace(task, streams=streams)


def measure(seed: int, rows: str, codec: str, feedback: str) -> dict[str, Any]:
    """One run."""
    task = task_of(seed, ROWS[rows])
    trainer = LossyTrainer(task, codec, feedback)
    for number in range(1, SPEC.rounds + 1):
        trainer.round(number, task.setting.present(seed, number))
    row = {"rows": rows, "codec": codec, "feedback": feedback, "seed": seed, "perplexity": trainer.score().perplexity}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure all, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [
        (rows, codec, feedback)
        for rows, tried in FEEDBACK.items()
        for codec, feedback in [("fp32", "none"), *itertools.product(("int4", "int8"), tried)]
    ]
    found = [measure(seed, *run) for seed in SEEDS for run in runs]
    options.json.write_text(json.dumps({"rows": found, **provenance(SEEDS[0])}, indent=1) + "\n")
    cells = []
    for run in runs:
        of = [r["perplexity"] for r in found if (r["rows"], r["codec"], r["feedback"]) == run]
        cells.append([*run, f"{fmean(of):.3f} ({min(of):.3f} - {max(of):.3f})"])
    print(format_table(["rows", "codec", "feedback", "perplexity"], cells, False))


if __name__ == "__main__":
    main()
