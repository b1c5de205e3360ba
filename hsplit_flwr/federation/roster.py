"""Which clients there are, on which nodes: nodes say once who they host and what that can afford."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.budgets.budget import Budget

_log = logging.getLogger("hsplit_flwr")
MOST_CLIENTS = 100_000
"""of one node; a simulation's node hosts many"""
LONGEST_ID = 256
"""characters of a client's id"""


class Present(Protocol):
    """The clients that a round can ask."""

    @property
    def clients(self) -> Collection[str]:
        """Client ids."""

    @property
    def new_budgets(self) -> Mapping[str, Budget]:
        """Client id -> what it can afford, of those that said so since the last round."""

    def concurrency(self, clients: Iterable[str]) -> int:
        """How many of `clients` can be under way at a time."""

    def count_nodes(self, clients: Iterable[str]) -> int:
        """How many nodes host `clients`."""


@dataclass(frozen=True)
class NodeAnswer:
    """What a node says of itself."""

    clients: tuple[str, ...]
    """that it hosts"""
    concurrency: int
    """clients that a simulation runs at a time; 0: a real deployment, where every node is its own"""
    budgets: Mapping[str, Budget]
    """client id -> what it can afford; empty where it was not asked"""

    def __post_init__(self) -> None:
        if len(set(self.clients)) < len(self.clients) or self.concurrency < 0:
            raise ConfigError(
                f"Expected client ids without repetition and a concurrency >= 0, found {self.clients!r:.200} and "
                f"{self.concurrency}. Give each client of a node an id of its own."
            )
        longest = max(map(len, self.clients), default=0)
        if len(self.clients) > MOST_CLIENTS or longest > LONGEST_ID:
            raise ConfigError(
                f"Expected at most {MOST_CLIENTS} clients of a node with ids of at most {LONGEST_ID} characters, found "
                f"{len(self.clients)} with up to {longest}. Give a node fewer clients, with short ids."
            )
        if self.budgets and (missing := sorted(set(self.clients) - self.budgets.keys())):
            raise ConfigError(f"Expected a budget of every client of the node, found none of {missing}.")


class Roster:
    """Client ids and the nodes that host them. A node is known by an id of its transport's."""

    def __init__(self) -> None:
        self._nodes: dict[str, NodeAnswer] = {}
        self._hosts: dict[str, str] = {}
        self._new: set[str] = set()

    @property
    def is_new(self) -> bool:
        """No node has answered yet."""
        return not self._nodes

    def unknown(self, online: Iterable[str]) -> list[str]:
        """Those of the nodes `online` that have not answered yet."""
        return [node for node in online if node not in self._nodes]

    def lacks(self, online: Collection[str]) -> bool:
        """Whether a node that was there in the last round is not among those `online`."""
        return not self._nodes.keys() <= set(online)

    def update(self, online: Collection[str], answers: Mapping[str, NodeAnswer]) -> None:
        """The nodes `online` now, and the `answers` of new ones; who left takes its clients along.

        A client stays with its node as long as that node is online: whoever else claims it is left out, by name, and
        may ask again before the next round. So nobody takes a living node's client, and a restarted node gets its own
        back as soon as its old self no longer counts as online. Of two new nodes the first one keeps the client.

        Raises:
            ConfigError: no client is left.
        """
        self._nodes = {node: answer for node, answer in self._nodes.items() if node in online}
        self._hosts = {client: node for client, node in self._hosts.items() if node in self._nodes}
        self._new = set()
        for node, answer in answers.items():
            if taken := [client for client in answer.clients if client in self._hosts]:
                _log.warning(
                    "left out node %s: expected clients of its own, found %s on node %s too, which is online. "
                    "Give each an id of its own; a restarted node is asked again until its old self is offline.",
                    node,
                    f"{taken!r:.200}",
                    self._hosts[taken[0]],
                )
                continue
            self._nodes[node] = answer
            self._new.add(node)
            self._hosts |= dict.fromkeys(answer.clients, node)
        if not self._hosts:
            raise ConfigError("Expected at least one SuperNode that hosts clients of hsplit_flwr, found none.")

    @property
    def clients(self) -> Collection[str]:
        """Client ids."""
        return self._hosts.keys()

    def node_of(self, client: str) -> str:
        """The node that hosts `client`."""
        return self._hosts[client]

    @property
    def new_budgets(self) -> dict[str, Budget]:
        """What the clients of the nodes that the last `update` added can afford, as they said."""
        return {
            client: budget
            for node in self._nodes if node in self._new
            for client, budget in self._nodes[node].budgets.items() if self._hosts.get(client) == node
        }  # fmt: skip

    def concurrency(self, clients: Iterable[str]) -> int:
        """How many of `clients` can be under way at a time."""
        chosen = list(clients)
        nodes = self._nodes_of(chosen)
        simulated = max((self._nodes[node].concurrency for node in nodes), default=0)
        return min(len(chosen), simulated or len(nodes))

    def count_nodes(self, clients: Iterable[str]) -> int:
        """How many nodes host `clients`."""
        return len(self._nodes_of(clients))

    def _nodes_of(self, clients: Iterable[str]) -> set[str]:
        return {self._hosts[client] for client in clients}
