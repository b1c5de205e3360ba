"""What the planner takes for progress (`planning/solver/pace.py`), fitted to stored runs, and how far it is off.

    python simulations/benchmarks/pace.py --json OUT

Runs of `simulations/evidence`: the embedded model, one cut and one rank for all. `pace.csv` (five clients, 40 steps),
`pace_short.csv` (24 steps) and `pace_twenty.csv` (twenty clients) are scored on the validation half, and their seeds
are no table's:

    python -m hsplit_flwr.experiments run simulations/evidence/pace.toml --store simulations/evidence/pace.csv

Where those three are not there, the runs that came before them: `cuts.csv`, `ranks.csv` from rank 4 on, and
HSplitLoRA's own plans of one block at rank 16 after 24 and 40 steps (`tiny.csv`, `three_rounds.csv`), all scored on the
test half.
Least squares of log perplexity = a - b log(pace x steps) over a, b and the two exponents.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _provenance import provenance
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hsplit_flwr.common.tables import format_table
from hsplit_flwr.experiments.evidence.store import Store
from hsplit_flwr.experiments.evidence.stored_runs import StoredRuns
from hsplit_flwr.planning.solver.objective import gain

EVIDENCE = Path(__file__).parents[1] / "evidence"
VALIDATED = ("pace", "pace_short", "pace_twenty")
"""stores of runs on the validation half"""
BEFORE = ("cuts", "ranks", "tiny", "three_rounds")
"""stores of runs on the test half"""
BLOCKS, LARGEST_RANK, LEAST_RANK = 8, 16, 4
START = (2.0, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class Point:
    """A run."""

    cut: int
    rank: int
    steps: int
    clients: int
    loss: float
    """log of its final perplexity"""


def stores(folder: Path = EVIDENCE) -> tuple[str, ...]:
    """Those that are fitted to: on the validation half as soon as all of them are there."""
    return VALIDATED if all((folder / f"{name}.csv").exists() for name in VALIDATED) else BEFORE


def points(folder: Path = EVIDENCE) -> Iterator[Point]:
    """All that are fitted to."""
    for name in stores(folder):
        for run in StoredRuns.of(Store(folder / f"{name}.csv").rows()).runs:
            spec = run.spec
            cut, rank = (spec.cut, spec.rank) if spec.rank else (1, LARGEST_RANK)
            planned = spec.method == "hsplitlora" and spec.setting in ("homogeneous", "heterogeneous")
            if (spec.rank or planned) and rank >= LEAST_RANK:
                steps, clients = spec.rounds * spec.local_steps, run.evaluations[-1].clients
                yield Point(cut, rank, steps, clients, math.log(run.final_perplexity))


def pace(point: Point, tail_steps: float, rank_worth: float) -> float:
    """As `planning.solver.pace`, for equal heads and importance."""
    worth: float = (gain(point.rank) / gain(LARGEST_RANK)) ** rank_worth
    steps: float = point.clients**tail_steps
    return worth * (point.cut + (BLOCKS - point.cut) * steps) / BLOCKS


def fit(found: list[Point]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(4,) a, b and the exponents; (runs,) what is predicted above what was found, in log perplexity."""

    def off(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b, *exponents = parameters
        return np.array([a - b * math.log(pace(p, *exponents) * p.steps) - p.loss for p in found])

    answer = least_squares(off, START)
    return answer.x, off(answer.x)


def main() -> None:
    """Fit, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found = list(points())
    (a, b, tail_steps, rank_worth), off = fit(found)
    by_kind: dict[tuple[int, int, int, int], list[float]] = defaultdict(list)
    for point, error in zip(found, off, strict=True):
        by_kind[point.clients, point.cut, point.rank, point.steps].append(100 * error)
    rows = [
        [*map(str, kind), f"{min(errors):+.1f} to {max(errors):+.1f}", str(len(errors))]
        for kind, errors in sorted(by_kind.items())
    ]
    print(format_table(["clients", "cut", "rank", "steps", "predicted above found, %", "runs"], rows, False))
    figures: dict[str, Any] = {
        "intercept": a,
        "loss_per_step": b,
        "tail_steps": tail_steps,
        "rank_worth": rank_worth,
        "rms": float(np.sqrt((off**2).mean())),
        "worst": float(abs(off).max()),
        "runs": len(found),
        "stores": ", ".join(stores()),
    }
    print(", ".join(f"{name} {value if isinstance(value, str) else f'{value:.3g}'}" for name, value in figures.items()))
    options.json.write_text(json.dumps({**figures, **provenance(0)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
