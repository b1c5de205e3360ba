"""The quickstart's client with a fault inside its data, where a real one would hit: in the middle of a round."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from flwr.app import Context
from flwr.client import Client
from flwr.clientapp import ClientApp
from quickstart.task import MODEL, client_data

from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.flower.client import HSplitLoRAClient
from hsplit_flwr.flower.client_settings import RunConfig, get, hosted_clients, integers
from hsplit_flwr.training.batch import Batch

FAULT_STEP = 1


def faulty(batches: Iterable[Batch], client: str, fault: str, stall_s: float) -> Iterator[Batch]:
    """`batches` with `fault` before batch `FAULT_STEP`."""
    for step, batch in enumerate(batches):
        if step == FAULT_STEP:
            if fault == "raise":
                raise RuntimeError(f"client {client} was told to raise")
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(stall_s)
        yield batch


def faulty_data(client: str, num_clients: int, run_config: RunConfig) -> ClientData:
    """The quickstart's data, with the fault of this client in round 1."""
    data = client_data(client, num_clients, run_config)
    faults = dict(pair.split(":") for pair in get(run_config, "faults", "").split())
    if client not in faults:
        return data
    fault, stall_s = faults[client], get(run_config, "stall-s", 60.0)

    def train(first_step: int) -> Iterable[Batch]:
        batches = data.training_batches(first_step)
        return faulty(batches, client, fault, stall_s) if first_step == 0 else batches

    return replace(data, train=train)


def client_fn(context: Context) -> Client:
    """The clients that this SuperNode hosts."""
    num_clients = len(integers(context.run_config, "cuts"))
    return HSplitLoRAClient(
        MODEL,
        lambda client: faulty_data(client, num_clients, context.run_config),
        context,
        client_ids=hosted_clients(context.node_config, num_clients),
    ).to_client()


app = ClientApp(client_fn=client_fn)
