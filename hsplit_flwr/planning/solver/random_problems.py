"""Random planning problems, shaped like those of decoder-only models, for tests and benchmarks."""

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from hsplit_flwr.planning.solver.objective import spread_ranks, tail_values
from hsplit_flwr.planning.solver.participants import participants
from hsplit_flwr.planning.solver.problem import Devices, HeadCosts, Matrices, Problem, TailCosts
from hsplit_flwr.training.workload import Workload

Tight = Literal["memory", "deadline", "both", "none"]
TOKENS = 512
"""of a batch"""


def random_problem(
    seed: int,
    *,
    clients: int,
    blocks: int,
    matrices: int = 7,
    tight: Tight = "both",
    ranks: tuple[int, ...] = (2, 4, 8, 16),
    uneven: bool = True,
) -> Problem:
    """A model of random widths and importance, and clients of random, unequal budgets.

    A unit of rank costs 1 to 100 times what it costs in truth: adapters of rank 16 take a small part of a head beside
    its frozen weights, which would make most problems trivial (the deepest cut that fits, with full ranks).

    Args:
        seed: equal seeds, equal problems.
        clients: n.
        blocks: L.
        matrices: per block.
        tight: "memory": budgets between the smallest head and less than the largest with full ranks; "deadline": a
            deadline between the fastest and the slowest plan of a middling client; the rest is ample.
        ranks: candidates.
        uneven: the matrices' costs in FLOPs and upload also vary by a factor of up to 4 against their memory.
    """
    rng = np.random.default_rng(seed)
    hidden = int(rng.choice([256, 576, 1024, 2048]))
    width = hidden * rng.choice([1, 1, 1, 2.75, 4], size=(matrices, 2))
    size = np.tile(width.sum(axis=1), blocks)
    weights = float((width[:, 0] * width[:, 1]).sum())
    block = np.repeat(np.arange(blocks), matrices)
    importance = rng.lognormal(sigma=rng.uniform(0.3, 1.5), size=len(size)) * np.exp(rng.normal(0, 1) * block / blocks)
    importance = importance / importance.sum()
    heavy = 10 ** rng.uniform(0, 2, size=3)[:, None]
    vary = 2 ** rng.uniform(-1, 1, size=(2, len(size))) if uneven else np.ones((2, len(size)))
    vary = np.vstack([np.ones(len(size)), vary]) * heavy
    depth = np.arange(1.0, blocks)
    block_flops = 4 * TOKENS * weights
    tail_ranks = spread_ranks(np.where(block > 0, importance, 0), size, ranks, 8 * float(size[block > 0].sum()))
    worth = np.random.default_rng([seed, 1]).choice([0.0, 0.5, 1.0, 2.0])  # apart: other draws stay what they were
    block_activations = 4 * TOKENS * hidden * 20
    problem = Problem(
        matrices=Matrices(
            names=tuple(f"model.layers.{b}.m{i % matrices}" for i, b in enumerate(block)),
            block=block,
            importance=importance,
        ),
        heads=HeadCosts(
            base_bytes=4 * 8000.0 * hidden + depth * (4 * weights + block_activations),
            base_flops=depth * block_flops,
            forward_flops=depth * block_flops / 2,
            rank_bytes=(16 * size + 4 * TOKENS) * vary[0],
            rank_flops=6 * TOKENS * size * vary[1],
            rank_wire_bytes=4 * size * vary[2],
            round_bytes_up=depth * matrices * 256,
            round_bytes_down=depth * 4 * weights * rng.uniform(0, 1),
            step_bytes_up=4 * TOKENS * hidden,
            step_bytes_down=4 * TOKENS * hidden,
            answer_bytes_down=128,
        ),
        tail=TailCosts(
            ranks=tail_ranks,
            values=tail_values(importance, block, tail_ranks, float(worth), blocks - 1),
            flops_base=6.0 * TOKENS * hidden * 8000,
            flops_per_block=1.05 * block_flops,
            bytes_base=4.0 * TOKENS * 8000,
            bytes_per_block=block_activations,
            fixed_bytes=4 * blocks * weights + 16 * float(tail_ranks @ size),
        ),
        devices=Devices(
            clients=tuple(f"client-{i}" for i in range(clients)),
            memory=np.full(clients, 1e15),
            flops_per_s=block_flops * 10 ** rng.uniform(0, 1.5, clients),
            uplink=4 * TOKENS * hidden * 10 ** rng.uniform(0.5, 2, clients),
            downlink=4 * TOKENS * hidden * 10 ** rng.uniform(0.5, 2, clients),
            latency=rng.uniform(0, 0.05, clients),
            server_memory=1e18,
            server_flops_per_s=block_flops * 10 ** rng.uniform(0.7, 3) * max(1.0, clients / 5),
        ),
        ranks=ranks,
        workload=Workload(local_steps=20),
    )
    if tight in ("memory", "both"):
        least, most = problem.heads.base_bytes[[0, -1]]
        full = most + max(ranks) * float(problem.heads.rank_bytes[block < blocks - 1].sum())
        reach = rng.uniform(0.15, 1.0)
        memory = least + (full - least) * reach * rng.uniform(0, 1, clients) ** 1.5
        problem = equipped(problem, memory=np.floor(memory))
    if tight in ("deadline", "both"):
        problem = replace(problem, deadline_s=_deadline(problem, rng))
    if rng.uniform() < 0.4:
        problem = equipped(problem, server_memory=_server_memory(problem) * rng.uniform(1, 1.5))
    return problem


def equipped(problem: Problem, **changes: Any) -> Problem:
    """The same problem with other `Devices`: `changes` of its fields."""
    return replace(problem, devices=replace(problem.devices, **changes))


def _server_memory(problem: Problem) -> float:
    """The least with which as many clients as possible can be served."""
    _, cuts, _ = participants(problem)
    return problem.server_bytes(float((problem.num_cuts + 1 - cuts).sum()), len(cuts))


def _deadline(problem: Problem, rng: np.random.Generator) -> float:
    """Somewhere between a round at cut 1 without adapters and one at the deepest cut with full ranks."""
    steps, clients, cuts = problem.local_steps, problem.num_clients, problem.num_cuts
    least = problem.fixed_seconds(1) + steps * problem.server_step_s(cuts * clients, clients)
    most = problem.fixed_seconds(cuts) + steps * problem.server_step_s(clients, clients)
    heads, devices = problem.heads, problem.devices
    per_rank = steps * heads.rank_flops.sum() / devices.flops_per_s + heads.rank_wire_bytes.sum() / devices.uplink
    most = np.maximum(most, least) + max(problem.ranks) * per_rank
    low, high = np.quantile(least, rng.uniform(0.5, 1)), np.quantile(most, rng.uniform(0.2, 0.8))
    deadline = float(low + (max(high, low * 1.02) - low) * rng.uniform(0.02, 0.8))
    assert math.isfinite(deadline)
    return deadline
