"""Heterogeneous split LoRA fine-tuning of language models as a Flower plugin (HSplitLoRA, arXiv:2505.02795).

The public names are imported on first use: torch, transformers and Flower take seconds that not every process owes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsplit_flwr.exchange.grpc_transport import ServiceConfig
    from hsplit_flwr.federation.client_data import ClientData
    from hsplit_flwr.federation.global_model import GlobalModel
    from hsplit_flwr.federation.round_config import StrategyConfig
    from hsplit_flwr.federation.run_output import RunOutput
    from hsplit_flwr.flower.client import HSplitLoRAClient
    from hsplit_flwr.flower.client_node import ClientNode
    from hsplit_flwr.flower.message_client import client_app
    from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
    from hsplit_flwr.flower.server import server_components
    from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
    from hsplit_flwr.lora.from_peft import spec_from_peft
    from hsplit_flwr.lora.spec import LoraSpec
    from hsplit_flwr.models.files import ModelFiles
    from hsplit_flwr.planning.budgets.budget import Budget
    from hsplit_flwr.planning.budgets.devices import DEVICES
    from hsplit_flwr.planning.budgets.fleet import Fleet
    from hsplit_flwr.planning.costs.model_costs import ModelCosts
    from hsplit_flwr.planning.planner import PlannerConfig
    from hsplit_flwr.planning.replanning import AdaptivePlanning, ReplanConfig
    from hsplit_flwr.training.barrier import BarrierLimits
    from hsplit_flwr.training.config import ClientPlan, TrainingConfig
    from hsplit_flwr.training.workload import Workload

_MODULE_OF = {
    "AdaptivePlanning": "planning.replanning",
    "BarrierLimits": "training.barrier",
    "Budget": "planning.budgets.budget",
    "ClientData": "federation.client_data",
    "ClientNode": "flower.client_node",
    "ClientPlan": "training.config",
    "DEVICES": "planning.budgets.devices",
    "Fleet": "planning.budgets.fleet",
    "GlobalModel": "federation.global_model",
    "HSplitLoRAClient": "flower.client",
    "HSplitLoRAMessageStrategy": "flower.message_strategy",
    "HSplitLoRAStrategy": "flower.strategy",
    "LoraSpec": "lora.spec",
    "ModelCosts": "planning.costs.model_costs",
    "ModelFiles": "models.files",
    "PlannerConfig": "planning.planner",
    "ReplanConfig": "planning.replanning",
    "RunOutput": "federation.run_output",
    "ServiceConfig": "exchange.grpc_transport",
    "StrategyConfig": "federation.round_config",
    "TrainingConfig": "training.config",
    "Workload": "training.workload",
    "client_app": "flower.message_client",
    "server_components": "flower.server",
    "spec_from_peft": "lora.from_peft",
}

__all__ = [
    "DEVICES",
    "AdaptivePlanning",
    "BarrierLimits",
    "Budget",
    "ClientData",
    "ClientNode",
    "ClientPlan",
    "Fleet",
    "GlobalModel",
    "HSplitLoRAClient",
    "HSplitLoRAMessageStrategy",
    "HSplitLoRAStrategy",
    "LoraSpec",
    "ModelCosts",
    "ModelFiles",
    "PlannerConfig",
    "ReplanConfig",
    "RunOutput",
    "ServiceConfig",
    "StrategyConfig",
    "TrainingConfig",
    "Workload",
    "client_app",
    "server_components",
    "spec_from_peft",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
