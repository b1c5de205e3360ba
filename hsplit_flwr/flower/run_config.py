"""Flower's run config (flat keys of strings and numbers) -> the typed settings of a run."""

from collections.abc import Container
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hsplit_flwr.common.checks import require, require_whole
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tls_files import CLIENT, CLIENT_ROOTS, TAIL, TAIL_ROOTS
from hsplit_flwr.exchange.turns import SCHEME
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.run_output import KEEP_CHECKPOINTS
from hsplit_flwr.flower.client_settings import RunConfig, get, integers, read_fleet
from hsplit_flwr.flower.flower_log import TEXT
from hsplit_flwr.lora.module_choice import from_words
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.planning.budgets.fleet import Fleet
from hsplit_flwr.planning.exchange_choice import AUTO, CHOICES
from hsplit_flwr.planning.planner import PlannerConfig
from hsplit_flwr.planning.replanning import ReplanConfig
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import PLAIN, Workload

EXCHANGES = GRPC, MESSAGES = "grpc", "messages"
"""how steps travel: over a connection of the tail's own, or inside Flower's messages"""
INDECISIVE = frozenset(
    (
        *(
            "output-dir",
            "keep-checkpoints",
            "keep-best",
            "trackers",
            "resume",
            "adapter-rank",
            "server-threads",
            "patience",
        ),
        *("tail-bind", "tail-address", *TAIL, TAIL_ROOTS, CLIENT_ROOTS, *CLIENT, "log-samples"),
        *("min-nodes", "wait-for-nodes-s", "round-limit-s", "start-gate-s", "straggler-limit-s", "step-limit-s"),
        *("exchange", "message-limit-s", "max-frame-mib", "reconnect-grace-s", "metrics-bind", "log-format"),
    )
)
"""keys that a run which is resumed may have otherwise: they say where and how long, not what is computed"""


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
    lora: LoraSpec
    """what gets adapters, and how they scale; the ranks are those of `plans`, or to be planned"""
    fleet: Fleet | None
    """budgets by profile; None: clients state or measure their own"""
    strategy: StrategyConfig
    service: ServiceConfig
    limits: BarrierLimits
    log_format: str
    """of the server's lines and the clients', see `flower_log.py`"""
    metrics_bind: str
    """where metrics and health are served; empty: nowhere"""
    server_threads: int
    """torch threads of the server's process; 0: torch's default"""
    output_dir: Path
    adapter_rank: int | None
    keep_checkpoints: int
    keep_best: bool
    """whether the adapter of the best round so far is written"""
    trackers: tuple[str, ...]
    """where else the run is followed, see `reports.trackers`"""
    log_samples: bool
    """whether held-out prompts and the model's texts for them are logged"""
    resume: str
    """which run to go on with, see `checkpoint.find`; empty: begin one"""


def read_settings(run_config: RunConfig, folder: Path) -> Settings:
    """The settings that `run_config` describes; keys that are absent take the defaults of the dataclasses.

    Args:
        run_config: Flower's.
        folder: the app's own, where its profile file may lie.

    Raises:
        ConfigError: a value of the wrong type or out of range; the message names the key.
    """
    chosen = _chosen(run_config)
    training = TrainingConfig(**of_fields(run_config, TrainingConfig, but=chosen))
    lora = _lora(run_config)
    tail_rank = get(run_config, "tail-rank", PlannerConfig.tail_rank)
    adapter_rank = get(run_config, "adapter-rank", 0)
    if adapter_rank < 0:
        raise ConfigError(f"Expected adapter-rank >= 0 (0: as much as exactness takes), found {adapter_rank}.")
    keep_checkpoints = get(run_config, "keep-checkpoints", KEEP_CHECKPOINTS)
    require_whole("keep_checkpoints", keep_checkpoints, 0)
    chooses_update = run_config.get("update-rank") == AUTO
    stated = ("rule", "update_rank") if chooses_update else ("rule",)
    strategy = StrategyConfig(
        rule=get(run_config, "aggregation", StrategyConfig.rule),
        **of_fields(run_config, StrategyConfig, but=stated),
    )
    workload = _workload(run_config, training, strategy)
    return Settings(
        training=training,
        workload=workload,
        plans=_configured_plans(run_config, lora),
        tail_lora=replace(lora, r=tail_rank) if tail_rank else LoraSpec(0),
        planner=PlannerConfig(
            ranks=tuple(integers(run_config, "candidate-ranks", "2,4,8,16").values()),
            tail_rank=tail_rank,
            tail_worth=_tail_worth(run_config),
            min_cut=get(run_config, "min-cut", PlannerConfig.min_cut),
            frozen_heads=get(run_config, "frozen-heads", PlannerConfig.frozen_heads),
            deadline_s=get(run_config, "deadline-s", 0.0) or None,
            target_modules=lora.target_modules,
            exclude_modules=lora.exclude_modules,
            layers_to_transform=lora.layers_to_transform,
            update=strategy.update_coding if workload.quantization != PLAIN else strategy.update_coding.merged(),
            choose_update=chooses_update,
            choose=chosen,
        ),
        replan=ReplanConfig(**of_fields(run_config, ReplanConfig)),
        lora=lora,
        fleet=read_fleet(run_config, folder),
        strategy=strategy,
        service=_service(run_config),
        limits=BarrierLimits(**of_fields(run_config, BarrierLimits)),
        log_format=get(run_config, "log-format", TEXT),
        metrics_bind=get(run_config, "metrics-bind", ""),
        server_threads=get(run_config, "server-threads", 0),
        output_dir=Path(get(run_config, "output-dir", "results")).resolve(),
        adapter_rank=adapter_rank or None,
        keep_checkpoints=keep_checkpoints,
        keep_best=get(run_config, "keep-best", True),
        trackers=tuple(get(run_config, "trackers", "").split()),
        log_samples=get(run_config, "log-samples", False),
        resume=get(run_config, "resume", ""),
    )


def _workload(run_config: RunConfig, training: TrainingConfig, strategy: StrategyConfig) -> Workload:
    return Workload.of(
        training,
        batch_size=get(run_config, "batch-size", Workload.batch_size),
        sequence_length=get(run_config, "max-length", 96),
        dtype=get(run_config, "dtype", Workload.dtype),
        quantization=get(run_config, "quantization", Workload.quantization),
        delta_rank=strategy.delta_rank,
        attn_implementation=get(run_config, "attn-implementation", Workload.attn_implementation),
        gradient_checkpointing=get(run_config, "gradient-checkpointing", Workload.gradient_checkpointing),
    )


def of_fields(run_config: RunConfig, kind: type, but: Container[str] = ()) -> dict[str, Any]:
    """The fields of the dataclass `kind`, except those in `but`: field ``local_steps`` is the key ``local-steps``.

    Raises:
        ConfigError: a value of another type than the field's default.
    """
    defaults: dict[str, Any] = {field.name: field.default for field in fields(kind) if field.name not in but}
    return {name: get(run_config, name.replace("_", "-"), default) for name, default in defaults.items()}


def _tail_worth(run_config: RunConfig) -> float | None:
    """None: the plan weighs what the tail is worth by the clock."""
    return None if run_config.get("tail-worth", AUTO) == AUTO else get(run_config, "tail-worth", 0.0)


def _chosen(run_config: RunConfig) -> tuple[str, ...]:
    """Fields of `TrainingConfig` that are left to the plan."""
    chosen = tuple(name for name in CHOICES if run_config.get(name.replace("_", "-")) == AUTO)
    keys = [name.replace("_", "-") for name in (*chosen, "update_rank")]
    asked = [key for key in keys if run_config.get(key) == AUTO]
    if asked and get(run_config, "cuts", ""):
        key = asked[0]
        raise ConfigError(
            f"Expected {key} as a value where cuts are configured, found auto: it is chosen from the devices' budgets, "
            "which nobody asks for then. State it, or leave cuts empty."
        )
    return chosen


def _service(run_config: RunConfig) -> ServiceConfig:
    exchange = get(run_config, "exchange", EXCHANGES[0])
    require(exchange in EXCHANGES, "exchange", f"as one of {EXCHANGES}", exchange)
    if exchange == MESSAGES:
        return ServiceConfig(bind=_no_connection(run_config), max_frame_bytes=_frame_bytes(run_config))
    certificate, key, client_roots = (get(run_config, name, "") for name in (*TAIL, CLIENT_ROOTS))
    return ServiceConfig(
        bind=get(run_config, "tail-bind", ServiceConfig.bind),
        advertise=get(run_config, "tail-address", ServiceConfig.advertise),
        max_frame_bytes=_frame_bytes(run_config),
        certificate=Path(certificate) if certificate else None,
        private_key=Path(key) if key else None,
        client_root_certificates=Path(client_roots) if client_roots else None,
    )


def _frame_bytes(run_config: RunConfig) -> int:
    return get(run_config, "max-frame-mib", ServiceConfig.max_frame_bytes >> 20) << 20


def _no_connection(run_config: RunConfig) -> str:
    """Where the tail listens that nobody connects to; settings of a connection are refused: they would protect none."""
    for key in ("tail-address", *TAIL, TAIL_ROOTS, CLIENT_ROOTS, *CLIENT):
        if found := get(run_config, key, ""):
            raise ConfigError(
                f'Expected no {key} with exchange = "{MESSAGES}", found {found!r}: no connection of its own is made, '
                "Flower's messages go over Flower's (secure these). Leave it out."
            )
    return SCHEME


def _lora(run_config: RunConfig) -> LoraSpec:
    """Which layers get adapters, whatever their ranks."""
    excluded = get(run_config, "exclude-modules", "").split()
    blocks = get(run_config, "layers-to-transform", "")
    return LoraSpec(
        lora_alpha=get(run_config, "lora-alpha", LoraSpec.lora_alpha),
        target_modules=from_words(get(run_config, "target-modules", "").split()),
        exclude_modules=from_words(excluded) if excluded else (),
        layers_to_transform=tuple(integers(run_config, "layers-to-transform").values()) if blocks else None,
        use_rslora=get(run_config, "use-rslora", LoraSpec.use_rslora),
    )


def _configured_plans(run_config: RunConfig, lora: LoraSpec) -> dict[str, ClientPlan] | None:
    if not get(run_config, "cuts", ""):
        return None
    cuts, ranks = integers(run_config, "cuts"), integers(run_config, "ranks")
    if set(cuts) != set(ranks):
        raise ConfigError(f"Expected cuts and ranks for the same clients, found {sorted(cuts)} and {sorted(ranks)}.")
    return {client: ClientPlan(cuts[client], replace(lora, r=ranks[client])) for client in cuts}
