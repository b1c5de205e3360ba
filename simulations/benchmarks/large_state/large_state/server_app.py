"""The server: configured plans, and what each client sent and got, by rounds."""

import json
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.flower.client_settings import get
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.reports.records import RoundRecord
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig

LONG_S, SMALL_RANK = 400.0, 16
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The rounds that the run config describes."""
    config = context.run_config
    plans = {"0": plan(get(config, "cut", 1), get(config, "rank", 1)), "1": plan(1, SMALL_RANK)}
    strategy = HSplitLoRAMessageStrategy(
        GlobalModel(ModelFiles.resolve(get(config, "model", "")), torch.bfloat16),
        plans,
        TrainingConfig(rounds=get(config, "rounds", 3), local_steps=get(config, "local-steps", 2), importance_steps=0),
        service=ServiceConfig(bind="messages://" if config["exchange"] == "messages" else ServiceConfig.bind),
        tail_lora=LoraSpec(1, 2.0),
        config=StrategyConfig(min_nodes=len(plans), federated_evaluation=False, round_limit_s=LONG_S),
        limits=BarrierLimits(start_gate_s=LONG_S / 4, straggler_limit_s=LONG_S / 4),
    )
    results = Path(get(config, "results", ""), "rounds.json")

    def note(server_round: int, arrays: ArrayRecord) -> None:
        results.write_text(json.dumps(rounds_of(strategy.history)))

    strategy.start(grid, evaluate_fn=note)


def plan(cut: int, rank: int) -> ClientPlan:
    """A client's plan."""
    return ClientPlan(cut, LoraSpec(rank, 2.0 * rank))


def rounds_of(history: list[RoundRecord]) -> list[dict[str, Any]]:
    """What is measured of each round."""
    return [
        {
            "round": record.round,
            "seconds": dict(record.seconds),
            "failures": list(record.failures),
            "clients": {c.client_id: {"down": c.bytes_down, "steps": c.steps} for c in record.clients},
        }
        for record in history
    ]
