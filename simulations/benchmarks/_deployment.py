"""What `exchange.py` and its processes have in common: a model that is cut, its adapters, and real data."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from _models import MODELS
from torch import Tensor

from hsplit_flwr.data.restaurants import restaurant_examples
from hsplit_flwr.data.text_batches import TextBatches
from hsplit_flwr.exchange.positions import IGNORED
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ModelFiles

SEED = 0
RUN = "bench"
ROUND = 1


@dataclass(frozen=True)
class Deployment:
    """A model between one tail and some heads of equal cut."""

    model: str
    cut: int
    batch: int
    """rows"""
    max_length: int
    """tokens of a row at most; a batch is as wide as its longest row"""
    rank: int
    heads: int

    @property
    def lora(self) -> LoraSpec:
        """The adapters of heads and tail."""
        return LoraSpec(self.rank, 2.0 * self.rank)

    @property
    def clients(self) -> tuple[str, ...]:
        """The heads by name."""
        return tuple(map(str, range(self.heads)))

    def files(self) -> ModelFiles:
        """The model."""
        return ModelFiles.resolve(MODELS[self.model]())

    def batches(self, client: str, *, padding_travels: bool) -> Iterator[dict[str, Tensor]]:
        """The embedded restaurants that `client` holds, as endless batches; the same on every call.

        With `padding_travels` the masks call padding tokens and targets stand at the ends of their rows, so that it
        takes bytes as it did before only what counts was sent; it is computed on either way.
        """
        examples = restaurant_examples(SEED)[0][int(client) :: self.heads]
        texts = TextBatches(
            examples, self.files().tokenizer(), batch_size=self.batch, max_length=self.max_length, seed=SEED
        )
        for batch in texts.stream():
            if padding_travels:
                batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
                behind = (batch["labels"] != IGNORED).flip(1).to(torch.uint8).argmax(1).tolist()
                rows = [labels.roll(count) for labels, count in zip(batch["labels"], behind, strict=True)]
                batch["labels"] = torch.stack(rows)
            yield batch
