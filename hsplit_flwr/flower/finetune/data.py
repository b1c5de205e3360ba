"""Model and data that the run config names."""

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from hsplit_flwr.data.assets import DESK, DESK_HELD_OUT
from hsplit_flwr.data.fitting import Fit
from hsplit_flwr.data.own_data import DataSettings, OwnData
from hsplit_flwr.data.partitions import Partition
from hsplit_flwr.data.row_batches import RowBatches, spread
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.flower.client_settings import RunConfig, get
from hsplit_flwr.models.assets import smollm2_checkpoint, tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles

EMBEDDED = "embedded"


def model_name(run_config: RunConfig) -> str:
    """The model as `ModelFiles.resolve` takes it."""
    name = get(run_config, "model", EMBEDDED)
    if name != EMBEDDED:
        return name
    try:
        return str(smollm2_checkpoint())
    except ConfigError:
        return str(tiny_checkpoint())


@lru_cache(maxsize=1)
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, read once per process."""
    return ModelFiles.resolve(name).tokenizer()


def data_settings(run_config: RunConfig, source: str) -> DataSettings:
    """What the run config makes of `source`, a name of data as a user types it."""
    held_out = get(run_config, "eval-data", "")
    template = get(run_config, "chat-template", "")
    seed = get(run_config, "seed", 0)
    if source == EMBEDDED:
        source, held_out = str(DESK), held_out or str(DESK_HELD_OUT)
    return DataSettings(
        source=source,
        held_out_source=held_out,
        split=get(run_config, "data-split", "train"),
        held_out_split=get(run_config, "eval-split", ""),
        validation_share=get(run_config, "validation-share", 0.1),
        loss_on=get(run_config, "loss-on", ""),
        chat_template=template or ("plain" if model_name(run_config) == str(tiny_checkpoint()) else ""),
        fit=Fit(
            get(run_config, "max-length", 192),
            get(run_config, "too-long", "cut"),
            get(run_config, "packing", "none"),
        ),
        partition=Partition(
            get(run_config, "partition", "iid"),
            get(run_config, "partition-by", "length"),
            get(run_config, "dirichlet-alpha", 0.3),
            seed,
        ),
        batch_size=get(run_config, "batch-size", 4),
        seed=seed,
    )


def server_data(run_config: RunConfig) -> OwnData | None:
    """The data that all know; None where every node has its own alone.

    Raises:
        ConfigError: no such data, or rows that are not of its form.
    """
    source = get(run_config, "data", EMBEDDED) or get(run_config, "eval-data", "")
    return _own_data(data_settings(run_config, source), model_name(run_config)) if source else None


def client_data(client: str, run_config: RunConfig, node_config: RunConfig, clients: list[str]) -> ClientData:
    """What `client` trains on and scores.

    Args:
        client: one of `clients`.
        run_config: Flower's.
        node_config: Flower's; its ``data``, where it has some, is divided among the clients of the node alone.
        clients: those who share the data: of the node where it has its own, else all.

    Raises:
        ConfigError: there is no such data, or nothing in it for this client.
    """
    source = get(node_config, "data", "") or get(run_config, "data", EMBEDDED)
    if not source:
        raise ConfigError("Expected data in the run config or in the node config of this SuperNode, found neither.")
    settings, model = data_settings(run_config, source), model_name(run_config)
    own, number, parts = _own_data(settings, model), clients.index(client), len(clients)
    held_out = spread(own.held_out[number::parts], get(run_config, "client-examples", 16))
    return ClientData(
        train=lambda step: _training_batches(settings, model, number, parts).stream(step),
        evaluate=own.scoring_batches(held_out),
    )


@lru_cache(maxsize=8)
def _training_batches(settings: DataSettings, model: str, number: int, parts: int) -> RowBatches:
    """Tokenized once per process, and only where a client trains."""
    own = _own_data(settings, model)
    return own.training_batches(own.part(number, parts))


@lru_cache(maxsize=4)
def _own_data(settings: DataSettings, model: str) -> OwnData:
    return OwnData(settings, tokenizer(model))
