"""The devices of the experiments: clients and a server, stated for LLaMA-2-7B, scaled to the model at hand.

They are stated as people know them from 7B models: 32 blocks in bfloat16, batches of 4 x 128 tokens, activations in
bfloat16 on the wire. For another model and workload every device has

    memory    x  memory of the deepest head (L-1 blocks, rank 16 everywhere) / that of LLaMA-2-7B
    compute   x  FLOPs of a step of the whole model (rank 16 everywhere)     / that of LLaMA-2-7B
    link      x  bytes that a step sends up in bfloat16                      / that of LLaMA-2-7B

and the same latency. So a head of a given share of the model takes about the same share of a device, and a step's
compute and transfer take the seconds that they take for LLaMA-2-7B. A device is the same for every method: it is scaled
by plain batches, whatever codec or parts a method has.

What a client exchanges once a round, adapters up and their update down, is of another size against a step's activations
in a smaller model: all adapters of LLaMA-2-7B are 38 steps' activations, those of the embedded model 10. So clock and
planner count these bytes `round_weight` times, which makes them the same again for a head of a given share: 3.7 times
in the embedded model, 0.87 times in SmolLM2-135M. Two things stay smaller than they would be there. A matrix travels
whole where that is less than the factors of all clients, which in a small model comes early: of the embedded model an
exact update of five clients is 0.9 of what it would be, one of twenty 0.23; one of an `update_rank` is as it would be.
And the whole weights of `ft`, which are the heavier against adapters the larger a model is, count as often as adapters:
that flatters `ft`.

The smallest device of five affords 0.26 of the deepest head: all that SmolLM2-135M needs for 1 block, and the embedded
model with batches of at least 192 tokens (4 x 48); with smaller ones the planner leaves that client out.

The numbers are *assumed*, not those of the paper (arXiv:2505.02795, whose exact devices are not public text to us):
compute is sustained, 0.4 of the peak as in `budgets.devices`. The fastest client, 64 TFLOP/s, is a GeForce RTX 4090
(165.2 dense in bfloat16, https://waredb.com/processor/nvidia-geforce-rtx-4090), which is also the small server, with 22
of its 24 GB; the large one is an H200 (989 dense, 141 GB, https://itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-
cores.html). The link is the *fixed* one of `budgets.devices`, the world's mean, and that of phones the *mobile* one.
A phone's GPU reaches about 1.5 TFLOP/s in forward passes (121 tokens/s of ChatGLM2-6B's prompts, 2 x 6.2e9 FLOPs each,
https://arxiv.org/abs/2403.20041); a fifth of it, 0.3 TFLOP/s, is *assumed* for training under sustained load, where an
iPhone 16 Pro loses nearly half of its throughput within minutes and a Galaxy S24 Ultra lowers its GPU's clock until
inference ends (https://arxiv.org/abs/2603.23640). Of a phone with 12 GB or more 6 GB are *assumed*, as one with 8 GB
kills apps that reach 4 to 5 (see `budgets.devices`). Client 2 of the first four settings is one and the same device.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.experiments.work import whole_flops
from hsplit_flwr.lora.factors import FLOAT32_BYTES
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.budgets.devices import DEVICES, GPU_UTILISATION
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.workload import Workload


@dataclass(frozen=True)
class Size:
    """How large a model is for those who train it."""

    head_bytes: float
    """memory of the deepest head, rank 16 everywhere"""
    step_flops: float
    """FLOPs of a step of the whole model, rank 16 everywhere"""
    step_bytes_up: float
    """with activations in bfloat16 on the wire"""
    adapter_bytes: float
    """of all adapters, rank 16 everywhere, in float32"""

    @classmethod
    def of(cls, costs: ModelCosts) -> "Size":
        """Size of the model under the batches of `costs`, whatever way they travel."""
        costs = plain(costs)
        ranks = {matrix.name: 16 for matrix in costs.matrices}
        return cls(
            head_bytes=costs.head_memory(costs.num_blocks - 1, ranks).total_bytes,
            step_flops=whole_flops(costs, ranks),
            step_bytes_up=costs.step_bytes_up,
            adapter_bytes=sum(FLOAT32_BYTES * 16.0 * matrix.sides for matrix in costs.matrices),
        )


def plain(costs: ModelCosts) -> ModelCosts:
    """The costs of the same batches, whole and in bfloat16 on the wire."""
    training = TrainingConfig(local_steps=costs.workload.local_steps, activation_codec="bf16", gradient_codec="bf16")
    load = costs.workload
    sizes = {"batch_size": load.batch_size, "sequence_length": load.sequence_length, "dtype": load.dtype}
    return costs.under(Workload.of(training, **sizes))  # type: ignore[arg-type]


# transformers' default Llama is LLaMA-2-7B; tests/experiments/test_settings.py computes it again:
#   python -c "from transformers import LlamaConfig
#   from hsplit_flwr.planning.costs.model_costs import ModelCosts, Workload
#   from hsplit_flwr.experiments.settings import Size
#   wire = {'activation_codec': 'bf16', 'gradient_codec': 'bf16'}
#   print(Size.of(ModelCosts(LlamaConfig(), Workload(4, 128, dtype='bf16', **wire))))"
LLAMA_2_7B = Size(
    head_bytes=18_888_951_045, step_flops=13_722_621_837_312, step_bytes_up=4_197_360, adapter_bytes=159_907_840
)


def round_weight(costs: ModelCosts) -> float:
    """How often what a client exchanges once a round counts, to weigh as in LLaMA-2-7B against a step's activations."""
    size = Size.of(costs)
    return LLAMA_2_7B.adapter_bytes / LLAMA_2_7B.step_bytes_up / (size.adapter_bytes / size.step_bytes_up)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Clients "0", "1", ... and a server; of five kinds, from the least to the most capable, where they differ."""

    clients: Mapping[str, Budget]
    """for LLaMA-2-7B"""
    server_device: Budget
    """for LLaMA-2-7B"""
    ranks: Mapping[str, int]
    """client -> the LoRA rank of a rival with unequal ranks (HetLoRA, FLoRA, FlexLoRA) that trains the whole model"""
    away: float = 0.0
    """probability that a client is not there in a round"""
    fraction: float = 1.0
    """share of the clients that a round takes, drawn anew in each"""
    cut_eighths: Mapping[str, int] | None = None
    """client -> its cut, in eighths of the model, whatever a planner would choose; None: nobody states cuts"""
    floor: float = 0.0
    """share of the blocks that every head holds at least"""
    filled_at: Mapping[str, int] | None = None
    """client -> the rank at which the smallest head that it may hold fills its memory, of any model; None: memory is
    scaled"""

    def min_cut(self, num_blocks: int) -> int:
        """Blocks that every head of a model with so many holds at least."""
        return max(1, math.ceil(num_blocks * self.floor))

    def cuts(self, num_blocks: int) -> dict[str, int]:
        """Every client's stated cut of a model with so many blocks; none where they are not stated."""
        eighths = (self.cut_eighths or {}).items()
        return {client: min(num_blocks - 1, max(1, round(num_blocks * part / 8))) for client, part in eighths}

    def devices(self, costs: ModelCosts) -> dict[str, Budget]:
        """Every client's device, scaled to the model and workload of `costs`."""
        size = Size.of(costs)
        devices = {client: _scaled(budget, size) for client, budget in self.clients.items()}
        for client, rank in (self.filled_at or {}).items():
            least = plain(costs).head_memory(cut := self.min_cut(costs.num_blocks), _uniform(costs, cut, rank))
            devices[client] = replace(devices[client], memory_bytes=math.ceil(least.total_bytes))
        return devices

    def server(self, costs: ModelCosts) -> Budget:
        """The server, scaled in the same way."""
        return _scaled(self.server_device, Size.of(costs))

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


def _uniform(costs: ModelCosts, cut: int, rank: int) -> dict[str, int]:
    return {matrix.name: rank for matrix in costs.matrices if matrix.block < cut}


def _scaled(budget: Budget, size: Size) -> Budget:
    return budget.scaled(
        memory=size.head_bytes / LLAMA_2_7B.head_bytes,
        compute=size.step_flops / LLAMA_2_7B.step_flops,
        link=size.step_bytes_up / LLAMA_2_7B.step_bytes_up,
    )


def _device(memory_gb: float, tflops: float, link: float = 1.0, of: str = "laptop-gpu") -> Budget:
    """`link`: times that of the device `of` of `budgets.devices`."""
    fixed = DEVICES[of]
    return Budget(
        memory_bytes=int(memory_gb * 1e9),
        flops_per_s=tflops * 1e12,
        uplink_bytes_per_s=fixed.uplink_bytes_per_s * link,
        downlink_bytes_per_s=fixed.downlink_bytes_per_s * link,
        latency_s=fixed.latency_s,
    )


def _five(memory_gb: Sequence[float]) -> dict[str, Budget]:
    """Five clients of 8 to 32 TFLOP/s."""
    return {str(client): _device(memory, 16 * 2 ** (client / 2 - 1)) for client, memory in enumerate(memory_gb)}


def _many(setting: "Setting", count: int) -> "Setting":
    """`count` clients, as many of each of the five kinds of `setting`."""
    kinds, ranks = list(setting.clients.values()), list(setting.ranks.values())
    return replace(
        setting,
        clients={str(client): kinds[client % len(kinds)] for client in range(count)},
        ranks={str(client): ranks[client % len(ranks)] for client in range(count)},
    )


H200 = replace(DEVICES["datacenter-gpu"], memory_bytes=134_000_000_000, flops_per_s=GPU_UTILISATION * 989e12)
RTX_4090 = replace(DEVICES["workstation"], flops_per_s=GPU_UTILISATION * 165.2e12)
_MEMORY_GB = (5, 8, 12, 16, 20)
_UNEQUAL_RANKS = {str(client): rank for client, rank in enumerate((2, 4, 8, 12, 16))}
_EQUAL_RANKS = dict.fromkeys(_UNEQUAL_RANKS, 8)
_HETEROGENEOUS = Setting(clients=_five(_MEMORY_GB), server_device=H200, ranks=_UNEQUAL_RANKS)
SETTINGS: Mapping[str, Setting] = {
    "homogeneous": Setting(
        clients={str(client): _device(12, 16) for client in range(5)}, server_device=H200, ranks=_EQUAL_RANKS
    ),
    "heterogeneous": _HETEROGENEOUS,
    "highly_heterogeneous": Setting(
        clients={
            str(client): _device(memory, 16 * 2.0 ** (client - 2), link=2.0 ** (client - 2))
            for client, memory in enumerate(_MEMORY_GB)
        },
        server_device=H200,
        ranks=_UNEQUAL_RANKS,
        away=0.3,
    ),
    "deep_heads": replace(_HETEROGENEOUS, cut_eighths={str(c): cut for c, cut in enumerate((1, 3, 4, 6, 7))}),
    "small_server": replace(_HETEROGENEOUS, server_device=RTX_4090),
    "many_clients": _many(_HETEROGENEOUS, 50),
    "twenty_clients": _many(_HETEROGENEOUS, 20),
    "privacy_floor": replace(_HETEROGENEOUS, clients=_five((8, 10, 12, 16, 20)), floor=0.25),
    "tight_memory": replace(
        _HETEROGENEOUS, clients=_five((5.13, 5.15, 5.19, 5.23, 5.27)), floor=0.25, filled_at=_UNEQUAL_RANKS
    ),
    "phones": Setting(
        clients={str(client): _device(6, 0.3, of="phone") for client in range(5)},
        server_device=H200,
        ranks=_EQUAL_RANKS,
    ),
    "flowertune": replace(_many(_HETEROGENEOUS, 20), fraction=0.2),
}
"""settings by name

====================  =======  ==================  ==============  =================  =================  =============
setting               clients  memory, GB          compute,        uplink, Mbit/s     downlink, Mbit/s   server
                                                   TFLOP/s
====================  =======  ==================  ==============  =================  =================  =============
homogeneous           5        12                  16              60                 110                H200
heterogeneous         5        5, 8, 12, 16, 20    8 to 32         60                 110                H200
highly_heterogeneous  5        5, 8, 12, 16, 20    4 to 64         15 to 241          28 to 441          H200
deep_heads            5        5, 8, 12, 16, 20    8 to 32         60                 110                H200
small_server          5        5, 8, 12, 16, 20    8 to 32         60                 110                RTX 4090
many_clients          50       5, 8, 12, 16, 20    8 to 32         60                 110                H200
twenty_clients        20       5, 8, 12, 16, 20    8 to 32         60                 110                H200
privacy_floor         5        8, 10, 12, 16, 20   8 to 32         60                 110                H200
tight_memory          5        5.13 to 5.27        8 to 32         60                 110                H200
phones                5        6                   0.3             13                 57                 H200
flowertune            20       5, 8, 12, 16, 20    8 to 32         60                 110                H200
====================  =======  ==================  ==============  =================  =================  =============

The five kinds' compute is 8, 11, 16, 23, 32 (factors of the root of 2) or 4, 8, 16, 32, 64 TFLOP/s.

* ``highly_heterogeneous``: everybody is away in 0.3 of the rounds.
* ``deep_heads``: methods with a planner have stated cuts, 1, 3, 4, 6 and 7 of 8 blocks, at one rank. Frozen heads are
  as deep there, and elsewhere as the floor.
* ``many_clients``, ``twenty_clients``: ten and four of each kind. The embedded restaurants carry twenty: each has 80 of
  the 1,600 examples (IID), 21 at least (Dirichlet 0.3, seeds 0 to 4). Of fifty some would have the eight that the
  partition asks for at least, two batches, and a run would take ten times as long; fifty are for larger data.
* ``privacy_floor``: every head holds a quarter of the blocks at least; so do the heads of rivals.
* ``tight_memory``: the same floor, and memory that its head fills at rank 2, 4, 8, 12 and 16 everywhere, of any model.
  Between rank 1 and 16 lie 3 % of LLaMA-2-7B's head and 4.5 % of the embedded model's, as ranks are that cheap beside
  frozen weights. In memory that is stated once and scaled, ranks bind on one of the two at best, and without a floor a
  planner gives a block back instead.
* ``flowertune``: ``twenty_clients``, of whom a round takes a fifth, as FlowerTune's benchmark does.
"""
