"""Heterogeneous split LoRA fine-tuning of language models as a Flower plugin (HSplitLoRA, arXiv:2505.02795).

The public names are imported on first use: torch, transformers and Flower take seconds that not every process owes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsplit_flwr.budgets.budget import Budget
    from hsplit_flwr.budgets.devices import DEVICES
    from hsplit_flwr.budgets.fleet import Fleet
    from hsplit_flwr.client import ClientData, HSplitLoRAClient
    from hsplit_flwr.costs.model_costs import ModelCosts
    from hsplit_flwr.costs.workload import Workload
    from hsplit_flwr.global_model import GlobalModel
    from hsplit_flwr.lora import LoraSpec
    from hsplit_flwr.model_files import ModelFiles
    from hsplit_flwr.plan import ClientPlan, TrainingConfig
    from hsplit_flwr.planning.planner import PlannerConfig
    from hsplit_flwr.planning.replanning import AdaptivePlanning, ReplanConfig
    from hsplit_flwr.server import server_components
    from hsplit_flwr.strategy import HSplitLoRAStrategy, StrategyConfig
    from hsplit_flwr.tail_service import ServiceConfig

_MODULE_OF = {
    "AdaptivePlanning": "planning.replanning",
    "Budget": "budgets.budget",
    "ClientData": "client",
    "ClientPlan": "plan",
    "DEVICES": "budgets.devices",
    "Fleet": "budgets.fleet",
    "GlobalModel": "global_model",
    "HSplitLoRAClient": "client",
    "HSplitLoRAStrategy": "strategy",
    "LoraSpec": "lora",
    "ModelCosts": "costs.model_costs",
    "ModelFiles": "model_files",
    "PlannerConfig": "planning.planner",
    "ReplanConfig": "planning.replanning",
    "ServiceConfig": "tail_service",
    "StrategyConfig": "strategy",
    "TrainingConfig": "plan",
    "Workload": "costs.workload",
    "server_components": "server",
}

__all__ = [
    "DEVICES",
    "AdaptivePlanning",
    "Budget",
    "ClientData",
    "ClientPlan",
    "Fleet",
    "GlobalModel",
    "HSplitLoRAClient",
    "HSplitLoRAStrategy",
    "LoraSpec",
    "ModelCosts",
    "ModelFiles",
    "PlannerConfig",
    "ReplanConfig",
    "ServiceConfig",
    "StrategyConfig",
    "TrainingConfig",
    "Workload",
    "server_components",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
