"""Does aggregation preserve the size of an update, whatever the ranks? Five clients train, every rule aggregates.

For each configuration of ranks the clients of the quickstart's non-IID data train LoRA on the whole embedded model for
one round, from the same A (B = 0), so that averaging is at its best. Each rule then aggregates the same adapters.
Per rule: the Frobenius norm of its update over that of the exact weighted sum (1: size preserved), its relative error,
both over all matrices together, and held-out perplexity once the update is merged.

    python simulations/benchmarks/magnitudes.py --json OUT
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _provenance import provenance

from hsplit_flwr.common.tables import format_table
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.experiments.rivals.whole_model import WholeTrainer
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.lora.aggregation import RULES, aggregate
from hsplit_flwr.models.segments import block_of

RANKS = ((8, 8, 8, 8, 8), (2, 4, 8, 12, 16), (1, 1, 1, 1, 16), (16, 16, 16, 16, 1))
SPEC = RunSpec("hetlora", "homogeneous", "dirichlet", 0, 5e-3, rounds=1, local_steps=20, warmup_steps=5)


def measure(ranks: tuple[int, ...], seed: int) -> list[dict[str, Any]]:
    """One row per rule."""
    task = Task.of(replace(SPEC, seed=seed))
    clients = task.setting.present(seed, 1)
    setting = replace(task.setting, ranks=dict(zip(clients, ranks, strict=True)))
    trainer = WholeTrainer(replace(task, setting=setting), replace(METHODS["hetlora"], self_pruning=False))
    contributions = trainer.contributions({client: trainer.train(client, 1) for client in clients})
    updates = {name: aggregate(contributions, {}, block_of, rule) for name, rule in RULES.items()}
    exact = {
        name: sum(c.weight * c.factors[name].delta().double() for c in contributions) for name in updates["noise_free"]
    }
    total = _norm(exact)
    rows = []
    for rule, update in updates.items():
        dense = {name: pair.delta().double() for name, pair in update.items()}
        model = GlobalModel(task.files)
        model.apply(update)
        rows.append(
            {
                "ranks": ranks,
                "rule": rule,
                "norm_ratio": _norm(dense) / total,
                "relative_error": _norm({name: dense[name] - exact[name] for name in exact}) / total,
                "perplexity": model.score(task.eval_batches).perplexity,
            }
        )
    return rows


def _norm(update: dict[str, Any]) -> float:
    return math.sqrt(sum(float(delta.square().sum()) for delta in update.values()))


def main() -> None:
    """Measure all configurations, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for ranks in RANKS for row in measure(ranks, options.seed)]
    options.json.write_text(json.dumps({"rows": rows, **provenance(options.seed)}, indent=1) + "\n")
    cells = [
        [
            ", ".join(map(str, row["ranks"])),
            row["rule"],
            f"{row['norm_ratio']:.4f}",
            f"{row['relative_error']:.1e}",
            f"{row['perplexity']:.2f}",
        ]
        for row in rows
    ]
    print(format_table(["ranks", "rule", "norm / exact", "relative error", "perplexity"], cells, False))


if __name__ == "__main__":
    main()
