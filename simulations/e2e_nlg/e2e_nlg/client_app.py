"""A client: its part of E2E NLG and the head that its plan gives it."""

from flwr.app import Context
from flwr.client import Client
from flwr.clientapp import ClientApp

from e2e_nlg.task import client_data, model_name
from hsplit_flwr.client import HSplitLoRAClient
from hsplit_flwr.run_config import get, hosted_clients, integers


def client_fn(context: Context) -> Client:
    """The clients that this SuperNode hosts."""
    run_config = context.run_config
    return HSplitLoRAClient(
        model_name(run_config),
        lambda client: client_data(client, run_config),
        context,
        client_ids=hosted_clients(context.node_config, len(integers(run_config, "cuts"))),
        dtype=get(run_config, "dtype", "fp32"),
        root_certificates=get(run_config, "tail-root-certificates", "") or None,
    ).to_client()


app = ClientApp(client_fn=client_fn)
