"""A client: its part of the data, its budget and the head that its plan gives it."""

from flwr.app import Context
from flwr.client import Client
from flwr.clientapp import ClientApp

from hsplit_flwr.flower.client import HSplitLoRAClient
from hsplit_flwr.flower.client_settings import count_clients, get, hosted_clients, read_fleet
from quickstart.task import FOLDER, MODEL, client_data


def client_fn(context: Context) -> Client:
    """The clients that this SuperNode hosts."""
    num_clients = count_clients(context.run_config, context.node_config, FOLDER)
    fleet = read_fleet(context.run_config, FOLDER)
    return HSplitLoRAClient(
        MODEL,
        lambda client: client_data(client, num_clients, context.run_config),
        context,
        client_ids=hosted_clients(context.node_config, num_clients),
        dtype=get(context.run_config, "dtype", "fp32"),
        quantization=get(context.run_config, "quantization", "none"),
        attn_implementation=get(context.run_config, "attn-implementation", "auto"),
        budgets=fleet.budget if fleet else None,
    ).to_client()


app = ClientApp(client_fn=client_fn)
