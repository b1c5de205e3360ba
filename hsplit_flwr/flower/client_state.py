"""What the clients of a node keep between Flower's messages: their budget, and where their weight delta is.

A client is built anew for every message, and Flower keeps ``context.state`` for it. What the link and the processor do
is measured when the server first asks; the memory that is free is looked up again each time, unless the node's config
states it. Of the weight delta only the name, hash and version are in there (`ContextNotes`).
"""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context

from hsplit_flwr.common.cache_folder import cache_folder
from hsplit_flwr.common.checks import is_above, require
from hsplit_flwr.federation.client_store import LIMIT_BYTES, FileStore
from hsplit_flwr.federation.delta_folder import Stamp
from hsplit_flwr.flower.client_settings import get
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


class ContextNotes:
    """What was kept last of each client's weight delta: `federation.client_store.Notes` in Flower's ``context.state``.

    The delta itself is on the node's disk. Flower loses a context of more than some 0.18 GiB without a word.
    """

    def __init__(self, context: Context) -> None:
        self._state = context.state

    def read(self, client: str) -> Stamp | None:
        """What was noted last; None: nothing, or nothing that this version wrote."""
        record = self._state.get(_stamp_key(client))
        if not isinstance(record, ConfigRecord) or record.keys() != set(Stamp._fields):
            return None
        return Stamp(**dict(record))  # type: ignore[arg-type]

    def write(self, client: str, stamp: Stamp) -> None:
        """Note it."""
        self._state[_stamp_key(client)] = ConfigRecord(stamp._asdict())


def delta_store(context: Context) -> FileStore:
    """The node's store of weight deltas, where ``state-dir`` of its config says, of ``state-limit-gb`` at most.

    Raises:
        ConfigError: not a folder's name, or not a size.
    """
    folder = get(context.node_config, "state-dir", "") or default_state_folder()
    limit_gb = get(context.node_config, "state-limit-gb", LIMIT_BYTES / 1e9)
    require(is_above(limit_gb, 0), "state-limit-gb", "> 0", limit_gb)
    return FileStore(Path(folder).expanduser(), int(limit_gb * 1e9), ContextNotes(context))


def default_state_folder() -> Path:
    """``$FLWR_HOME/hsplit_flwr/clients`` where FLWR_HOME is set, else ``clients`` in the package's cache folder."""
    home = os.environ.get("FLWR_HOME")
    return Path(home, "hsplit_flwr", "clients") if home else cache_folder() / "clients"


def _stamp_key(client: str) -> str:
    return f"hsplit-delta-{client}"
