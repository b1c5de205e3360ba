"""What the planner takes for progress (`planning/solver/pace.py`), fitted to stored runs, and how far it is off.

    python simulations/benchmarks/pace.py --json OUT

Runs of `simulations/evidence`: the embedded model, one cut and one rank for all. `pace.csv` (five clients, 40 steps),
`pace_short.csv` (24 steps) and `pace_twenty.csv` (twenty clients) are scored on the validation half, and their seeds
are no table's:

    python -m hsplit_flwr.experiments run simulations/evidence/pace.toml --store simulations/evidence/pace.csv

Least squares of log perplexity = floor + (scale x pace x steps)^-power over these three and the two exponents of pace.
Without the floor, as a straight line over the logarithm of the steps, the fit is off by twice as much.
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
STORES = ("pace", "pace_short", "pace_twenty")
BLOCKS, LARGEST_RANK = 8, 16
START = (0.7, 0.1, 0.8, 0.5, 0.5)


@dataclass(frozen=True)
class Point:
    """A run."""

    cut: int
    rank: int
    steps: int
    clients: int
    loss: float
    """log of its final perplexity"""


def points(folder: Path = EVIDENCE) -> Iterator[Point]:
    """All that are fitted to."""
    for name in STORES:
        for run in StoredRuns.of(Store(folder / f"{name}.csv").rows()).runs:
            spec = run.spec
            steps, clients = spec.rounds * spec.local_steps, run.evaluations[-1].clients
            yield Point(spec.cut, spec.rank, steps, clients, math.log(run.final_perplexity))


def pace(point: Point, tail_steps: float, rank_worth: float) -> float:
    """As `planning.solver.pace`, for equal heads and importance."""
    worth: float = (gain(point.rank) / gain(LARGEST_RANK)) ** rank_worth
    steps: float = point.clients**tail_steps
    return worth * (point.cut + (BLOCKS - point.cut) * steps) / BLOCKS


def fit(found: list[Point]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(5,) floor, scale, power and the exponents; (runs,) predicted above what was found, in log perplexity."""

    def off(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([loss(point, *parameters) - point.loss for point in found])

    positive = ([0.0, 1e-6, 0.0, 0.0, 0.0], np.inf)
    answer = least_squares(off, START, bounds=positive, x_scale=START)
    return answer.x, off(answer.x)


def loss(point: Point, floor: float, scale: float, power: float, tail_steps: float, rank_worth: float) -> float:
    """Log perplexity that is predicted."""
    learnt = scale * pace(point, tail_steps, rank_worth) * point.steps
    above: float = learnt**-power
    return floor + above


def main() -> None:
    """Fit, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found = list(points())
    (floor, scale, power, tail_steps, rank_worth), off = fit(found)
    by_kind: dict[tuple[int, int, int, int], list[float]] = defaultdict(list)
    for point, error in zip(found, off, strict=True):
        by_kind[point.clients, point.cut, point.rank, point.steps].append(100 * error)
    rows = [
        [*map(str, kind), f"{min(errors):+.1f} to {max(errors):+.1f}", str(len(errors))]
        for kind, errors in sorted(by_kind.items())
    ]
    print(format_table(["clients", "cut", "rank", "steps", "predicted above found, %", "runs"], rows, False))
    figures: dict[str, Any] = {
        "floor": floor,
        "scale": scale,
        "power": power,
        "tail_steps": tail_steps,
        "rank_worth": rank_worth,
        "rms": float(np.sqrt((off**2).mean())),
        "worst": float(abs(off).max()),
        "runs": len(found),
        "stores": ", ".join(STORES),
    }
    print(", ".join(f"{name} {value if isinstance(value, str) else f'{value:.3g}'}" for name, value in figures.items()))
    options.json.write_text(json.dumps({**figures, **provenance(0)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
