"""Rounds of a federation in one process (`local_federation.py`), one by one, and nodes that misbehave.

`play_round` drives a strategy's hooks with Flower's own `fit_clients`.
"""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.common import FitIns, FitRes, Parameters
from flwr.server import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.server import evaluate_clients, fit_clients
from torch import Tensor

from hsplit_flwr.federation import head_client as client_module
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.flower.local_federation import LocalNode
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.models.quantized import weight_of
from hsplit_flwr.planning.budgets.budget import Budget

TIMEOUT_S = 60.0
EMPTY = Parameters(tensors=[], tensor_type="numpy.ndarray")
Batch = dict[str, Tensor]
Fit = Callable[[FitIns], FitRes]
Fault = Callable[[Fit, FitIns], FitRes]
"""What a bad node makes of a fit: (the honest fit, what it was told) -> what it answers"""


class Node(LocalNode):
    """A node that, with a `fault`, answers a fit in its own way."""

    def __init__(
        self,
        cid: str,
        clients: Sequence[str],
        model: Path,
        data: Callable[[str], ClientData],
        fault: Fault | None = None,
        budgets: Callable[[str, int], Budget] | None = None,
        node_config: dict[str, Any] | None = None,
        quantization: str = "none",
    ) -> None:
        super().__init__(cid, clients, model, data, quantization=quantization, budgets=budgets, node_config=node_config)
        self.fault = fault

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        fault = self.fault
        return self._answer(lambda client: fault(client.fit, ins) if fault else client.fit(ins))


@dataclass
class Played:
    """What went over the wire in one round, and the weights after it."""

    results: dict[str, FitRes]
    """by the node's cid"""
    tail: dict[str, LoraFactors]
    """the tail's adapters when its last step was done"""
    weights: dict[str, Tensor]
    metrics: dict[str, Any]
    federated_loss: float | None
    central: dict[str, Any] = field(default_factory=dict)


def build_one_at_a_time(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Lock what the client module calls `names`, against each other.

    A Flower client has a process of its own; here they are threads, and a model is built on patched modules.
    """
    lock = threading.Lock()

    def locked(build: Callable[..., Any]) -> Callable[..., Any]:
        def one_at_a_time(*args: Any, **options: Any) -> Any:
            with lock:
                return build(*args, **options)

        return one_at_a_time

    for name in names:
        monkeypatch.setattr(client_module, name, locked(getattr(client_module, name)))


def manager_of(*nodes: ClientProxy) -> SimpleClientManager:
    """Flower's client manager with `nodes` connected."""
    manager = SimpleClientManager()
    for node in nodes:
        manager.register(node)
    return manager


def play_round(strategy: HSplitLoRAStrategy, manager: SimpleClientManager, number: int) -> Played:
    """One round as Flower's `Server` plays it, every hook called by keyword."""
    told = strategy.configure_fit(server_round=number, parameters=EMPTY, client_manager=manager)
    results, failures = fit_clients(told, max_workers=8, timeout=TIMEOUT_S, group_id=number)
    tail = strategy.rounds.tail_rounds.tail.adapters.factors()  # gone after aggregate_fit, and the reference needs them
    _, metrics = strategy.aggregate_fit(server_round=number, results=results, failures=failures)
    played = Played({proxy.cid: res for proxy, res in results}, tail, weights_of(strategy), metrics, None)
    central = strategy.evaluate(server_round=number, parameters=EMPTY)
    played.central = central[1] if central else {}
    asked = strategy.configure_evaluate(server_round=number, parameters=EMPTY, client_manager=manager)
    if asked:
        scores, missed = evaluate_clients(asked, max_workers=8, timeout=TIMEOUT_S, group_id=number)
        played.federated_loss, _ = strategy.aggregate_evaluate(server_round=number, results=scores, failures=missed)
    return played


def weights_of(server: RoundServer | HSplitLoRAStrategy) -> dict[str, Tensor]:
    """The global model's weight of every linear layer (see `weight_of`), with what is not merged yet."""
    rounds = server.rounds if isinstance(server, HSplitLoRAStrategy) else server
    layers = rounds.model.segment.linear_modules()
    weights = {name: weight_of(layer).detach().clone() for name, layer in layers.items()}
    for name, factors in rounds.tail_rounds.unmerged().items():
        update = factors.delta()
        weights[name] += update if isinstance(layers[name], torch.nn.Linear) else update.T
    return weights


def random_batches(count: int, seed: int, rows: int = 2, width: int = 10, prompt: int = 3) -> list[Batch]:
    """Right-padded batches (rows, width); the labels of the first `prompt` positions are masked."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        input_ids = torch.randint(3, 97, (rows, width), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, width - 2 :] = 0
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :prompt] = -100
        batches.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    return batches


def comparable(history: list[Any]) -> list[dict[str, Any]]:
    """Everything of a run's rounds but seconds."""
    timeless = json.loads(json.dumps([vars(record) for record in history], default=lambda value: vars(value)))
    for record in timeless:
        record.pop("seconds")
        record.pop("steps")
        for client in record["clients"]:
            client.pop("seconds")
            client.pop("held_s")
    found: list[dict[str, Any]] = timeless
    return found
