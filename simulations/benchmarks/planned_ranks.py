"""Planned ranks against uniform ranks of equal cost: same model, data, seeds, budgets and cuts.

Three ways to spend the same memory on adapters, on the quickstart's five devices and data (non-IID, embedded model):

    planned       the planner with measured importance, re-planned as it drifts (HSplitLoRA)
    unweighted    the planner as if every matrix were equally important (without important weight identification)
    uniform       the plan's cuts and memory, spent on one rank for all matrices of a head

Each is an ordinary run of the strategy with real gRPC. Perplexity is that of the server's held-out examples, whose
meaning representations no client has. Prints one table (mean and spread over seeds), writes one JSON.

    python simulations/benchmarks/planned_ranks.py --json OUT
"""

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _provenance import provenance

from hsplit_flwr.common.tables import format_table
from hsplit_flwr.data.restaurants import restaurant_examples
from hsplit_flwr.experiments.split_plans import UnweightedPlanning
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.flower.local_federation import LocalNode, run_federation
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.budgets.fleet import Fleet
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.planner import PlannerConfig
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.planning.round_plan import RoundPlan
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.workload import Workload

APP = Path(__file__).parent.parent / "quickstart"
sys.path.insert(0, str(APP))
from quickstart.task import FOLDER, MODEL, batches, client_data  # noqa: E402

EVALUATED = 400
"""held-out examples"""
BATCH, LENGTH = 8, 96


def uniform_ranks(ranks: Mapping[str, int], unit_bytes: Mapping[str, float]) -> dict[str, int]:
    """One rank for all modules of `ranks`, of no more bytes in all; what is left raises the first ones by one."""
    left = sum(rank * unit_bytes[name] for name, rank in ranks.items())
    rank = int(left // sum(unit_bytes[name] for name in ranks))
    left -= rank * sum(unit_bytes[name] for name in ranks)
    uniform = {}
    for name in ranks:
        more = unit_bytes[name] <= left
        left -= unit_bytes[name] * more
        uniform[name] = rank + more
    return uniform


class UniformPlanning(AdaptivePlanning):
    """The planner's cuts and memory, with one rank for all matrices of a head, and for all of the tail."""

    def make(self, budgets: Mapping[str, Budget]) -> RoundPlan:
        """The planner's plan, levelled."""
        return self._levelled(super().make(budgets))

    def _levelled(self, plan: RoundPlan) -> RoundPlan:
        names = [matrix.name for matrix in self.costs.matrices]
        unit_bytes = dict(zip(names, self.costs.rank_bytes.tolist(), strict=True))
        sizes = {matrix.name: float(matrix.d_in + matrix.d_out) for matrix in self.costs.matrices}
        clients = {
            client: replace(planned, ranks=uniform_ranks(planned.ranks, unit_bytes))
            for client, planned in plan.clients.items()
        }
        return replace(plan, clients=clients, tail=replace(plan.tail, ranks=uniform_ranks(plan.tail.ranks, sizes)))


ARMS: dict[str, Callable[..., AdaptivePlanning]] = {
    "planned": AdaptivePlanning,
    "unweighted": UnweightedPlanning,
    "uniform": UniformPlanning,
}


def run(arm: str, seed: int, training: TrainingConfig, planner: PlannerConfig) -> dict[str, Any]:
    """One federated run; perplexity after every round, cuts, mean ranks and adapter bytes of the last plan."""
    run_config = {"batch-size": BATCH, "max-length": LENGTH, "seed": seed}
    files = ModelFiles.resolve(MODEL)
    workload = Workload.of(training, batch_size=BATCH, sequence_length=LENGTH)
    fleet = Fleet.from_toml(FOLDER / "devices.toml", seed=seed)
    costs = ModelCosts(files.config, workload)
    _, held_out = restaurant_examples()
    strategy = HSplitLoRAStrategy(
        GlobalModel(files),
        ARMS[arm](costs, fleet.server, planner),
        replace(training, seed=seed),
        eval_batches=batches(held_out[:EVALUATED], run_config, shuffle=False),
    )
    count = len(fleet.client_ids)
    nodes = [
        LocalNode(c, [c], MODEL, lambda client: client_data(client, count, run_config), budgets=fleet.budget)
        for c in fleet.client_ids
    ]
    started = time.perf_counter()
    run_federation(strategy, nodes)
    plan = next(record.plan for record in reversed(strategy.history) if record.plan)
    return {
        "arm": arm,
        "seed": seed,
        "perplexity": [record.central_perplexity for record in strategy.history],
        "cuts": [planned.cut for planned in plan.clients.values()],
        "mean_ranks": [statistics.mean(planned.ranks.values()) for planned in plan.clients.values()],
        "memory_bytes": [planned.memory_bytes for planned in plan.clients.values()],
        "plan_reasons": [record.plan_reasons for record in strategy.history],
        "drift": [record.drift for record in strategy.history],
        "failures": [failure for record in strategy.history for failure in record.failures],
        "ranks": {client: dict(planned.ranks) for client, planned in plan.clients.items()},
        "tail_ranks": dict(plan.tail.ranks),
        "importance": dict(strategy.history[-1].importance),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Run all arms and seeds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--ranks", default="1,2,4,8,16", help="candidate ranks")
    parser.add_argument("--tail-rank", type=int, default=4)
    parser.add_argument("--arms", default=",".join(ARMS))
    options = parser.parse_args()
    logging.getLogger("hsplit_flwr").setLevel(logging.WARNING)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # five clients share the cores
    training = TrainingConfig(
        rounds=options.rounds, local_steps=options.local_steps, learning_rate=options.learning_rate
    )
    ranks = tuple(map(int, options.ranks.split(",")))
    planner = PlannerConfig(ranks, options.tail_rank, tail_worth=0.0, deadline_s=math.inf)
    runs = []
    for seed in range(options.seeds):
        for arm in options.arms.split(","):
            runs.append(run(arm, seed, training, planner))
            last = runs[-1]
            print(f"{arm:12} seed {seed}  {last['perplexity'][-1]:.4f}  {last['seconds']:.0f} s", flush=True)
            options.json.write_text(json.dumps({**provenance(seed), "runs": runs}, indent=1))
    print("\n" + table(runs, options.arms.split(",")))


def table(runs: list[dict[str, Any]], arms: list[str]) -> str:
    """A row per arm: perplexity after each round, mean over seeds, and the spread of the last."""
    rows = []
    for arm in arms:
        curves = [r["perplexity"] for r in runs if r["arm"] == arm]
        final = [curve[-1] for curve in curves]
        spread = f"{min(final):.4f} - {max(final):.4f}"
        rows.append([arm, *(f"{statistics.mean(at):.4f}" for at in zip(*curves, strict=True)), spread])
    rounds = [f"round {i}" for i in range(1, len(rows[0]) - 1)]
    return format_table(["ranks", *rounds, "lowest - highest"], rows, False)


if __name__ == "__main__":
    main()
