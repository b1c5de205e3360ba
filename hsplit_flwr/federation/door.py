"""What stands between a round's server and the heads, whatever carries their frames."""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.exchange.task import Mode
from hsplit_flwr.exchange.traffic import Traffic
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.workload import Workload


class Door(Protocol):
    """Where heads meet the tail: it admits the clients of a round and counts what they do."""

    @property
    def address(self) -> str:
        """Address that clients are told."""

    @property
    def traffic(self) -> Traffic:
        """What went through it so far."""

    def exchange_by(self, training: TrainingConfig) -> None:
        """Take and send frames by these settings' codecs and parts in flight, in the rounds that open from now on."""

    @property
    def holds_clients(self) -> bool:
        """A head that waits for the tail keeps its process busy, so that a simulation runs only some at a time."""

    def open_round(
        self,
        round_number: int,
        mode: Mode,
        cuts: Mapping[str, int],
        first_step: int,
        frozen: Collection[str] = (),
        *,
        steps: int | None = None,
        workload: Workload | None = None,
    ) -> dict[str, str]:
        """Admit the clients of `cuts`, of which `frozen` train nothing; returns each one's one-time token."""

    def open_probe(self, node: str, round_number: int) -> str:
        """Admit a node that measures its link before round `round_number`; returns its one-time token."""

    def hears_of(self, client: str) -> bool:
        """Whether a connection of `client` is open."""

    def answered(self, client: str) -> None:
        """Note that `client` is done with its task: if its connection is broken, it will not come back."""

    def close_round(self) -> dict[str, Ticket]:
        """End the round; returns what each client did."""

    def stop(self) -> None:
        """Let nobody in any more."""


OpenDoor = Callable[[SharedTail, GlobalModel, str], Door]
"""(tail, global model, id of the run) -> a door to that tail, open from then on"""
