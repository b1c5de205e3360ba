"""Heads that train nothing: what a round is then, and how deep they pay most.

A head without adapters only computes forward and sends what comes of it: it is sent no gradient, and neither uploads
nor downloads an update, for what nobody trains does not change. That holds as long as all heads end at one cut, since a
block that the tail trains for somebody changes for whoever holds it. Progress counts nothing for what nobody trains
(`pace`); whether a task needs these blocks to change nobody can tell before, so that people have to allow it.
"""

from dataclasses import replace

import numpy as np

from hsplit_flwr.planning.solver.depths import allowed_cuts, within
from hsplit_flwr.planning.solver.pace import pace_behind
from hsplit_flwr.planning.solver.problem import Problem


def frozen(problem: Problem) -> Problem | None:
    """The problem with heads that train nothing, all of the cut that makes most progress per second, about.

    None: there is no cut that everybody can hold, for which the server has room, and which the deadline allows.
    """
    heads = problem.heads
    silent = replace(
        problem,
        heads=replace(
            heads,
            base_flops=heads.forward_flops,
            step_bytes_down=heads.answer_bytes_down,
            round_bytes_down=np.zeros_like(heads.round_bytes_down),
        ),
    )
    weighed = {cut: _progress_per_s(silent, cut) for cut in allowed_cuts(silent)}
    best = max(weighed, key=lambda cut: weighed[cut], default=0)
    if not best or not weighed[best]:
        return None
    importance = np.where(problem.matrices.block < best, 0.0, problem.matrices.importance)
    return within(replace(silent, matrices=replace(problem.matrices, importance=importance)), best, best)


def _progress_per_s(problem: Problem, cut: int) -> float:
    """About, as steps overlap at best; 0: memory or deadline forbid it."""
    clients, devices = problem.num_clients, problem.devices
    blocks = clients * (problem.num_cuts + 1 - cut)
    own_s = float(problem.fixed_seconds(cut).max())
    serving = problem.local_steps * problem.server_step_s(blocks, clients)
    held = (problem.heads.base_bytes[cut - 1] <= devices.memory).all()
    served = problem.server_bytes(blocks, clients) <= devices.server_memory
    if not (held and served and own_s + serving <= problem.deadline_s):
        return 0.0
    return pace_behind(problem, cut) / max(own_s + serving / clients, serving)
