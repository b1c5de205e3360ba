"""The clients: each trains on its part of the data, or on the file that its node names."""

from pathlib import Path

from hsplit_flwr.flower.finetune.client import finetune_client

app = finetune_client(Path(__file__).parent)
