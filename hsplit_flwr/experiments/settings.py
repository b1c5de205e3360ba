"""The devices of the experiments: clients and a server, stated for LLaMA-2-7B, scaled to the model at hand.

They are stated as people know them from 7B models: 32 blocks in bfloat16, batches of 4 x 128 tokens, activations in
bfloat16 on the wire. For another model and workload every device has

    memory    x  memory of the deepest head (L-1 blocks, rank 16 everywhere) / that of LLaMA-2-7B
    compute   x  FLOPs of a step of the whole model (rank 16 everywhere)     / that of LLaMA-2-7B
    link      x  bytes that a step sends up in bfloat16                      / that of LLaMA-2-7B

and the same latency. So a head of a given share of the model takes about the same share of a device, and a step's
compute and transfer take the seconds that they take for LLaMA-2-7B. Not scaled with them: what a client exchanges once
a round. Adapters of a smaller model weigh less against its activations, so downloads and uploads seem quicker.
The smallest device affords 0.26 of the deepest head: all that SmolLM2-135M needs for 1 block, and the embedded model
with batches of at least 192 tokens (4 x 48); with smaller ones the planner leaves that client out.

The numbers are *assumed*, not those of the paper (arXiv:2505.02795, whose exact devices are not public text to us):
compute is sustained, 0.4 of the peak as in `budgets.devices`. The fastest client, 64 TFLOP/s, is a GeForce RTX 4090
(165.2 dense in bfloat16, https://waredb.com/processor/nvidia-geforce-rtx-4090); the server is an H200 (989 dense, 141
GB, https://itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html). The link is the *fixed* one of
`budgets.devices`, the world's mean. Client 2 is the same device in all settings.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.experiments.work import whole_flops
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.budgets.devices import DEVICES, GPU_UTILISATION
from hsplit_flwr.planning.costs.model_costs import ModelCosts


@dataclass(frozen=True)
class Size:
    """How large a model is for those who train it."""

    head_bytes: float
    """memory of the deepest head, rank 16 everywhere"""
    step_flops: float
    """FLOPs of a step of the whole model, rank 16 everywhere"""
    step_bytes_up: float
    """with activations in bfloat16 on the wire"""

    @classmethod
    def of(cls, costs: ModelCosts) -> "Size":
        """Size of the model under the workload of `costs`."""
        deepest = costs.num_blocks - 1
        ranks = {matrix.name: 16 for matrix in costs.matrices}
        bf16 = replace(costs.workload, activation_codec="bf16")
        bytes_up = frame_bytes.step_bytes_up(bf16, costs.hidden_size)
        return cls(costs.head_memory(deepest, ranks).total_bytes, whole_flops(costs, ranks), bytes_up)


# transformers' default Llama is LLaMA-2-7B; tests/test_settings.py computes it again:
#   python -c "from transformers import LlamaConfig
#   from hsplit_flwr.planning.costs.model_costs import ModelCosts, Workload
#   from hsplit_flwr.experiments.settings import Size
#   wire = {'activation_codec': 'bf16', 'gradient_codec': 'bf16'}
#   print(Size.of(ModelCosts(LlamaConfig(), Workload(4, 128, dtype='bf16', **wire))))"
LLAMA_2_7B = Size(head_bytes=18_888_951_045, step_flops=13_722_621_837_312, step_bytes_up=4_197_360)


@dataclass(frozen=True)
class Setting:
    """Clients "0", "1", ... and a server; of five kinds, from the least to the most capable, where they differ."""

    clients: Mapping[str, Budget]
    """for LLaMA-2-7B"""
    ranks: Mapping[str, int]
    """client -> the LoRA rank of a rival with unequal ranks (HetLoRA, FLoRA, FlexLoRA) that trains the whole model"""
    away: float = 0.0
    """probability that a client is not there in a round"""
    fraction: float = 1.0
    """share of the clients that a round takes, drawn anew in each"""
    cut_eighths: Mapping[str, int] | None = None
    """client -> its cut, in eighths of the model, whatever a planner would choose; None: nobody states cuts"""

    def cuts(self, num_blocks: int) -> dict[str, int]:
        """Every client's stated cut of a model with so many blocks; none where they are not stated."""
        eighths = (self.cut_eighths or {}).items()
        return {client: min(num_blocks - 1, max(1, round(num_blocks * part / 8))) for client, part in eighths}

    def devices(self, costs: ModelCosts) -> dict[str, Budget]:
        """Every client's device, scaled to the model and workload of `costs`."""
        size = Size.of(costs)
        return {client: _scaled(budget, size) for client, budget in self.clients.items()}

    def server(self, costs: ModelCosts) -> Budget:
        """The server, scaled in the same way."""
        return _scaled(SERVER, Size.of(costs))

    def present(self, seed: int, round_number: int) -> tuple[str, ...]:
        """The clients that are there in a round, in order; it depends on the arguments and the setting alone.

        Each is drawn by (seed, round, client). If all were away, the one with the highest draw stays; where a round
        takes a `fraction`, those with the highest draws, rounded down as Flower's strategies do.
        """
        draws = {
            client: random.Random(derive_seed(seed, "present", round_number, client)).random()
            for client in self.clients
        }
        first, *others = sorted(draws, key=draws.__getitem__, reverse=True)[: max(1, int(len(draws) * self.fraction))]
        stay = {first, *(client for client in others if draws[client] >= self.away)}
        return tuple(client for client in draws if client in stay)


def _scaled(budget: Budget, size: Size) -> Budget:
    return budget.scaled(
        memory=size.head_bytes / LLAMA_2_7B.head_bytes,
        compute=size.step_flops / LLAMA_2_7B.step_flops,
        link=size.step_bytes_up / LLAMA_2_7B.step_bytes_up,
    )


def _device(memory_gb: float, tflops: float, link: float = 1.0) -> Budget:
    """`link`: times the link of `budgets.devices`' fixed devices."""
    fixed = DEVICES["laptop-gpu"]
    return Budget(
        memory_bytes=int(memory_gb * 1e9),
        flops_per_s=tflops * 1e12,
        uplink_bytes_per_s=fixed.uplink_bytes_per_s * link,
        downlink_bytes_per_s=fixed.downlink_bytes_per_s * link,
        latency_s=fixed.latency_s,
    )


SERVER = replace(DEVICES["datacenter-gpu"], memory_bytes=134_000_000_000, flops_per_s=GPU_UTILISATION * 989e12)
_MEMORY_GB = (5, 8, 12, 16, 20)
_UNEQUAL_RANKS = (2, 4, 8, 12, 16)
_HETEROGENEOUS = Setting(
    clients={str(client): _device(memory, 16 * 2 ** (client / 2 - 1)) for client, memory in enumerate(_MEMORY_GB)},
    ranks={str(client): rank for client, rank in enumerate(_UNEQUAL_RANKS)},
)
SETTINGS: Mapping[str, Setting] = {
    "homogeneous": Setting(
        clients={str(client): _device(12, 16) for client in range(5)},
        ranks={str(client): 8 for client in range(5)},
    ),
    "heterogeneous": _HETEROGENEOUS,
    "highly_heterogeneous": Setting(
        clients={
            str(client): _device(memory, 16 * 2.0 ** (client - 2), link=2.0 ** (client - 2))
            for client, memory in enumerate(_MEMORY_GB)
        },
        ranks={str(client): rank for client, rank in enumerate(_UNEQUAL_RANKS)},
        away=0.3,
    ),
    "deep_heads": replace(_HETEROGENEOUS, cut_eighths={str(c): cut for c, cut in enumerate((1, 3, 4, 6, 7))}),
    "flowertune": replace(
        _HETEROGENEOUS,
        clients={str(client): _HETEROGENEOUS.clients[str(client % 5)] for client in range(20)},
        ranks={str(client): _HETEROGENEOUS.ranks[str(client % 5)] for client in range(20)},
        fraction=0.2,
    ),
}
"""settings by name

====================  ================  ===================  ==============  =================  =============
setting               memory, GB        compute, TFLOP/s     uplink, Mbit/s  downlink, Mbit/s   away
====================  ================  ===================  ==============  =================  =============
homogeneous           12                16                   60              110                never
heterogeneous         5, 8, 12, 16, 20  8, 11, 16, 23, 32    60              110                never
highly_heterogeneous  5, 8, 12, 16, 20  4, 8, 16, 32, 64     15 to 241 (x2)  28 to 441 (x2)     0.3 of rounds
deep_heads            5, 8, 12, 16, 20  8, 11, 16, 23, 32    60              110                never
====================  ================  ===================  ==============  =================  =============

``flowertune``: four of each of ``heterogeneous``, of whom a round takes a fifth, as FlowerTune's benchmark does.
In ``deep_heads`` methods with a planner have stated cuts instead, 1, 3, 4, 6 and 7 of 8 blocks, at one rank.
"""
