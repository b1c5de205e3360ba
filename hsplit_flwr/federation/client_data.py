"""What a client gives to a round: its data, and a place for its copy of the weight delta."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hsplit_flwr.federation.trained_head import Shapes
from hsplit_flwr.lora.delta_update import DeltaReplica, OwnFactors
from hsplit_flwr.training.batch import Batch

if TYPE_CHECKING:
    from hsplit_flwr.training.kept_adapters import KeptAdapters


@dataclass(frozen=True)
class ClientData:
    """One client's data: batches of `input_ids`, `attention_mask`, `labels` (B, T), labels -100 where no loss."""

    train: Callable[[int], Iterable[Batch]] | Iterable[Batch]
    """At least ``local_steps`` batches per round. A callable gets the run step to start from, so that a client which is
    built anew every round goes on where it stopped; an iterable starts again every round."""
    evaluate: Iterable[Batch] = ()
    """Held-out batches for the federated evaluation"""

    def training_batches(self, first_step: int) -> Iterable[Batch]:
        """Batches from run step `first_step` on."""
        return self.train(first_step) if callable(self.train) else self.train


class DeltaStore(Protocol):
    """Where a client keeps its copy of the weight delta between rounds. Losing it costs bytes, not the run."""

    def open(self, run: str, client: str, shapes: Shapes) -> AbstractContextManager[DeltaReplica]:
        """The kept copy; an empty one where there is none, or it is of another run or another head.

        What has become of it by the end of the `with` is kept for the next round, unless that ends with an error.
        """

    def keep_own(self, run: str, client: str, own: OwnFactors) -> None:
        """Keep what the client trained itself for the next `open`: the server need not send that back."""

    def keep_adapters(self, run: str, client: str, kept: "KeptAdapters") -> None:
        """Keep `kept` for a later round; without room for it, they restart there."""

    def kept_adapters(self, run: str, client: str, round_number: int) -> "KeptAdapters | None":
        """Those of that round; None: they are lost."""
