"""What measuring weight importance adds to a round of split training: seconds, and bytes while it lasts.

    python simulations/benchmarks/importance.py --json OUT

Forward and backward pass of a head, and of the tail for that client, with and without importance, alternated pass by
pass in one process, so that other work on the machine meets both alike. Optimizer and transfer, which importance leaves
as they are, are left out: in a real round the shares are smaller. Columns:

* ``head_ms``, ``tail_ms``: a pass without importance, median
* ``head_extra_ms``, ``tail_extra_ms``: what importance adds to it, median of the differences of neighbours
* ``round_extra``: what 1 or 8 such steps add to a round of 20, relative to the round without (target: 1 step < 0.03)
* ``*_peak_extra_bytes``: how much higher the tensors of one pass peak with importance
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _models import MODELS
from _peak_bytes import peak_bytes
from _provenance import provenance
from torch import Tensor

from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import Segment, block_of, load_segment
from hsplit_flwr.training.importance import ImportanceProbe, SampledRows
from hsplit_flwr.training.loss import token_losses

SEED = 0
ROUND_STEPS = 20
IMPORTANCE_STEPS = (1, 8)
"""TrainingConfig's default, and what a profile with less noise would take"""
IMPORTANCE_ROWS = 2
BATCH, LENGTH, RANK = 8, 64, 8
WARM_UPS = 2
CUTS = {"tiny-gpt2": 4, "smollm2-135m": 8}
REPEATS = {"tiny-gpt2": 10, "smollm2-135m": 1}
"""times what was asked for: short passes scatter more"""


class SplitModel:
    """A head and the whole model of its tail, each with adapters on every linear layer that it trains."""

    def __init__(self, model: str, rows: int) -> None:
        files = ModelFiles.resolve(MODELS[model]())
        self.cut = CUTS[model]
        self._rows = rows
        self._head = load_segment(files, 0, self.cut)
        self._whole = load_segment(files)
        lora = LoraSpec(RANK, 2.0 * RANK)
        names = [name for name in self._whole.linear_modules() if block_of(name) >= self.cut]
        for adapters in (SegmentAdapters(self._head, lora), SegmentAdapters(self._whole, lora, names)):
            adapters.reset(SEED)
        self._batch = random_batch(self._head.vocab_size)

    def head(self, measured: bool) -> None:
        """The head's forward and backward pass."""
        with self._probe(self._head, measured, entry=0) as probe:
            hidden = self._head(self._batch["input_ids"], self._batch["attention_mask"])
            hidden.backward(torch.ones_like(hidden))
        probe.values()

    def tail(self, measured: bool) -> None:
        """The tail's forward and backward pass."""
        hidden = torch.zeros(BATCH, LENGTH, self._whole.hidden_size, requires_grad=True)
        with self._probe(self._whole, measured, self.cut) as probe:
            logits = self._whole(hidden, self._batch["attention_mask"], entry=self.cut)
            token_losses(logits, self._batch["labels"]).mean().backward()  # type: ignore[no-untyped-call]
        probe.values()

    def _probe(self, segment: Segment, measured: bool, entry: int) -> ImportanceProbe:
        samples = [SampledRows(0, self._rows or BATCH, 1.0)] if measured else []
        return ImportanceProbe(segment, samples, (BATCH, LENGTH), entry)


def random_batch(vocab_size: int) -> dict[str, Tensor]:
    """Random tokens, no padding, loss everywhere: time and bytes do not depend on the text."""
    ids = torch.randint(0, vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(SEED))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def peak_extra(run: Callable[[bool], None]) -> tuple[int, int]:
    """(peak bytes without importance, how much more with it)."""
    without = peak_bytes(partial(run, False))
    return without, peak_bytes(partial(run, True)) - without


def pass_seconds(run: Callable[[bool], None], repeats: int) -> tuple[float, float]:
    """(median seconds of a pass without importance, median of what importance adds)."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(-WARM_UPS, repeats):
        for measured in (False, True) if number % 2 else (True, False):
            started = time.perf_counter()
            run(measured)
            if number >= 0:
                seconds[measured].append(time.perf_counter() - started)
    extra = statistics.median(on - off for on, off in zip(seconds[True], seconds[False], strict=True))
    return statistics.median(seconds[False]), extra


def measure(model: str, rows: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    split = SplitModel(model, rows)
    row: dict[str, Any] = {"model": model, "cut": split.cut, "rows": rows, "repeats": repeats}
    seconds, extra = 0.0, 0.0
    for side, run in {"head": split.head, "tail": split.tail}.items():
        side_seconds, side_extra = pass_seconds(run, repeats)
        row[f"{side}_ms"], row[f"{side}_extra_ms"] = 1000 * side_seconds, 1000 * side_extra
        row[f"{side}_peak_bytes"], row[f"{side}_peak_extra_bytes"] = peak_extra(run)
        seconds, extra = seconds + side_seconds, extra + side_extra
    row["round_extra"] = {steps: steps * extra / (ROUND_STEPS * seconds) for steps in IMPORTANCE_STEPS}
    return row


def table_line(row: dict[str, Any]) -> str:
    """One row for people."""
    shares = "".join(f"{100 * row['round_extra'][steps]:>11.2f} %" for steps in IMPORTANCE_STEPS)
    peaks = "".join(f"{row[f'{side}_peak_extra_bytes'] / 2**20:>13.2f} MiB" for side in ("head", "tail"))
    return (
        f"{row['model']:14}{row['cut']:>4}{row['rows']:>5}{row['head_ms']:>9.1f}{row['head_extra_ms']:>8.1f}"
        f"{row['tail_ms']:>9.1f}{row['tail_extra_ms']:>8.1f}{shares}{peaks}"
    )


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--models", default="tiny-gpt2,smollm2-135m")
    parser.add_argument("--rows", type=int, default=IMPORTANCE_ROWS, help="rows of 8 that are measured; 0: all")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of passes per side; tenfold for the tiny model")
    arguments = parser.parse_args()
    rows = []
    shares = "".join(f"{f'{steps} of {ROUND_STEPS}':>13}" for steps in IMPORTANCE_STEPS)
    print(f"{'model':14}{'cut':>4}{'rows':>5}{'head ms':>9}{'extra':>8}{'tail ms':>9}{'extra':>8}{shares}"
          f"{'head peak +':>17}{'tail peak +':>17}")  # fmt: skip
    for model in arguments.models.split(","):
        rows.append(measure(model, arguments.rows, REPEATS[model] * arguments.repeats))
        print(table_line(rows[-1]), flush=True)
    result = {
        "rows": rows,
        "worst_round_extra": max(row["round_extra"][IMPORTANCE_STEPS[0]] for row in rows),
        **provenance(SEED),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
