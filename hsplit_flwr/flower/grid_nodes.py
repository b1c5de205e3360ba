"""SuperNodes behind Flower's grid: each is asked once who it hosts."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from hsplit_flwr.federation.roster import NodeAnswer, Roster
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.flower.message_client import CONFIG, config_of
from hsplit_flwr.flower.messages import PROBE_KEY, unpack_answer
from hsplit_flwr.flower.nodes import Answers, ask_nodes, wait_for_nodes


class GridNodes:
    """The clients of all connected nodes.

    Args:
        server: whose config says how many nodes to wait for, and how long; it knows what new nodes are asked with.
    """

    def __init__(self, server: RoundServer) -> None:
        self._server = server
        self.roster = Roster()

    def refresh(self, grid: Grid) -> Roster:
        """The roster of the nodes that are connected now and answer.

        Raises:
            ConfigError: not enough nodes in time, or nobody hosts a client.
        """
        config = self._server.config

        def online() -> Collection[str]:
            return [str(node) for node in sorted(grid.get_node_ids())]

        def find() -> Collection[str]:
            return wait_for_nodes(self.roster, online, config)

        ask_nodes(self.roster, find, partial(self._ask_all, grid), config)
        return self.roster

    def _ask_all(self, grid: Grid, nodes: list[str]) -> Answers:
        questions = {node: self._question(node) for node in nodes}
        replies = grid.send_and_receive(list(questions.values()), timeout=self._server.config.wait_for_nodes_s)
        answers = {str(reply.metadata.src_node_id): reply for reply in replies}
        return {node: _read_answer(answers.get(node), config_of(question)) for node, question in questions.items()}

    def _question(self, node: str) -> Message:
        task = self._server.probe_task(node)
        content = RecordDict({CONFIG: ConfigRecord({PROBE_KEY: task.to_json()} if task else {})})
        return Message(content, int(node), MessageType.QUERY, ttl=self._server.config.wait_for_nodes_s, group_id="0")


def _read_answer(reply: Message | None, question: Mapping[str, Any]) -> NodeAnswer | Exception:
    try:
        if reply is None or reply.has_error():
            raise ValueError(reply.error.reason if reply else "no answer")
        return unpack_answer(config_of(reply), with_budgets=PROBE_KEY in question)
    except Exception as error:  # whatever a node answers must not stop the run
        return error
