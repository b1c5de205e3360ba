"""Flower's grid, for classes that change what one of its methods does."""

from collections.abc import Iterable

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run


class SameGrid(Grid):
    """`grid`, all of it.

    Args:
        grid: Flower's.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Flower's own."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def set_run(self, run: Run) -> None:
        """Flower's own."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Flower's own."""
        return self._grid.run

    def create_message(self, *args: object, **options: object) -> Message:
        """Flower's own."""
        return self._grid.create_message(*args, **options)  # type: ignore[arg-type]

    def get_node_ids(self) -> Iterable[int]:
        """Flower's own."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Flower's own."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Flower's own."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Flower's own."""
        return self._grid.pull_messages(message_ids)
