"""The planning problem of a model, from its costs, the measured importance and the devices' budgets."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.solver.objective import Floats, Ints, spread_ranks, tail_values
from hsplit_flwr.planning.solver.problem import Devices, HeadCosts, Matrices, Problem, TailCosts

if TYPE_CHECKING:
    from hsplit_flwr.planning.costs.model_costs import ModelCosts


def problem_of(
    costs: "ModelCosts",
    importance: Mapping[str, float],
    clients: Mapping[str, Budget],
    server: Budget,
    *,
    ranks: Sequence[int],
    tail_rank: float,
    tail_worth: float,
    trained: Collection[str],
    deadline_s: float = math.inf,
    update: UpdateCoding | None = None,
    round_weight: float = 1.0,
) -> Problem:
    """The problem of a model.

    Args:
        costs: of the model and the workload.
        importance: whole-model module name -> importance >= 0, any scale; matrices of importance 0 get no adapter.
        clients: client id -> budget.
        server: its memory and compute.
        ranks: candidates besides 0.
        tail_rank: mean rank of the tail's adapters.
        tail_worth: of a matrix in the tail against one in a head.
        trained: the matrices that may get an adapter; all others count as of no importance.
        deadline_s: for a round.
        update: how a round's update goes to the clients; default: as it is.
        round_weight: how often the bytes of a round, down and up, count beside those of its steps.

    Raises:
        ConfigError: importance does not cover the matrices, or is not finite, >= 0 and > 0 somewhere.
    """
    names = tuple(matrix.name for matrix in costs.matrices)
    block = np.array([matrix.block for matrix in costs.matrices])
    weights = checked_importance(names, importance, trained)
    size = np.array([matrix.sides for matrix in costs.matrices], float)
    tail_budget = tail_rank * float(size[block >= 1].sum())
    tail = spread_ranks(np.where(block >= 1, weights, 0.0), size, ranks, tail_budget)
    down = _update_bytes(costs, update or UpdateCoding(), len(clients), max(ranks), tail)
    return Problem(
        matrices=Matrices(names=names, block=block, importance=weights),
        heads=_head_costs(costs, size, down, round_weight),
        tail=_tail_costs(costs, tail, tail_values(weights, block, tail, tail_worth, costs.num_blocks - 1)),
        devices=Devices.of(clients, server),
        ranks=tuple(sorted(ranks)),
        workload=costs.workload,
        deadline_s=deadline_s,
    )


def _head_costs(costs: "ModelCosts", size: Floats, round_bytes_down: Floats, round_weight: float) -> HeadCosts:
    cuts = range(1, costs.num_blocks)
    return HeadCosts(
        base_bytes=np.array([costs.head_base_bytes(cut) for cut in cuts], float),
        base_flops=np.array([costs.head_base_flops(cut) for cut in cuts]),
        forward_flops=np.array([costs.head_flops(cut, {}) for cut in cuts]),
        rank_bytes=costs.rank_bytes,
        rank_flops=costs.rank_flops,
        rank_wire_bytes=round_weight * 4 * size,
        round_bytes_up=round_weight * (costs.hello_bytes + _array_headers(costs)),
        round_bytes_down=round_weight * round_bytes_down,
        step_bytes_up=costs.step_bytes_up,
        step_bytes_down=costs.step_bytes_down,
        answer_bytes_down=costs.answer_bytes_down,
    )


def _tail_costs(costs: "ModelCosts", ranks: Ints, values: Floats) -> TailCosts:
    cuts = range(1, costs.num_blocks)
    by_name = dict(zip([matrix.name for matrix in costs.matrices], ranks.tolist(), strict=True))
    flops_base, flops_per_block = _affine([costs.tail_flops(cut, by_name) for cut in cuts])
    one = np.array([costs.tail_memory([cut], by_name).total_bytes for cut in cuts], float)
    extra = np.array([costs.tail_memory([cut, cut], by_name).total_bytes for cut in cuts]) - one
    bytes_base, bytes_per_block = _affine(extra)
    return TailCosts(
        ranks=ranks,
        values=values,
        flops_base=flops_base,
        flops_per_block=flops_per_block,
        bytes_base=bytes_base,
        bytes_per_block=bytes_per_block,
        fixed_bytes=float((one - extra).max()),
    )


def _array_headers(costs: "ModelCosts") -> Floats:
    """(C,) bytes beside the numbers, if every matrix of a head has an adapter."""
    ones = dict.fromkeys((matrix.name for matrix in costs.matrices), 1)
    numbers = np.cumsum(np.bincount([m.block for m in costs.matrices], [4 * m.sides for m in costs.matrices]))
    return np.array([costs.update_bytes(cut, ones) - numbers[cut - 1] for cut in range(1, costs.num_blocks)])


def _update_bytes(costs: "ModelCosts", update: UpdateCoding, clients: int, rank: int, tail_ranks: Ints) -> Floats:
    """(C,) of a head's weight updates at most: what `clients` trained, all at `rank`, and the tail's (M,) ranks."""
    change = costs.workload.change_rank
    tail_rank = dict(zip([matrix.name for matrix in costs.matrices], tail_ranks.tolist(), strict=True))
    stacked = {name: change * (clients * rank + tail) for name, tail in tail_rank.items()}
    cuts = range(1, costs.num_blocks)
    return np.array([costs.delta_bytes(cut, update, stacked, change * rank) for cut in cuts], float)


def _affine(by_cut: Sequence[float] | Floats) -> tuple[float, float]:
    """(base, per block) of the smallest base + per_block * (L - cut) that is nowhere below `by_cut`."""
    shallow_to_deep = np.asarray(by_cut, float)
    per_block = float(max(-np.diff(shallow_to_deep), default=shallow_to_deep[-1]))
    return max(0.0, float(shallow_to_deep[-1]) - per_block), per_block


def checked_importance(names: Sequence[str], importance: Mapping[str, float], trained: Collection[str]) -> Floats:
    """(M,) importance of `names`, sum 1; 0 for those that are not among the `trained`.

    Raises:
        ConfigError: a module is missing, a value is negative or not finite, or all that are trained are 0.
    """
    missing = [name for name in names if name not in importance]
    if missing:
        raise ConfigError(
            f"Expected importance for all {len(names)} candidate matrices, found none for {len(missing)} of them "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Give unmeasured ones a neutral value."
        )
    array = np.array([importance[name] for name in names], float)
    bad = [f"{name}: {value}" for name, value in zip(names, array, strict=True) if not 0 <= value < math.inf]
    array = np.where([name in trained for name in names], array, 0.0)
    if bad or not array.sum() > 0:
        found = ", ".join(bad[:3]) if bad else "only zeros"
        raise ConfigError(
            f"Expected finite importance >= 0, > 0 for at least one matrix, found {found}. "
            "Check the gradients that it was measured from, or plan with equal importance."
        )
    # by the largest value first: the sum of huge values may overflow
    scaled = array / array.max()
    return np.asarray(scaled / scaled.sum())
