"""The quickstart's model and data, both embedded in the library."""

from functools import lru_cache
from pathlib import Path

from hsplit_flwr.data.restaurants import check_partitions, partition_by_slot, restaurant_examples
from hsplit_flwr.data.text_batches import Example, TextBatches
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.flower.client_settings import RunConfig, count_clients, get
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles

FOLDER = Path(__file__).parent
MODEL = str(tiny_checkpoint())
HELD_OUT_EVERY = 10


def batches(examples: list[Example], run_config: RunConfig, *, shuffle: bool) -> TextBatches:
    """`examples` as batches for training (shuffled by the run's seed) or for scoring."""
    return TextBatches(
        examples,
        _tokenizer(),
        batch_size=get(run_config, "batch-size", 8),
        max_length=get(run_config, "max-length", 96),
        seed=get(run_config, "seed", 0),
        shuffle=shuffle,
    )


@lru_cache(maxsize=1)
def _tokenizer():  # type: ignore[no-untyped-def]
    return ModelFiles.resolve(MODEL).tokenizer()


def check_data(run_config: RunConfig) -> None:
    """What every client would find out by itself: that there is no such partition. SuperNodes alone are not counted.

    Raises:
        ConfigError: there is none.
    """
    check_partitions(
        count_clients(run_config, {}, FOLDER),
        slot="food",
        alpha=get(run_config, "dirichlet-alpha", 0.3),
        seed=get(run_config, "seed", 0),
    )


def client_data(client: str, num_clients: int, run_config: RunConfig) -> ClientData:
    """Non-IID part number `client` of `num_clients`; a tenth of its meaning representations is held out."""
    train, _ = restaurant_examples()
    parts = partition_by_slot(
        train,
        slot="food",
        num_clients=num_clients,
        alpha=get(run_config, "dirichlet-alpha", 0.3),
        seed=get(run_config, "seed", 0),
    )
    mine = parts[int(client)]
    mrs = sorted({example.mr for example in mine})
    held_out = set(mrs[::HELD_OUT_EVERY])
    return ClientData(
        train=batches([e for e in mine if e.mr not in held_out], run_config, shuffle=True).stream,
        evaluate=batches([e for e in mine if e.mr in held_out], run_config, shuffle=False),
    )
