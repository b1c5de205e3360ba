"""Which architectures can be split? transformers' own list of decoders, each tried from cut to export.

    python simulations/benchmarks/models.py --json simulations/evidence/models.json --table docs/models.md

One row for each model type of ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES``: a tiny model with random weights (`_tiny_configs`)
in a process of its own, with a time limit, against transformers and PEFT in one piece (`_model_row`):

* cut: logits and losses of head and tail at every cut; rows full, padded on the right, padded on the left
* gradients: those of all adapters at every cut, while importance is measured
* folder: head and tail each read their own tensors from a folder of ``save_pretrained``
* plan: the cost model runs, and its matrices are those that a run adapts
* export: the merged model and the PEFT adapter, read by transformers and PEFT

``silent_differences`` (wrong numbers without a word) and ``raw_errors`` (anything but a refusal that names the reason)
must be 0. ``works`` counts rows where every cell works. What transformers itself does not run on tokens alone has to be
refused, too; a row is ``not_run`` only if it is not.

Some rows again, the others as they stand in an earlier file; each row keeps the commit that it was made at:

    python simulations/benchmarks/models.py --json OUT --onto simulations/evidence/models.json --models gemma3n blt
"""

import argparse
import gc
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import peft  # noqa: F401  (before the processes start, which then need not import it)
import torch
import transformers
from _model_row import COLUMNS, DIFFERS, FAILED, REFUSED, WORKS, model_row
from _models_table import document
from _provenance import provenance
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SEED = 0
LIMIT_S = 180.0
POLL_S = 0.05
ORIGIN = ("commit", "command", "run_again", "before")
"""what tells how figures that are kept were made"""


@dataclass(frozen=True)
class _Trial:
    """A row that is being made in a process of its own."""

    model_type: str
    process: Any
    answers: Any
    started: float

    @classmethod
    def start(cls, model_type: str) -> "_Trial":
        """Fork, so that libraries are imported once."""
        context = multiprocessing.get_context("fork")
        answers: Any = context.Queue()
        process = context.Process(target=lambda: answers.put(model_row(model_type)), daemon=True)
        process.start()
        return cls(model_type, process, answers, time.monotonic())

    def row(self, limit_s: float) -> dict[str, Any] | None:
        """What came of it, None as long as nothing did; what it breaks ends no other."""
        ended = not self.process.is_alive()
        try:
            row: dict[str, Any] = self.answers.get(timeout=POLL_S)
        except Empty:
            if not ended and time.monotonic() < self.started + limit_s:
                return None
            failure = {"status": FAILED, "detail": f"no answer within {limit_s:g} s, or the process ended"}
            row = {"model_type": self.model_type, "not_run": None, "cells": dict.fromkeys(COLUMNS, failure)}
        self.process.join(timeout=5.0)
        self.process.kill()
        self.process.join()
        return row


def run(model_types: Sequence[str], limit_s: float, workers: int) -> list[dict[str, Any]]:
    """The rows, in the order of `model_types`; `workers` of them are made at a time."""
    waiting, trials, rows = list(model_types), list[_Trial](), dict[str, dict[str, Any]]()
    gc.freeze()  # the forked processes need not touch, and so copy, what is here already
    while waiting or trials:
        while waiting and len(trials) < workers:
            trials.append(_Trial.start(waiting.pop(0)))
        for trial in list(trials):
            if (row := trial.row(limit_s)) is not None:
                trials.remove(trial)
                rows[trial.model_type] = row
                print(_line(row), flush=True)
    return [rows[model_type] for model_type in model_types]


def _line(row: dict[str, Any]) -> str:
    cells = " ".join(f"{name}={cell['status']}" for name, cell in row["cells"].items())
    return f"{row['model_type']:28} {cells or 'not run: ' + row['not_run']}"


def beside(rows: Sequence[dict[str, Any]], earlier: dict[str, Any], origin: dict[str, Any]) -> list[dict[str, Any]]:
    """These rows and those of an `earlier` file that were not made again, in transformers' order."""
    if earlier["versions"] != origin["versions"]:
        raise SystemExit(f"Expected rows made with {origin['versions']}, found {earlier['versions']}. Make all again.")
    kept = [{"commit": earlier["commit"], **row} for row in earlier["rows"]]
    by_type = {row["model_type"]: row for row in [*kept, *rows]}
    return [by_type[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in by_type]


def figures_of(rows: Sequence[dict[str, Any]], origin: dict[str, Any]) -> dict[str, Any]:
    """The rows and what they come to."""
    statuses = [{cell["status"] for cell in row["cells"].values()} for row in rows]
    return {
        "silent_differences": sum(DIFFERS in found for found in statuses),
        "raw_errors": sum(FAILED in found for found in statuses),
        "works": sum(found == {WORKS} for found in statuses),
        "refused": sum(found == {REFUSED} for found in statuses),
        "partly_refused": sum(found == {WORKS, REFUSED} for found in statuses),
        "not_run": sum(not found for found in statuses),
        "rows": rows,
        **origin,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--table", type=Path, help="where the document with the table goes")
    parser.add_argument("--models", nargs="+", metavar="TYPE", help="model types (default: all)")
    parser.add_argument("--onto", type=Path, help="figures of an earlier run, whose other rows are kept")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for one row")
    parser.add_argument("--workers", type=int, default=1, help="rows at a time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    origin = provenance(SEED)  # of the code that runs, not of what is checked out when it ends
    model_types = arguments.models or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = [{**row, "commit": origin["commit"]} for row in run(model_types, arguments.limit, arguments.workers)]
    if arguments.onto:
        earlier = json.loads(arguments.onto.read_text(encoding="utf-8"))
        rows = beside(rows, earlier, origin)
        origin |= {"before": {key: earlier[key] for key in ORIGIN if key in earlier}}
    figures = figures_of(rows, origin)
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.table:
        arguments.table.write_text(document(figures), encoding="utf-8")
    print({key: value for key, value in figures.items() if isinstance(value, int)})


if __name__ == "__main__":
    main()
