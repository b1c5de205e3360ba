"""A deployed client's own budget between Flower's messages: measured once, kept in the node's state.

A client is built anew for every message. What the link and the processor do is measured when the strategy first asks;
the memory that is free is looked up again each time, unless the node's config states it.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from flwr.app import ConfigRecord, Context

from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.budgets.probe import Link, own_budget, stated_figures, usable_memory

STATE_KEY = "hsplit-budget"


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
