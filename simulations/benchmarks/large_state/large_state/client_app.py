"""A client with random tokens, which notes how large the Context is that Flower brings it."""

import json
import time
from pathlib import Path

import torch
from flwr.app import Context
from flwr.common.serde import context_to_proto

from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.message_client import client_app

ROWS, WIDTH, VOCABULARY = 1, 16, 1000


def client_data(client: str) -> ClientData:
    """The same batch again and again: what is learnt plays no part."""
    generator = torch.Generator().manual_seed(int(client))
    ids = torch.randint(3, VOCABULARY, (ROWS, WIDTH), generator=generator)
    return ClientData([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 100)


def node(context: Context) -> ClientNode:
    """The one client of this SuperNode; the Context's bytes are noted for each message."""
    client = str(context.node_config["partition-id"])
    note = {"at": time.time(), "client": client, "context_bytes": context_to_proto(context).ByteSize()}
    with Path(str(context.run_config["results"]), f"messages-{client}.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")
    return ClientNode(str(context.run_config["model"]), client_data, context, client_ids=[client], dtype="bf16")


app = client_app(node)
