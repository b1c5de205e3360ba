"""SuperNodes behind Flower's client manager: each is asked once who it hosts."""

import logging
from concurrent.futures import ThreadPoolExecutor

from flwr.common import GetPropertiesIns
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.grid_client_proxy import GridClientProxy

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.roster import NodeAnswer, Roster
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.flower.messages import PROBE_KEY, unpack_answer
from hsplit_flwr.flower.restarts import UnlostGrid, restarts_of

_log = logging.getLogger("hsplit_flwr")
MOST_ASKED_AT_A_TIME = 32


class ConnectedNodes:
    """The clients of all connected nodes, and the proxies that reach them.

    Args:
        server: whose config says how many nodes to wait for, and how long; it knows what new nodes are asked with.
    """

    def __init__(self, server: RoundServer) -> None:
        self._server = server
        self._proxies: dict[str, ClientProxy] = {}
        self._unlost: UnlostGrid | None = None
        """everybody's grid, where there is one"""
        self.roster = Roster()

    def refresh(self, client_manager: ClientManager) -> Roster:
        """The roster of the nodes that are connected now and answer.

        Raises:
            ConfigError: not enough nodes in time, or nobody hosts a client.
        """
        config = self._server.config
        if not client_manager.wait_for(config.min_nodes, timeout=int(config.wait_for_nodes_s)):
            raise too_few_nodes(config.min_nodes, config.wait_for_nodes_s, client_manager.num_available())
        self._proxies = dict(client_manager.all())
        for proxy in self._proxies.values():
            self._outlive_restarts(proxy)
        new = self.roster.unknown(self._proxies)
        questions = [self._question(node) for node in new]  # before the threads: asking about links opens the tail
        with ThreadPoolExecutor(max_workers=MOST_ASKED_AT_A_TIME) as pool:
            answers = dict(zip(new, pool.map(self._ask, new, questions), strict=True))
        self.roster.update(self._proxies, {node: answer for node, answer in answers.items() if answer})
        return self.roster

    def _outlive_restarts(self, proxy: ClientProxy) -> None:
        """What a restarted SuperNode has lost is not waited for."""
        if isinstance(proxy, GridClientProxy) and not isinstance(proxy.grid, UnlostGrid):
            self._unlost = self._unlost or UnlostGrid(proxy.grid, restarts_of(self._server, proxy.grid))
            proxy.grid = self._unlost

    def proxy(self, client: str) -> ClientProxy:
        """The proxy of the node that hosts `client`."""
        return self._proxies[self.roster.node_of(client)]

    def _question(self, node: str) -> GetPropertiesIns:
        task = self._server.probe_task(node)
        return GetPropertiesIns(config={PROBE_KEY: task.to_json()} if task else {})

    def _ask(self, node: str, question: GetPropertiesIns) -> NodeAnswer | None:
        try:
            res = self._proxies[node].get_properties(question, timeout=self._server.config.wait_for_nodes_s, group_id=0)
            return unpack_answer(res.properties, with_budgets=bool(question.config))
        except Exception as error:  # whatever a node answers must not stop the run
            _log.warning("left out node %s: %r", node, error)
            return None


def too_few_nodes(expected: int, wait_s: float, found: int) -> ConfigError:
    """The error of a run that waited long enough."""
    return ConfigError(
        f"Expected at least {expected} SuperNodes within {wait_s:.0f} s, found {found}. Start more, or lower min-nodes."
    )
