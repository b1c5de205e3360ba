"""A client: its part of the data, or its node's own, and the head that its plan gives it. On Flower's Message API."""

from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp

from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.client_settings import count_clients, get, hosted_clients, read_fleet
from hsplit_flwr.flower.finetune.data import client_data, model_name
from hsplit_flwr.flower.message_client import client_app


def finetune_client(folder: Path) -> ClientApp:
    """The ClientApp of the app in `folder`, where its profile file may lie."""
    return client_app(partial(_node, folder))


def _node(folder: Path, context: Context) -> ClientNode:
    """The clients that this SuperNode hosts."""
    run_config, node_config = context.run_config, context.node_config
    num_clients = count_clients(run_config, node_config, folder)
    hosted = hosted_clients(node_config, num_clients)
    sharing = hosted if get(node_config, "data", "") else [str(client) for client in range(num_clients)]
    fleet = read_fleet(run_config, folder)
    return ClientNode(
        model_name(run_config),
        lambda client: client_data(client, run_config, node_config, sharing),
        context,
        client_ids=hosted,
        dtype=get(run_config, "dtype", "fp32"),
        quantization=get(run_config, "quantization", "none"),
        attn_implementation=get(run_config, "attn-implementation", "auto"),
        budgets=fleet.budget if fleet else None,
    )
