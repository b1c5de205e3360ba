"""The planner: how far its plans are from the optimum, and how long it takes for many clients.

    python simulations/benchmarks/planner.py --json planner.json [--instances 400]

*Gap*: 1 - value / optimum over random problems with 1 to 6 clients of unequal budgets, models of 2 to 8 blocks with
1 to 7 matrices each, ranks 0, 2, 4, 8, 16; a quarter each with tight memory, a tight deadline, both, or neither, and in
40 % of all a tight server memory. A unit of rank costs 1 to 100 times what it does in truth, so that ranks matter
beside frozen weights (see `random_problems`). The optimum is HiGHS's, to 1e-6; problems that it does not solve in time
are counted apart. `worst_gap` and `mean_gap` are over all problems that it solved.

*Seconds*: one plan for a model of 32 blocks and 224 matrices with tight memory and deadline, the best of the repeats;
from arrays to a `RoundPlan`, with the limits of every client. With ``tail-worth = auto`` that is several plans.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _provenance import provenance

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.paced_plans import paced_plan
from hsplit_flwr.planning.planner import exact_solver, plan_problem
from hsplit_flwr.planning.round_plan import RoundPlan
from hsplit_flwr.planning.solver.greedy import solve
from hsplit_flwr.planning.solver.problem import Problem
from hsplit_flwr.planning.solver.random_problems import Tight, random_problem

CLIENTS = (10, 100, 1000, 10_000)
TIGHTNESS: tuple[Tight, ...] = ("memory", "deadline", "both", "none")
OPTIMUM = 1e-6
SOLVER_SECONDS = 20.0


def gap_of(seed: int, tight: Tight) -> float | None:
    """1 - value / optimum of one random problem; None if the exact planner did not finish."""
    rng = np.random.default_rng([seed, 1])
    problem = random_problem(
        seed,
        clients=int(rng.integers(1, 7)),
        blocks=int(rng.integers(2, 9)),
        matrices=int(rng.integers(1, 8)),
        tight=tight,
        uneven=bool(rng.integers(2)),
    )
    found = plan_problem(problem, solve)
    try:
        optimal = plan_problem(problem, exact_solver(time_limit_s=SOLVER_SECONDS, gap=OPTIMUM))
    except ConfigError:
        return None
    return 1 - found.value / optimal.value if optimal.value > 0 else None if found.value else 0.0


def measure_gaps(instances: int, seed: int, limit_s: float) -> dict[str, list[float | None]]:
    """Gaps by what is tight, as many instances as fit in `limit_s`."""
    gaps: dict[str, list[float | None]] = {tight: [] for tight in TIGHTNESS}
    start = time.perf_counter()
    for instance in range(instances):
        if time.perf_counter() - start > limit_s:
            break
        tight = TIGHTNESS[instance % len(TIGHTNESS)]
        gaps[tight].append(gap_of(seed + instance, tight))
    return gaps


def one(problem: Problem) -> RoundPlan:
    """The plan of a stated ``tail-worth``."""
    return plan_problem(problem, solve)


def paced(problem: Problem) -> RoundPlan:
    """The best of several, as ``tail-worth = auto`` makes them."""
    return paced_plan(problem, problem.deadline_s, one)


def seconds_for(make: Callable[[Problem], RoundPlan], clients: int, repeats: int, seed: int) -> float:
    """The best of `repeats` plans."""
    problem = random_problem(seed, clients=clients, blocks=32, tight="both")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        make(problem)
        times.append(time.perf_counter() - start)
    return min(times)


def run(instances: int, repeats: int, seed: int, limit_s: float) -> dict[str, Any]:
    """All figures, JSON-able."""
    seconds = {
        name: {str(clients): seconds_for(make, clients, repeats, seed) for clients in CLIENTS}
        for name, make in (("stated", one), ("auto", paced))
    }
    gaps = measure_gaps(instances, seed, limit_s)
    solved = {tight: [gap for gap in found if gap is not None] for tight, found in gaps.items()}
    every = [gap for found in solved.values() for gap in found]
    return {
        "worst_gap": max(every),
        "mean_gap": statistics.mean(every),
        "gap_by_tightness": {
            tight: {"worst": max(found), "mean": statistics.mean(found), "instances": len(found)}
            for tight, found in solved.items()
        },
        "seconds_by_clients": seconds,
        "config": {
            "instances": len(every),
            "unsolved": sum(map(len, gaps.values())) - len(every),
            "solver_gap": OPTIMUM,
            "blocks": 32,
            "matrices": 224,
            "repeats": repeats,
        },
        **provenance(seed),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as one Markdown table."""
    lines = ["| planner | worst gap | mean gap | problems | seconds |", "|---|---|---|---|---|"]
    for tight, row in figures["gap_by_tightness"].items():
        lines.append(f"| tight: {tight} | {row['worst']:.2%} | {row['mean']:.3%} | {row['instances']} | |")
    total = figures["config"]["instances"]
    lines.append(f"| all | {figures['worst_gap']:.2%} | {figures['mean_gap']:.3%} | {total} | |")
    for worth, by_clients in figures["seconds_by_clients"].items():
        for clients, seconds in by_clients.items():
            lines.append(f"| {int(clients):,} clients, 32 blocks, tail-worth {worth} | | | | {seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--instances", type=int, default=400, help="random problems solved exactly, too")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which no further problem is started")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures = run(arguments.instances, arguments.repeats, arguments.seed, arguments.limit)
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
