"""What the clients of a node keep between Flower's messages: their budget, and their copies of the weight delta.

A client is built anew for every message, and Flower keeps ``context.state`` for it. What the link and the processor do
is measured when the server first asks; the memory that is free is looked up again each time, unless the node's config
states it. Losing a copy of the delta costs bytes, not the run: the client says which version it holds, and the tail
sends what is missing.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.federation.trained_head import Shapes
from hsplit_flwr.lora.delta_log import DeltaReplica
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.budgets.probe import Link, own_budget, stated_figures, usable_memory

STATE_KEY = "hsplit-budget"
_log = logging.getLogger("hsplit_flwr")


class KeptBudget:
    """The budget of the clients on this node, in Flower's ``context.state``."""

    def __init__(self, context: Context, device: str) -> None:
        self._context = context
        self._device = device

    def measure(self, link: Callable[[], Link]) -> Budget:
        """What the node's config states, and measurements for the rest; kept for the messages to come.

        Raises:
            ConfigError: a statement that is no budget.
        """
        budget = own_budget(self._context.node_config, self._device, link)
        figures: dict[str, Any] = asdict(budget)
        self._context.state[STATE_KEY] = ConfigRecord(figures)
        return budget

    def now(self) -> Budget | None:
        """The budget kept, with the memory that is free now; None if nobody asked yet. Call it before loading."""
        record = self._context.state.get(STATE_KEY)
        if not isinstance(record, ConfigRecord):
            return None
        kept = Budget(**dict(record))  # type: ignore[arg-type]
        if "memory_bytes" in stated_figures(self._context.node_config):
            return kept
        return replace(kept, memory_bytes=usable_memory(self._device))


class ContextDeltas:
    """Clients' copies of the weight delta in Flower's ``context.state``: a `federation.head_client.DeltaStore`."""

    def __init__(self, context: Context) -> None:
        self._state = context.state

    def load(self, run: str, client: str, shapes: Shapes) -> DeltaReplica:
        """The kept replica; an empty one if there is none, or it is of another run or another cut."""
        record, arrays = self._state.get(_version_key(client)), self._state.get(_arrays_key(client))
        if not isinstance(record, ConfigRecord) or not isinstance(arrays, ArrayRecord):
            return DeltaReplica()
        if record["run"] != run or record["modules"] != len(shapes):
            return DeltaReplica()
        tensors = {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}
        try:
            total = WeightDelta.from_tensors(tensors, shapes)
        except AggregationError as error:
            _log.warning("client state %s is not usable, asking for the whole: %s", _arrays_key(client), error)
            return DeltaReplica()
        return DeltaReplica(int(record["version"]), frozenset(shapes), total)  # type: ignore[arg-type]

    def save(self, run: str, client: str, replica: DeltaReplica) -> None:
        """Keep `replica` for the next round."""
        figures: dict[str, Any] = {"run": run, "version": replica.version or 0, "modules": len(replica.names)}
        self._state[_version_key(client)] = ConfigRecord(figures)
        self._state[_arrays_key(client)] = ArrayRecord(
            {name: Array(tensor.numpy()) for name, tensor in replica.total.to_tensors().items()}
        )


def _arrays_key(client: str) -> str:
    return f"hsplit-delta-{client}"


def _version_key(client: str) -> str:
    return f"hsplit-version-{client}"
