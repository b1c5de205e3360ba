"""What a round makes a client download."""

from collections.abc import Mapping

import torch

from hsplit_flwr.lora.delta_log import DeltaLog
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.planning.costs.model_costs import ModelCosts


def largest_update(costs: ModelCosts, cut: int, clients: int, tail_ranks: Mapping[str, int]) -> int:
    """Bytes that the log sends for a head of `cut` after a round with as many adapters of rank 16, and the tail's."""
    log = DeltaLog()
    held = [matrix for matrix in costs.matrices if matrix.block < cut]
    for _ in range(2):
        increment = {}
        for m in held:
            rank = 16 * clients + tail_ranks.get(m.name, 0)
            increment[m.name] = LoraFactors(torch.ones(rank, m.d_in), torch.ones(m.d_out, rank), 1.0)
        log.append(increment)
    return log.since(1, [matrix.name for matrix in held]).nbytes
