"""The app `simulations/finetune` in this process: its folder is put where Flower puts it, on the module path."""

import sys
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from hsplit_flwr.common.toml_file import read_toml
from hsplit_flwr.flower.apps import ServerSide
from hsplit_flwr.flower.finetune import server

APP = Path(__file__).resolve().parents[2] / "simulations" / "finetune"
if str(APP) not in sys.path:
    sys.path.insert(0, str(APP))

from finetune import client_app  # noqa: E402

__all__ = ["APP", "app_config", "client_app", "context", "server_side"]


def server_side(config: dict[str, Any]) -> ServerSide:
    """The app's server in a run of `config`."""
    return server.server_side("simulations/finetune", APP / "finetune", config)


def app_config() -> dict[str, Any]:
    """The run config that the app's pyproject.toml gives."""
    config: dict[str, Any] = read_toml(APP / "pyproject.toml", "an app")["tool"]["flwr"]["app"]["config"]
    return dict(config)


def context(config: dict[str, Any], node_config: dict[str, Any], state: RecordDict) -> Context:
    """A node's context in a run of `config`."""
    return Context(1, 1, node_config, state, config)
