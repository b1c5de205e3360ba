"""A client: its part of E2E NLG, its budget and the head that its plan gives it. On Flower's Message API."""

from flwr.app import Context

from e2e_nlg.task import FOLDER, client_data, model_name
from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.client_settings import count_clients, get, hosted_clients, read_fleet
from hsplit_flwr.flower.message_client import client_app


def node(context: Context) -> ClientNode:
    """The clients that this SuperNode hosts."""
    run_config = context.run_config
    num_clients = count_clients(run_config, context.node_config, FOLDER)
    fleet = read_fleet(run_config, FOLDER)
    return ClientNode(
        model_name(run_config),
        lambda client: client_data(client, num_clients, run_config),
        context,
        client_ids=hosted_clients(context.node_config, num_clients),
        dtype=get(run_config, "dtype", "fp32"),
        quantization=get(run_config, "quantization", "none"),
        attn_implementation=get(run_config, "attn-implementation", "auto"),
        budgets=fleet.budget if fleet else None,
    )


app = client_app(node)
