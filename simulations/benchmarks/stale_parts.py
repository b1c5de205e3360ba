"""Why all parts of a client's batch have their turn at the tail in one go: what training is worth if they do not.

Trained as in `simulations/evidence/results.toml` (embedded model, heterogeneous devices, non-IID, 5 rounds of 8 steps,
an fp32 wire) with batches in four parts. *in one go* is the library's order. *in between* lets the tail take one part
of every client after another, as they would come in: then most of the gradients that a client's optimizer step is taken
on are from before the others' steps.

    python simulations/benchmarks/stale_parts.py --json OUT
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from _provenance import provenance

from hsplit_flwr.common.tables import format_table
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.experiments.split_model import SplitTrainer
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.training import tail
from hsplit_flwr.training.barrier import Request, StepBarrier

SPEC = RunSpec(
    "hsplitlora_fp32", "heterogeneous", "dirichlet", 0, 0.01, local_steps=8, warmup_steps=5, eval_examples=100
)
METHOD = replace(METHODS[SPEC.method], micro_batches=4, in_flight=3)
SEEDS = (0, 1, 2)
ORDERS = ("in one go", "in between")


class PartByPart(StepBarrier[Request]):
    """A barrier that takes every part for a batch of its own: the next turn is another client's."""

    def ask(self, client: str, request: Request, *, last: bool = True) -> None:
        """See `StepBarrier`."""
        super().ask(client, request, last=True)


@contextmanager
def taken(order: str) -> Iterator[None]:
    """Tails take turns in that order."""
    with patch.object(tail, "StepBarrier", StepBarrier if order == "in one go" else PartByPart):
        yield


def measure(seed: int, order: str) -> dict[str, Any]:
    """One run."""
    task = Task.of(replace(SPEC, seed=seed), METHOD)
    with taken(order):
        trainer = SplitTrainer(task, METHOD)
        for number in range(1, SPEC.rounds + 1):
            trainer.round(number, task.setting.present(seed, number))
    row = {"parts": order, "seed": seed, "perplexity": trainer.score().perplexity}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure all, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(seed, order) for seed in SEEDS for order in ORDERS]
    options.json.write_text(json.dumps({"rows": found, **provenance(SEEDS[0])}, indent=1) + "\n")
    by_order = {order: [row["perplexity"] for row in found if row["parts"] == order] for order in ORDERS}
    cells = [[order, f"{fmean(of):.3f} ({min(of):.3f} - {max(of):.3f})"] for order, of in by_order.items()]
    print(format_table(["parts", "perplexity"], cells, False))


if __name__ == "__main__":
    main()
