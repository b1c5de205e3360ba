"""Which clients there are: every SuperNode is asked once who it hosts."""

import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flwr.common import GetPropertiesIns, Scalar
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.flower.messages import BUDGETS_KEY, CLIENTS_KEY, CONCURRENCY_KEY, budgets_from_json
from hsplit_flwr.planning.budgets.budget import Budget

_log = logging.getLogger("hsplit_flwr")


@dataclass(frozen=True)
class _Node:
    clients: tuple[str, ...]
    concurrency: int
    budgets: dict[str, Budget]
    """by client; empty where they were not asked for"""


class Roster:
    """Client ids and the SuperNodes that host them.

    Args:
        wait_s: how long to wait for enough nodes, and for each one's answer.
        question: node's cid -> what it is asked with, e.g. for its budgets.
    """

    def __init__(self, wait_s: float, question: Callable[[str], dict[str, Scalar]] = lambda cid: {}) -> None:
        self._wait_s = wait_s
        self._question = question
        self._nodes: dict[str, _Node] = {}
        self._new: list[str] = []

    def refresh(self, client_manager: ClientManager, min_nodes: int) -> dict[str, ClientProxy]:
        """Client id -> its node's proxy, for all connected nodes that answer.

        Raises:
            ConfigError: fewer than `min_nodes` nodes in time, nobody answered, or two nodes host the same client.
        """
        if not client_manager.wait_for(min_nodes, timeout=int(self._wait_s)):
            raise ConfigError(
                f"Expected at least {min_nodes} SuperNodes within {self._wait_s:.0f} s, found "
                f"{client_manager.num_available()}. Start more, or lower min_nodes."
            )
        proxies = dict(client_manager.all())
        self._nodes = {cid: node for cid, node in self._nodes.items() if cid in proxies}
        new = [proxy for cid, proxy in proxies.items() if cid not in self._nodes]
        with ThreadPoolExecutor(max_workers=max(1, len(new))) as pool:
            for proxy, node in zip(new, pool.map(self._ask, new), strict=True):
                if node:
                    self._nodes[proxy.cid] = node
        self._new = [proxy.cid for proxy in new if proxy.cid in self._nodes]
        known: dict[str, ClientProxy] = {}
        fresh = set(self._new)
        for cid, node in self._nodes.items():  # in the order in which they were asked
            for client in node.clients:
                if client in known and (cid not in fresh or known[client].cid in fresh):
                    raise ConfigError(
                        f"Expected every client on one node, found {client!r} on two. Give each a client id of its own."
                    )
                known[client] = proxies[cid]  # a restarted node takes over while its old self still counts as online
        if not known:
            raise ConfigError("Expected at least one SuperNode that hosts an HSplitLoRAClient, found none.")
        return known

    @property
    def new_budgets(self) -> dict[str, Budget]:
        """What the clients of the nodes that the last `refresh` asked said they can afford."""
        return {client: b for cid in self._new for client, b in self._nodes[cid].budgets.items()}

    def concurrency(self, clients: Iterable[str]) -> int:
        """How many of `clients` can be under way at a time."""
        chosen = set(clients)
        nodes = [node for node in self._nodes.values() if chosen & set(node.clients)]
        simulated = max((node.concurrency for node in nodes), default=0)
        return min(len(chosen), simulated or len(nodes))

    def _ask(self, proxy: ClientProxy) -> _Node | None:
        try:
            ins = GetPropertiesIns(config=self._question(proxy.cid))
            res = proxy.get_properties(ins, timeout=self._wait_s, group_id=0)
            clients = json.loads(str(res.properties[CLIENTS_KEY]))
            concurrency = int(str(res.properties[CONCURRENCY_KEY]))
            if not isinstance(clients, list) or not all(isinstance(c, str) for c in clients) or concurrency < 0:
                raise ValueError(f"{CLIENTS_KEY}={clients!r} {CONCURRENCY_KEY}={concurrency}")
            if len(set(clients)) < len(clients):
                raise ValueError(f"a client twice in {CLIENTS_KEY}={clients!r}")
            budgets = budgets_from_json(res.properties[BUDGETS_KEY]) if ins.config else {}
            return _Node(tuple(clients), concurrency, {c: budgets[c] for c in clients} if ins.config else {})
        except Exception as error:  # whatever a node answers must not stop the run
            _log.warning("left out node %s: expected its client ids, found %r", proxy.cid, error)
            return None
