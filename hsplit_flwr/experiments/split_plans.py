"""Cuts and ranks of the methods that split the model."""

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.methods import Method
from hsplit_flwr.experiments.task import LARGEST_RANK, LORA_ALPHA, RANK, RANKS, SCALING, Task
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.importance_history import ImportanceHistory
from hsplit_flwr.planning.planner import PlannerConfig
from hsplit_flwr.planning.plans import Plans
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.training.config import ClientPlan
from hsplit_flwr.training.workload import Workload


class _NoHistory(ImportanceHistory):
    """Forgets what it is told: every matrix stays equally important."""

    def update(self, profile: Mapping[str, float]) -> None:
        """Nothing."""


class _ShuffledHistory(ImportanceHistory):
    """Takes every matrix's importance for another's, always the same one's: as unequal, of the wrong ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def update(self, profile: Mapping[str, float]) -> None:
        """Learn `profile`, shuffled."""
        names = sorted(profile)
        others = random.Random(derive_seed(self._seed, "shuffled importance")).sample(names, len(names))
        super().update({name: profile[other] for name, other in zip(names, others, strict=True)})


class UnweightedPlanning(AdaptivePlanning):
    """The planner as if every matrix were equally important."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.history = _NoHistory()


class OneScalingPlanning(AdaptivePlanning):
    """The planner with one scaling alpha / r for all ranks, instead of one alpha."""

    def lora(self, ranks: Mapping[str, int]) -> LoraSpec:
        """See `AdaptivePlanning`."""
        return LoraSpec.of_scaling(ranks, SCALING)


class SplitPlans(NamedTuple):
    """What a `RoundServer` is given to plan by."""

    plans: Plans
    tail_lora: LoraSpec | None = None
    """the tail's adapters where plans are configured"""
    workload: Workload | None = None
    """largest batches where plans are configured"""


def plans_of(task: Task, method: Method) -> SplitPlans:
    """The plans of `method` under `task`; cuts that the setting states are taken, and a cut or rank that the
    run's spec states goes for all clients.

    Raises:
        ConfigError: a device that cannot hold any head, or a stated cut below the setting's floor.
    """
    spec = task.spec
    if 0 < spec.cut < task.min_cut:
        raise ConfigError(
            f"Expected cut >= {task.min_cut}, the blocks that every head holds at least in the setting "
            f"{spec.setting!r}, found {spec.cut}. Raise it, or choose another setting."
        )
    cuts = task.setting.cuts(task.costs.num_blocks)
    if (method.planned or method.frozen_heads) and cuts and not spec.cut:
        adapters = LoraSpec(spec.rank or LARGEST_RANK, LORA_ALPHA)
        heads = LoraSpec(0) if method.frozen_heads else adapters
        stated = {client: ClientPlan(cut, heads) for client, cut in cuts.items()}
        return SplitPlans(stated, adapters, task.costs.workload)
    if method.planned and not (spec.cut or spec.rank):
        return SplitPlans(_planning(task, method))
    plan, tail = _one_plan(task, method)
    return SplitPlans(plan, tail, task.costs.workload)


def _planning(task: Task, method: Method) -> AdaptivePlanning:
    """The planner, but for what `method` leaves out of it."""
    planning = AdaptivePlanning if method.one_alpha else OneScalingPlanning
    if method.importance == "none":
        planning = UnweightedPlanning
    config = planner_config(method, task.min_cut, task.round_weight)
    made = planning(task.costs, task.server, config, lora_alpha=LORA_ALPHA)
    if method.importance == "shuffled":
        made.history = _ShuffledHistory(task.spec.seed)
    return made


def planner_config(method: Method, min_cut: int, round_weight: float) -> PlannerConfig:
    """What the planner of `method` chooses from; but for what is stated here it is the library's default.

    Codec, micro-batches and all else of a step it knows from the costs' workload.
    """
    config = PlannerConfig(
        RANKS,
        tail_rank=LARGEST_RANK,
        update=UpdateCoding(method.update_codec, method.update_rank),
        min_cut=min_cut,
        round_weight=round_weight,
        frozen_heads=method.auto_heads,
    )
    return replace(config, tail_worth=0.0, deadline_s=math.inf) if method.deep_heads else config


def _one_plan(task: Task, method: Method) -> tuple[ClientPlan, LoraSpec]:
    """The plan of every client, and the tail's adapters."""
    spec, costs, devices, least = task.spec, task.costs, task.devices, task.min_cut
    rank = spec.rank or (LARGEST_RANK if method.largest_rank else common_rank(costs, devices, least))
    adapters = LoraSpec(rank, LORA_ALPHA)
    if method.frozen_heads:
        return ClientPlan(spec.cut or least, LoraSpec(0)), adapters
    if method.tail_16:
        return ClientPlan(spec.cut or least, adapters), LoraSpec(LARGEST_RANK, LORA_ALPHA)
    return ClientPlan(spec.cut or common_cut(costs, devices, rank, least), adapters), adapters


def common_rank(costs: ModelCosts, devices: Mapping[str, Budget], least: int = 1) -> int:
    """`RANK`, or the largest candidate below it at which every device holds a head of the `least` cut.

    Raises:
        ConfigError: there is none.
    """
    for rank in sorted((rank for rank in RANKS if rank <= RANK), reverse=True):
        if _fits(costs, devices, least, rank):
            return rank
    raise ConfigError("Expected devices that all hold the smallest head, found one that does not. Raise its memory.")


def common_cut(costs: ModelCosts, devices: Mapping[str, Budget], rank: int, least: int = 1) -> int:
    """The deepest cut at which every device holds its head with `rank` everywhere; the `least` where there is none."""
    return max((cut for cut in range(least, costs.num_blocks) if _fits(costs, devices, cut, rank)), default=least)


def _fits(costs: ModelCosts, devices: Mapping[str, Budget], cut: int, rank: int) -> bool:
    needed = costs.head_memory(cut, {m.name: rank for m in costs.matrices if m.block < cut}).total_bytes
    return needed <= min(device.memory_bytes for device in devices.values())
