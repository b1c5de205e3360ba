"""The app `simulations/finetune` in this process: its folder is put where Flower puts it, on the module path."""

import sys
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from hsplit_flwr.common.toml_file import read_toml

APP = Path(__file__).resolve().parents[2] / "simulations" / "finetune"
if str(APP) not in sys.path:
    sys.path.insert(0, str(APP))

from finetune import server_app, task  # noqa: E402

__all__ = ["APP", "app_config", "context", "server_side", "task"]

server_side = server_app.server_side


def app_config() -> dict[str, Any]:
    """The run config that the app's pyproject.toml gives."""
    config: dict[str, Any] = read_toml(APP / "pyproject.toml", "an app")["tool"]["flwr"]["app"]["config"]
    return dict(config)


def context(config: dict[str, Any], node_config: dict[str, Any], state: RecordDict) -> Context:
    """A node's context in a run of `config`."""
    return Context(1, 1, node_config, state, config)
