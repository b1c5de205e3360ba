"""The quickstart's clients, with the faults of the app of that name."""

from faults.client_app import faulty_data
from flwr.app import Context
from quickstart.task import FOLDER, MODEL

from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.client_settings import count_clients, hosted_clients, read_fleet
from hsplit_flwr.flower.message_client import client_app


def node(context: Context) -> ClientNode:
    """The clients that this SuperNode hosts."""
    num_clients = count_clients(context.run_config, context.node_config, FOLDER)
    fleet = read_fleet(context.run_config, FOLDER)
    return ClientNode(
        MODEL,
        lambda client: faulty_data(client, num_clients, context.run_config),
        context,
        client_ids=hosted_clients(context.node_config, num_clients),
        budgets=fleet.budget if fleet else None,
    )


app = client_app(node)
