"""What the planner chooses in every setting of the experiments, beside SplitLoRA's uniform cut.

    python simulations/benchmarks/settings_plans.py [--markdown] [--settings A,B]

Each setting for LLaMA-2-7B (4 x 128 tokens, bfloat16) and for the embedded model (4 x 96 tokens), rounds of 8 steps,
all matrices equally important, as before anything was measured. Two ways to exchange: whole batches in bfloat16 and
updates as they are (`hsplitlora` and `splitlora_16`), and int8 in four parts, three in flight (`hsplitlora_all`, whose
updates are small, too, and `splitlora_16_pipelined`). SplitLoRA has one cut and one rank for all: 16 or, where that
does not fit, the largest that does; *deepest* is the deepest cut that everybody affords, as in the experiments, *best*
the one of most progress per second. Of each *s* is a round by the virtual clock and *progress* steps' worth of it in a
step (`planning.solver.pace`); *gain* is our progress per second over theirs.

Nothing is measured here but the costs of models: the same on every machine with the same versions.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

import numpy as np
from transformers import LlamaConfig

from hsplit_flwr.common.tables import describe_ranks, format_table
from hsplit_flwr.experiments.methods import METHODS, Method
from hsplit_flwr.experiments.settings import SETTINGS, Setting, round_weight
from hsplit_flwr.experiments.split_plans import common_cut, common_rank, planner_config
from hsplit_flwr.experiments.task import LARGEST_RANK, RANKS
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.planner import plan
from hsplit_flwr.planning.prediction import predict
from hsplit_flwr.planning.round_plan import RoundPlan
from hsplit_flwr.planning.solver.model_problem import problem_of
from hsplit_flwr.planning.solver.pace import pace
from hsplit_flwr.planning.solver.solution import Solution
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.workload import Workload

LOCAL_STEPS = 8
MODELS = {"LLaMA-2-7B": (128, "bf16"), "embedded": (96, "fp32")}
"""model -> tokens of a row, dtype"""
WIRES = {"bf16": ("hsplitlora", "splitlora_16"), "int8, parts": ("hsplitlora_all", "splitlora_16_pipelined")}
"""wire -> our method, and SplitLoRA's"""
SHOWN = ("heterogeneous", *list(SETTINGS)[4:])
SLACK = 1.01
"""times a device's memory that a hand search may take: the smallest lacks 0.25 % of one block at rank 16"""
THEIRS = ["s", "progress", "gain"]
HEADER = [
    *("setting", "model", "wire", "our cuts", "ranks", "s", "progress"),
    *("deepest uniform", *THEIRS, "best uniform", *THEIRS),
]


@dataclass(frozen=True)
class Pace:
    """What a plan is predicted to be."""

    cuts: tuple[int, ...]
    """of every client, in order"""
    ranks: Mapping[str, tuple[int, ...]]
    """client -> ranks of its head"""
    round_s: float
    progress: float
    """steps' worth, of a step"""

    @property
    def per_second(self) -> float:
        """Steps' worth of progress, per step and second of a round."""
        return self.progress / self.round_s


@cache
def costs_of(model: str, method: str) -> ModelCosts:
    """Costs of the batches as `method` sends them."""
    length, dtype = MODELS[model]
    training = TrainingConfig(local_steps=LOCAL_STEPS, **METHODS[method].training_settings())
    config = LlamaConfig() if model == "LLaMA-2-7B" else ModelFiles.resolve(str(tiny_checkpoint())).config
    return ModelCosts(config, Workload.of(training, batch_size=4, sequence_length=length, dtype=dtype))


def planned(
    setting: Setting, costs: ModelCosts, method: Method, importance: Mapping[str, float] | None = None
) -> RoundPlan:
    """The plan of `method`; all matrices are equally important unless stated."""
    config = planner_config(method, setting.min_cut(costs.num_blocks), round_weight(costs))
    equal = {matrix.name: 1.0 for matrix in costs.matrices}
    return plan(costs, importance or equal, setting.devices(costs), setting.server(costs), config)


def ours(setting: Setting, costs: ModelCosts, method: Method) -> Pace:
    """HSplitLoRA's plan."""
    made = planned(setting, costs, method)
    assert not made.left_out, made.left_out
    clients = [made.clients[client] for client in setting.clients]
    ranks = {client.client: tuple(client.ranks.values()) for client in clients}
    return Pace(tuple(client.cut for client in clients), ranks, made.round_s, made.pace)


def hand_searched(setting: Setting, costs: ModelCosts, method: Method, choices: Sequence[int]) -> Pace:
    """The plan of `method` of most progress per second among all that give each kind of device one of the cuts
    `choices` that it has the memory for (up to `SLACK`), at the largest rank."""
    config = planner_config(method, setting.min_cut(costs.num_blocks), round_weight(costs))
    devices, names = setting.devices(costs), [matrix.name for matrix in costs.matrices]
    problem = problem_of(
        costs,
        dict.fromkeys(names, 1.0),
        devices,
        setting.server(costs),
        ranks=config.ranks,
        tail_rank=config.tail_rank,
        tail_worth=0.0,
        trained=names,
        update=config.update,
        round_weight=config.round_weight,
    )
    kinds = list(dict.fromkeys(devices.values()))
    kind_of = [kinds.index(devices[client]) for client in problem.devices.clients]
    able = [[cut for cut in choices if holds(costs, {"": kind}, cut, LARGEST_RANK, SLACK)] for kind in kinds]

    def played(by_kind: tuple[int, ...]) -> Pace:
        cuts = np.array([by_kind[kind] for kind in kind_of])
        held = problem.matrices.block < cuts[:, None]
        solution = Solution(cuts, np.where(held, len(RANKS), 0).astype(np.int8))
        return Pace(tuple(cuts), {}, predict(problem, solution).round_s, pace(problem, solution))

    return max(map(played, itertools.product(*able)), key=lambda pace: pace.per_second)


class Uniform:
    """SplitLoRA: one cut and rank for all, whose tail has the same rank, and which hands back averaged factors."""

    def __init__(self, setting: Setting, costs: ModelCosts) -> None:
        devices, least = setting.devices(costs), setting.min_cut(costs.num_blocks)
        self.rank = LARGEST_RANK if holds(costs, devices, least, LARGEST_RANK) else common_rank(costs, devices, least)
        self.cuts = range(least, common_cut(costs, devices, self.rank, least) + 1)
        """that everybody affords"""
        names, weight = [matrix.name for matrix in costs.matrices], round_weight(costs)
        problem = problem_of(
            costs,
            dict.fromkeys(names, 1.0),
            devices,
            setting.server(costs),
            ranks=(self.rank,),
            tail_rank=self.rank,
            tail_worth=0.0,
            trained=names,
            round_weight=weight,
        )
        sides = np.cumsum(np.bincount(problem.matrices.block, [matrix.sides for matrix in costs.matrices]))
        heads = replace(problem.heads, round_bytes_down=np.array(weight * 4 * self.rank * sides[:-1], np.float64))
        self._problem = replace(problem, heads=heads, ranks=RANKS)

    def at(self, cut: int) -> Pace:
        """What it is predicted to be at this cut."""
        clients = self._problem.devices.clients
        held = self._problem.matrices.block < cut
        levels = np.where(held, 1 + RANKS.index(self.rank), 0).astype(np.int8)
        solution = Solution(np.full(len(clients), cut), np.tile(levels, (len(clients), 1)))
        ranks = dict.fromkeys(clients, (self.rank,) * int(held.sum()))
        round_s = predict(self._problem, solution).round_s
        return Pace((cut,) * len(clients), ranks, round_s, pace(self._problem, solution))

    @property
    def deepest(self) -> Pace:
        """The cut that it has in the experiments."""
        return self.at(self.cuts[-1])

    @property
    def best(self) -> Pace:
        """The cut of most progress per second."""
        return max(map(self.at, self.cuts), key=lambda pace: pace.per_second)


def holds(costs: ModelCosts, devices: Mapping[str, Budget], cut: int, rank: int, slack: float = 1.0) -> bool:
    """Whether every device holds a head of `cut` with `rank` everywhere, in `slack` times its memory."""
    ranks = {matrix.name: rank for matrix in costs.matrices if matrix.block < cut}
    smallest = min(device.memory_bytes for device in devices.values())
    return costs.head_memory(cut, ranks).total_bytes <= slack * smallest


def row(name: str, model: str, wire: str) -> list[str]:
    """A setting's row."""
    setting, (our_method, their_method) = SETTINGS[name], WIRES[wire]
    mine = ours(setting, costs_of(model, our_method), METHODS[our_method])
    theirs = Uniform(setting, costs_of(model, their_method))
    return [
        *(name, model, wire, describe_cuts(mine.cuts), describe(mine.ranks)),
        *(f"{mine.round_s:.1f}", f"{mine.progress:.2f}"),
        *compared(mine, theirs.deepest, theirs.rank),
        *compared(mine, theirs.best, theirs.rank),
    ]


def compared(mine: Pace, their: Pace, rank: int) -> list[str]:
    """Their figures, and ours against them."""
    gain = f"{mine.per_second / their.per_second:.2f}x"
    return [f"cut {their.cuts[0]}, rank {rank}", f"{their.round_s:.1f}", f"{their.progress:.2f}", gain]


def describe_cuts(cuts: tuple[int, ...]) -> str:
    """Cuts one by one, or how often each where there are many or all are alike."""
    counts = Counter(cuts)
    if len(counts) > 1 and len(cuts) <= len(counts) + 5:
        return " ".join(map(str, cuts))
    return ", ".join(f"{count} x {cut}" for cut, count in sorted(counts.items()))


def describe(ranks: Mapping[str, tuple[int, ...]]) -> str:
    """The lowest and highest rank, and every client's mean where they differ."""
    means = [fmean(of_head) for of_head in ranks.values()]
    span = describe_ranks([rank for of_head in ranks.values() for rank in of_head])
    return span if max(means) - min(means) < 0.05 else f"{span} (means {min(means):.1f} to {max(means):.1f})"


def table(names: list[str], markdown: bool) -> str:
    """All rows of the settings."""
    rows = [row(name, model, wire) for name in names for model in MODELS for wire in WIRES]
    return format_table(HEADER, rows, markdown)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SHOWN))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    print(table(options.settings.split(","), options.markdown))


if __name__ == "__main__":
    main()
