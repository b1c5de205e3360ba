"""A client of a round, whoever carries the messages."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hsplit_flwr.training.loss import Batch


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
