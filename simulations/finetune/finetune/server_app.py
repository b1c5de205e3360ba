"""The server: the shared tail, a score after each round, adapter and merged model at the end."""

from pathlib import Path

from hsplit_flwr.flower.finetune.server import finetune_server

app = finetune_server("simulations/finetune", Path(__file__).parent)
