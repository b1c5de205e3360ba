"""What a round makes a client download."""

from collections.abc import Mapping

import torch

from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.codecs import Part
from hsplit_flwr.lora.aggregation import StackedPart
from hsplit_flwr.lora.delta_log import DeltaLog
from hsplit_flwr.lora.delta_update import OwnRound
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.planning.costs.model_costs import ModelCosts


def largest_update(costs: ModelCosts, cut: int, clients: int, tail_ranks: Mapping[str, int]) -> int:
    """Bytes that the log sends for a head of `cut` after a round with as many adapters of rank 16, its own not, and the
    tail's; of adapters that are kept, what they changed by, which has twice their rank."""
    change = 2 if costs.workload.keep_adapters else 1
    log = DeltaLog()
    held = [matrix for matrix in costs.matrices if matrix.block < cut]
    for _ in range(2):
        increment = {}
        for m in held:
            rank = change * (16 * clients + tail_ranks.get(m.name, 0))
            increment[m.name] = LoraFactors(torch.ones(rank, m.d_in), torch.ones(m.d_out, rank), 1.0)
        log.append(increment, {m.name: [StackedPart("0", 2, start=0, rank=16 * change, scale=1.0)] for m in held})
    lacking = log.since(1, [matrix.name for matrix in held], own=OwnRound("0", 2)).to_tensors()
    return frame_bytes.delta_bytes({key: Part(tuple(tensor.shape), tensor.dtype) for key, tensor in lacking.items()})
