"""Flower's grid in one process: real ClientApps in threads, each message with a copy of its node's context."""

import copy
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Handler = Callable[[Message, Context], Message]


@dataclass
class GridNode:
    """A SuperNode: an app, and what Flower keeps for it between messages."""

    node_id: int
    handle: Handler
    context: Context = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.context = Context(1, self.node_id, {}, RecordDict(), {})

    def answer(self, message: Message) -> Message:
        """The app's answer; what it raises becomes an error message, as Flower does it."""
        context = copy.deepcopy(self.context)
        try:
            reply = self.handle(message, context)
        except Exception as error:
            return Message(Error(code=0, reason=f"{type(error)}:<{error}>"), reply_to=message)
        self.context = context
        return reply


class ThreadGrid(Grid):
    """A grid whose nodes are threads.

    Args:
        nodes: node id -> what answers its messages.
        refused: node ids that Flower does not take messages for.
    """

    def __init__(self, nodes: dict[int, ClientApp | Handler], refused: Iterable[int] = ()) -> None:
        self.nodes = {node_id: GridNode(node_id, app) for node_id, app in nodes.items()}
        self._refused = set(refused)
        self.activated: dict[int, str] = {}
        """when nodes came online, for those that did so anew"""
        # What a ServerApp's process sets before the app runs; messages are stamped with it.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self._pool = ThreadPoolExecutor(64)
        self._replies: dict[str, Future[Message]] = {}
        self._numbers = itertools.count(1)
        self.sent: list[Message] = []
        self._sent_by_id: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **options: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, last_activated_at=self.activated.get(node, "first")) for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self._refused:
                continue
            message.metadata.__dict__["_message_id"] = message_id = str(next(self._numbers))
            self.sent.append(message)
            self._sent_by_id[message_id] = message
            self._replies[message_id] = self._pool.submit(self.nodes[node].answer, message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there, and an error for each message whose time to live is over, as Flower's."""
        asked = list(message_ids)
        done = [message_id for message_id in asked if self._replies[message_id].done()]
        late = [message_id for message_id in asked if message_id not in done and self._is_late(message_id)]
        answered = [self._replies.pop(message_id).result() for message_id in done]
        return [*answered, *(self._unavailable(message_id) for message_id in late)]

    def _is_late(self, message_id: str) -> bool:
        told = self._sent_by_id[message_id].metadata
        return time.time() > told.created_at + told.ttl

    def _unavailable(self, message_id: str) -> Message:
        del self._replies[message_id]
        return Message(Error(code=0, reason="Message Unavailable"), reply_to=self._sent_by_id[message_id])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [self._replies.pop(message_id).result(timeout) for message_id in self.push_messages(messages)]
