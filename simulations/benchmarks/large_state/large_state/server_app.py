"""The server: configured plans, and what each client sent and got, by rounds."""

import json
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.flower.client_settings import get
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig

LONG_S = 400.0
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The rounds that the run config describes."""
    config = context.run_config
    clients, rank = get(config, "clients", 2), get(config, "rank", 1)
    plan = ClientPlan(get(config, "cut", 1), LoraSpec(rank, 2.0 * rank))
    strategy = HSplitLoRAMessageStrategy(
        GlobalModel(ModelFiles.resolve(get(config, "model", "")), torch.bfloat16),
        {str(client): plan for client in range(clients)},
        TrainingConfig(rounds=get(config, "rounds", 3), local_steps=get(config, "local-steps", 2), importance_steps=0),
        service=ServiceConfig(bind="messages://" if config["exchange"] == "messages" else ServiceConfig.bind),
        tail_lora=LoraSpec(1, 2.0),
        config=StrategyConfig(min_nodes=clients, federated_evaluation=False, round_limit_s=LONG_S),
        limits=BarrierLimits(start_gate_s=LONG_S / 4, straggler_limit_s=LONG_S / 4),
    )
    strategy.start(grid)
    rounds = [
        {
            "round": record.round,
            "seconds": dict(record.seconds),
            "failures": list(record.failures),
            "clients": {
                c.client_id: {"up": c.bytes_up, "down": c.bytes_down, "steps": c.steps} for c in record.clients
            },
        }
        for record in strategy.history
    ]
    Path(get(config, "results", ""), "rounds.json").write_text(json.dumps(rounds))
