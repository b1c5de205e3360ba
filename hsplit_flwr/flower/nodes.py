"""SuperNodes behind Flower's client manager: each is asked once who it hosts."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from flwr.common import GetPropertiesIns
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.grid_client_proxy import GridClientProxy

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.roster import NodeAnswer, Roster
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.flower.messages import PROBE_KEY, unpack_answer
from hsplit_flwr.flower.restarts import UnlostGrid, restarts_of

_log = logging.getLogger("hsplit_flwr")
MOST_ASKED_AT_A_TIME = 32
NODES_POLL_S = 1.0
ASK_AGAIN_S = 30.0
"""that nodes which do not answer are asked again, and those which left are waited for: a restart takes less, and Flower
takes what is gone for there about as long"""
Answers: TypeAlias = Mapping[str, NodeAnswer | Exception]
"""node -> what it says of itself, or why it says nothing"""


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

        def online() -> Collection[str]:
            self._proxies = dict(client_manager.all())
            return list(self._proxies)

        def find() -> Collection[str]:
            found = wait_for_nodes(self.roster, online, config)
            for proxy in self._proxies.values():
                self._outlive_restarts(proxy)
            return found

        ask_nodes(self.roster, find, self._ask_all, config)
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

    def _ask_all(self, nodes: list[str]) -> Answers:
        questions = [self._question(node) for node in nodes]  # before the threads: asking about links opens the tail
        with ThreadPoolExecutor(max_workers=MOST_ASKED_AT_A_TIME) as pool:
            return dict(zip(nodes, pool.map(self._ask, nodes, questions), strict=True))

    def _ask(self, node: str, question: GetPropertiesIns) -> NodeAnswer | Exception:
        try:
            res = self._proxies[node].get_properties(question, timeout=self._server.config.wait_for_nodes_s, group_id=0)
            return unpack_answer(res.properties, with_budgets=bool(question.config))
        except Exception as error:  # whatever a node answers must not stop the run
            return error


def wait_for_nodes(roster: Roster, find: Callable[[], Collection[str]], config: StrategyConfig) -> Collection[str]:
    """The nodes that are online: `min_nodes` at least where a run begins.

    One that is under way goes on without nodes that left, once they had time for a restart, as long as one is there.

    Args:
        roster: of the run, as the last round left it.
        find: the nodes that are online now.
        config: says how many nodes have to be there, and how long they are waited for.

    Raises:
        ConfigError: too few, or under way none, within ``wait_for_nodes_s``.
    """
    needed = config.min_nodes if roster.is_new else 1
    begun = time.monotonic()
    while len(nodes := find()) < config.min_nodes:
        waited = time.monotonic() - begun
        may_return = roster.lacks(nodes) and waited < _restart_limit_s(config)
        if len(nodes) >= needed and not may_return:
            _log.warning("%d of %d nodes (min-nodes) are connected: the run goes on", len(nodes), config.min_nodes)
            break
        if waited > config.wait_for_nodes_s:
            raise too_few_nodes(needed, config.wait_for_nodes_s, len(nodes))
        time.sleep(NODES_POLL_S)
    return nodes


def ask_nodes(
    roster: Roster, find: Callable[[], Collection[str]], ask: Callable[[list[str]], Answers], config: StrategyConfig
) -> None:
    """Bring `roster` up to date with the nodes that are online, of which new ones are asked who they host.

    A node that does not answer is left out of the round. Where fewer than ``min_nodes`` are left, it is asked again
    for a while, if it is still there: after a restart of the SuperLink nodes are counted that are about to go, or that
    hang. A run does not begin with fewer; one that is under way goes on.

    Args:
        roster: of the run.
        find: the nodes that are online now, as `wait_for_nodes` has them; raises `ConfigError` if there are too few.
        ask: node -> its answer, or why there is none.
        config: says how many nodes have to take part, and how long they are waited for.

    Raises:
        ConfigError: as `find`; or too few answer before the first round; or nobody hosts a client.
    """
    min_nodes = config.min_nodes
    give_up = time.monotonic() + _restart_limit_s(config)
    answers: dict[str, NodeAnswer | Exception] = {}
    while True:
        online = find()
        new = [node for node in roster.unknown(online) if not isinstance(answers.get(node), NodeAnswer)]
        answers |= ask(new)
        silent = {node: reason for node in new if isinstance(reason := answers[node], Exception)}
        enough = len(online) - len(silent) >= min_nodes or not silent
        if enough or time.monotonic() > give_up:
            for node, reason in silent.items():
                _log.warning("left out node %s: %r", node, reason)
            if not enough and roster.is_new and len(silent) < len(online):  # of none at all `update` tells
                raise too_few_answers(min_nodes, len(online) - len(silent), silent)
            roster.update(online, {node: said for node, said in answers.items() if isinstance(said, NodeAnswer)})
            return
        time.sleep(NODES_POLL_S)


def _restart_limit_s(config: StrategyConfig) -> float:
    """Longest wait for a node that may come back, or answer yet."""
    return min(ASK_AGAIN_S, config.wait_for_nodes_s)


def too_few_answers(expected: int, found: int, silent: Mapping[str, object]) -> ConfigError:
    """The error of a run most of whose nodes are there and say nothing."""
    reasons = "; ".join(f"node {node}: {reason}" for node, reason in silent.items())
    return ConfigError(
        f"Expected at least {expected} SuperNodes that say whom they host, found {found} ({reasons:.500}). "
        "Restart those, or lower min-nodes."
    )


def too_few_nodes(expected: int, wait_s: float, found: int) -> ConfigError:
    """The error of a run that waited long enough."""
    return ConfigError(
        f"Expected at least {expected} SuperNodes within {wait_s:.0f} s, found {found}. Start more, or lower min-nodes."
    )
