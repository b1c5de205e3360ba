"""Flower's run config (flat keys of strings and numbers) -> the typed settings of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.federation.round_server import StrategyConfig
from hsplit_flwr.flower.client_settings import RunConfig, get, integers, read_fleet
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.planning.budgets.fleet import Fleet
from hsplit_flwr.planning.planner import PlannerConfig
from hsplit_flwr.planning.replanning import ReplanConfig
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload


@dataclass(frozen=True)
class Settings:
    """All that a Flower app of this package reads from its run config, except its data."""

    training: TrainingConfig
    workload: Workload
    plans: dict[str, ClientPlan] | None
    """configured ones; None: to be planned"""
    tail_lora: LoraSpec
    """where plans are configured"""
    planner: PlannerConfig
    replan: ReplanConfig
    lora_alpha: float
    fleet: Fleet | None
    """budgets by profile; None: clients state or measure their own"""
    strategy: StrategyConfig
    service: ServiceConfig
    limits: BarrierLimits
    server_threads: int
    """torch threads of the server's process; 0: torch's default"""
    output_dir: Path
    adapter_rank: int | None


def read_settings(run_config: RunConfig, folder: Path) -> Settings:
    """The settings that `run_config` describes; keys that are absent take the defaults of the dataclasses.

    Args:
        run_config: Flower's.
        folder: the app's own, where its profile file may lie.

    Raises:
        ConfigError: a value of the wrong type or out of range; the message names the key.
    """
    lora_alpha = get(run_config, "lora-alpha", 16.0)
    targets = get(run_config, "target-modules", "")
    tail_rank = get(run_config, "tail-rank", PlannerConfig.tail_rank)
    training = _training(run_config)
    spec = tuple(targets.split()) if targets else LoraSpec().target_modules
    certificate, key = get(run_config, "tail-certificate", ""), get(run_config, "tail-private-key", "")
    adapter_rank = get(run_config, "adapter-rank", 0)
    return Settings(
        training=training,
        workload=Workload(
            batch_size=get(run_config, "batch-size", 8),
            sequence_length=get(run_config, "max-length", 96),
            local_steps=training.local_steps,
            dtype=get(run_config, "dtype", "fp32"),
            activation_dtype=training.activation_dtype,
            gradient_checkpointing=get(run_config, "gradient-checkpointing", False),
        ),
        plans=_configured_plans(run_config, lora_alpha, targets),
        tail_lora=LoraSpec(tail_rank, lora_alpha, spec) if tail_rank else LoraSpec(0),
        planner=PlannerConfig(
            ranks=tuple(integers(run_config, "candidate-ranks", "2,4,8,16").values()),
            tail_rank=tail_rank,
            tail_worth=get(run_config, "tail-worth", PlannerConfig.tail_worth),
            deadline_s=get(run_config, "deadline-s", 0.0) or None,
        ),
        replan=ReplanConfig(
            drift_threshold=get(run_config, "drift-threshold", ReplanConfig.drift_threshold),
            budget_tolerance=get(run_config, "budget-tolerance", ReplanConfig.budget_tolerance),
        ),
        lora_alpha=lora_alpha,
        fleet=read_fleet(run_config, folder),
        strategy=StrategyConfig(
            rule=get(run_config, "aggregation", "noise_free"),
            min_nodes=get(run_config, "min-nodes", 1),
            fraction_clients=get(run_config, "fraction-clients", 1.0),
            federated_evaluation=get(run_config, "federated-evaluation", True),
            round_limit_s=get(run_config, "round-limit-s", 600.0),
        ),
        service=ServiceConfig(
            bind=get(run_config, "tail-bind", "127.0.0.1:0"),
            advertise=get(run_config, "tail-address", ""),
            max_frame_bytes=get(run_config, "max-frame-mib", 64) << 20,
            certificate=Path(certificate) if certificate else None,
            private_key=Path(key) if key else None,
        ),
        limits=BarrierLimits(
            start_gate_s=get(run_config, "start-gate-s", 60.0),
            straggler_limit_s=get(run_config, "straggler-limit-s", 30.0),
        ),
        server_threads=get(run_config, "server-threads", 0),
        output_dir=Path(get(run_config, "output-dir", "results")).resolve(),
        adapter_rank=adapter_rank or None,
    )


def _training(run_config: RunConfig) -> TrainingConfig:
    default = TrainingConfig()
    return TrainingConfig(
        rounds=get(run_config, "rounds", default.rounds),
        local_steps=get(run_config, "local-steps", default.local_steps),
        learning_rate=get(run_config, "learning-rate", default.learning_rate),
        warmup_steps=get(run_config, "warmup-steps", default.warmup_steps),
        joint_steps=get(run_config, "joint-steps", default.joint_steps),
        tail_passes=get(run_config, "tail-passes", default.tail_passes),
        schedule=get(run_config, "schedule", default.schedule),
        importance_steps=get(run_config, "importance-steps", default.importance_steps),
        importance_rows=get(run_config, "importance-rows", default.importance_rows),
        weight_decay=get(run_config, "weight-decay", default.weight_decay),
        max_grad_norm=get(run_config, "max-grad-norm", default.max_grad_norm),
        activation_dtype=get(run_config, "activation-dtype", default.activation_dtype),
        seed=get(run_config, "seed", default.seed),
    )


def _configured_plans(run_config: RunConfig, lora_alpha: float, targets: str) -> dict[str, ClientPlan] | None:
    if not get(run_config, "cuts", ""):
        return None
    cuts, ranks = integers(run_config, "cuts"), integers(run_config, "ranks")
    return plans_from_table(cuts, ranks, lora_alpha=lora_alpha, target_modules=targets)


def plans_from_table(
    cuts: Mapping[str, int],
    ranks: Mapping[str, int],
    *,
    lora_alpha: float = 16.0,
    target_modules: str = "",
) -> dict[str, ClientPlan]:
    """Plans per client id from two small tables, with one alpha for all."""
    if set(cuts) != set(ranks):
        raise ConfigError(f"Expected cuts and ranks for the same clients, found {sorted(cuts)} and {sorted(ranks)}.")
    targets = tuple(target_modules.split()) if target_modules else "all-linear"
    return {client: ClientPlan(cuts[client], LoraSpec(ranks[client], lora_alpha, targets)) for client in cuts}
