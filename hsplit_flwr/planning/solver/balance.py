"""How long a round should take, where nobody says: as long as the slowest client needs for its shallowest head.

The tail trains every block that a head does not hold, so a deeper head makes a round longer, not better: it is worth
its time only to devices that would wait for the slowest one anyway. Measured in simulations/README.md.
"""

import math

import numpy as np

from hsplit_flwr.planning.solver.problem import Problem
from hsplit_flwr.planning.solver.solution import Solution, own_seconds


def balanced_deadline(problem: Problem) -> float:
    """Seconds of a round in which every client that has the memory has the shallowest head, at the largest ranks.

    So nobody is left out for lack of time who has the memory. Without a deadline (inf) where nobody has the memory, or
    the server has none for so many blocks at once.
    """
    cut = int(np.argmin(problem.heads.base_bytes == math.inf)) + 1  # the shallowest that is allowed
    holders = problem.restricted(np.flatnonzero(problem.devices.memory >= problem.heads.base_bytes[cut - 1]))
    clients = holders.num_clients
    blocks = clients * (holders.num_cuts + 1 - cut)
    if not clients or holders.server_bytes(blocks, clients) > holders.devices.server_memory:
        return math.inf
    levels = np.where(holders.matrices.block < cut, len(holders.ranks), 0).astype(np.int8)
    shallowest = Solution(np.full(clients, cut), np.tile(levels, (clients, 1)))
    seconds = own_seconds(holders, shallowest)[0].max() + holders.local_steps * holders.server_step_s(blocks, clients)
    return float(seconds)
