"""Heterogeneous split LoRA fine-tuning of language models as a Flower plugin (HSplitLoRA, arXiv:2505.02795).

The public names are imported on first use: torch, transformers and Flower take seconds that not every process owes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsplit_flwr.client import ClientData, HSplitLoRAClient
    from hsplit_flwr.global_model import GlobalModel
    from hsplit_flwr.lora import LoraSpec
    from hsplit_flwr.model_files import ModelFiles
    from hsplit_flwr.plan import ClientPlan, TrainingConfig
    from hsplit_flwr.server import server_components
    from hsplit_flwr.strategy import HSplitLoRAStrategy, StrategyConfig
    from hsplit_flwr.tail_service import ServiceConfig

_MODULE_OF = {
    "ClientData": "client",
    "ClientPlan": "plan",
    "GlobalModel": "global_model",
    "HSplitLoRAClient": "client",
    "HSplitLoRAStrategy": "strategy",
    "LoraSpec": "lora",
    "ModelFiles": "model_files",
    "ServiceConfig": "tail_service",
    "StrategyConfig": "strategy",
    "TrainingConfig": "plan",
    "server_components": "server",
}

__all__ = [
    "ClientData",
    "ClientPlan",
    "GlobalModel",
    "HSplitLoRAClient",
    "HSplitLoRAStrategy",
    "LoraSpec",
    "ModelFiles",
    "ServiceConfig",
    "StrategyConfig",
    "TrainingConfig",
    "server_components",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
