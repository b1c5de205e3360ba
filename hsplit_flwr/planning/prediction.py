"""How long a plan's round takes by the virtual clock: everybody's steps beside each other, as the exchange has them.

A long round of many clients is played for its first steps alone. The pace that it has found by then is kept to its end:
what a step takes repeats itself once everybody is under way.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.clock import SERVER, ClientWork, play_round
from hsplit_flwr.planning.solver.problem import Problem
from hsplit_flwr.planning.solver.solution import Solution

MOST_PARTS = 4_000
"""that are played, of all clients: they take about as long as the plan itself"""
FEWEST_STEPS = 4
"""that are played, if a round has as many"""


class Prediction(NamedTuple):
    """Seconds of a round."""

    done_s: Mapping[str, float]
    """client -> from the start of the round until it has sent its adapters"""
    round_s: float
    """until everybody has"""
    step_s: float
    """mean over the later half of the steps"""


def predict(problem: Problem, solution: Solution) -> Prediction:
    """The round of `solution`; exact up to `MOST_PARTS`, by their pace beyond.

    Its compute and bytes are the problem's, upper bounds where a matrix has no adapter or the blocks of a model differ.
    """
    work = _work(problem, solution)
    if not work:
        return Prediction({}, 0.0, 0.0)
    most = max(FEWEST_STEPS, MOST_PARTS // (len(work) * problem.workload.micro_batches))
    steps = min(most, problem.local_steps)
    done, half = _played(problem, work, steps), steps // 2
    early = _played(problem, work, half) if half else dict.fromkeys(work, 0.0)
    pace = max((done[client] - early[client]) / (steps - half) for client in work)
    done = {client: seconds + (problem.local_steps - steps) * pace for client, seconds in done.items()}
    return Prediction(done, max(done.values()), pace)


def _played(problem: Problem, work: Mapping[str, ClientWork], steps: int) -> dict[str, float]:
    """When each client has sent its adapters, in a round of so many steps."""
    devices = problem.devices
    figures = zip(
        devices.flops_per_s.tolist(),
        devices.uplink.tolist(),
        devices.downlink.tolist(),
        devices.latency.tolist(),
        strict=True,
    )
    memory = 1  # the clock does not look at it
    budgets = {one.client: Budget(memory, *device) for one, device in zip(work.values(), figures, strict=True)}
    server = Budget(memory, devices.server_flops_per_s, 1.0, 1.0)
    played = [replace(one, steps=steps) for one in work.values()]
    done = dict.fromkeys(budgets, 0.0)
    for interval in play_round(played, budgets, server, workload=problem.workload).intervals:
        if interval.who != SERVER and interval.what != "wait":
            done[interval.who] = max(interval.end_s, done[interval.who])
    return {client: done[one.client] for client, one in work.items()}


def _work(problem: Problem, solution: Solution) -> dict[str, ClientWork]:
    """Every client's round; on the clock it goes by its number, whatever it is called."""
    heads, at = problem.heads, solution.cuts - 1
    ranks = problem.levels[solution.levels]
    backward = heads.base_flops[at] - heads.forward_flops[at] + ranks @ heads.rank_flops
    uploads = heads.round_bytes_up[at] + ranks @ heads.rank_wire_bytes
    blocks = problem.num_cuts + 1 - solution.cuts
    tail_flops = problem.tail.flops_base + blocks * problem.tail.flops_per_block
    return {
        client: ClientWork(
            client=str(i),
            steps=problem.local_steps,
            forward_flops=float(heads.forward_flops[at[i]]),
            backward_flops=float(backward[i]),
            step_bytes_up=heads.step_bytes_up,
            step_bytes_down=heads.step_bytes_down,
            tail_flops=float(tail_flops[i]),
            download_bytes=float(heads.round_bytes_down[at[i]]),
            upload_bytes=float(uploads[i]),
        )
        for i, client in enumerate(problem.devices.clients)
    }
