"""What all methods of a comparison share: model, data, devices, training settings."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hsplit_flwr.data.e2e import client_examples, validation_examples
from hsplit_flwr.data.metar import metar_examples
from hsplit_flwr.data.relexified import relexified_examples
from hsplit_flwr.data.restaurants import partition_by_slot, restaurant_examples
from hsplit_flwr.data.text_batches import Example, TextBatches
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.instructions import RunData, instruction_data, is_instructions
from hsplit_flwr.experiments.methods import METHODS, Method
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.experiments.settings import SETTINGS, Setting, round_weight
from hsplit_flwr.models.assets import smollm2_checkpoint, tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.workload import Workload

Item = TypeVar("Item")
MODELS: Mapping[str, Callable[[], Path]] = {"tiny": tiny_checkpoint, "smollm2": smollm2_checkpoint}
LABEL = "food"
"""the field of the meaning representation whose values are spread unevenly (Dirichlet)"""


class EmbeddedData(NamedTuple):
    """A data set that the package brings."""

    examples: Callable[[], tuple[list[Example], list[Example]]]
    """-> the clients' examples, and the held-out ones"""
    label: str
    """what `LABEL` is for other data"""


EMBEDDED: Mapping[str, EmbeddedData] = {
    "": EmbeddedData(restaurant_examples, LABEL),
    "metar": EmbeddedData(metar_examples, "station"),
    "relexified": EmbeddedData(relexified_examples, LABEL),
}
"""`RunSpec.data` -> the data set; `records.EMBEDDED_DATA` has the names"""
RANKS = (1, 2, 4, 8, 16)
"""candidates of the planner"""
RANK = 8
"""where one rank serves all"""
LARGEST_RANK = 16
"""the largest candidate, and the mean of the planned tail's ranks: a server can afford it, as CenLoRA's does"""
LORA_ALPHA = 16.0
"""alpha of adapters that are merged every round, and where all have one rank"""
SCALING = LORA_ALPHA / RANK
"""alpha / r of whole-model adapters that are carried from round to round: what is averaged needs one for all ranks"""
EVAL_BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run's surroundings."""

    spec: RunSpec
    device: str = "cpu"
    """where models compute"""
    files: ModelFiles
    costs: ModelCosts
    setting: Setting
    devices: Mapping[str, Budget]
    """client id -> its device"""
    server: Budget
    min_cut: int
    """blocks that every head holds at least"""
    round_weight: float
    """how often what a client exchanges once a round counts on the clock (`settings.round_weight`)"""
    training: TrainingConfig
    streams: Mapping[str, Callable[[int], Iterator[Batch]]]
    """client id -> its endless batches from a step of the run on"""
    held_out: tuple[Example, ...]
    """the server's, of which no client has a meaning representation: the half that the spec names; none of
    instruction data"""
    eval_batches: Iterable[Batch]

    @classmethod
    def of(cls, spec: RunSpec, method: Method | None = None, device: str = "cpu") -> "Task":
        """The surroundings that `spec` describes; `method` is the one that it names, unless a variant is given.

        Raises:
            ConfigError: an unknown setting, a data set, model or device that is not there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("Expected a GPU that torch sees, found none. Leave --device out, or give --device cpu.")
        if spec.setting not in SETTINGS:
            raise ConfigError(f"Expected a setting among {sorted(SETTINGS)}, found {spec.setting!r}.")
        setting = SETTINGS[spec.setting]
        files = ModelFiles.resolve(str(MODELS[spec.model]()) if spec.model in MODELS else spec.model)
        training = TrainingConfig(
            rounds=spec.rounds,
            local_steps=spec.local_steps,
            learning_rate=spec.learning_rate,
            warmup_steps=spec.warmup_steps,
            seed=spec.seed,
            **(method or METHODS[spec.method]).training_settings(),
        )
        workload = Workload.of(training, batch_size=spec.batch_size, sequence_length=spec.max_length)
        costs = ModelCosts(files.config, workload)
        devices = setting.devices(costs)
        prepare = instruction_data if is_instructions(spec.data) else _text_data
        data = prepare(spec, files.tokenizer(), len(devices), EVAL_BATCH_SIZE)
        return cls(
            spec=spec,
            device=device,
            files=files,
            costs=costs,
            setting=setting,
            devices=devices,
            server=setting.server(costs),
            min_cut=setting.min_cut(costs.num_blocks),
            round_weight=round_weight(costs),
            training=training,
            streams=dict(zip(devices, data.streams, strict=True)),
            held_out=data.held_out,
            eval_batches=data.eval_batches,
        )


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of `items`, evenly spaced; all if there are no more."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _half(examples: list[Example], name: str) -> list[Example]:
    """Every other meaning representation, with all its examples."""
    order = {mr: index for index, mr in enumerate(sorted({example.mr for example in examples}))}
    return [example for example in examples if order[example.mr] % 2 == (name == "test")]


def _text_data(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, clients: int, rows: int) -> RunData:
    """Data-to-text examples: see `instruction_data`, with its arguments."""
    parts, unseen = _data(spec, clients)
    held_out = _half(unseen, spec.held_out)

    def batches(examples: list[Example], batch_size: int, shuffle: bool) -> TextBatches:
        return TextBatches(
            examples, tokenizer, batch_size=batch_size, max_length=spec.max_length, seed=spec.seed, shuffle=shuffle
        )

    return RunData(
        streams=[batches(part, spec.batch_size, shuffle=True).stream for part in parts],
        held_out=tuple(held_out),
        eval_batches=batches(spread(held_out, spec.eval_examples), rows, shuffle=False),
    )


def _data(spec: RunSpec, clients: int) -> tuple[list[list[Example]], list[Example]]:
    """A part per client, and the held-out examples."""
    if spec.data not in EMBEDDED:
        label = "iid" if spec.partition == "iid" else LABEL
        options = {"num_partitions": clients, "partition_by": label, "alpha": spec.alpha, "seed": spec.seed}
        parts = [client_examples(spec.data, client, **options) for client in range(clients)]  # type: ignore[arg-type]
        return parts, validation_examples(spec.data)
    embedded = EMBEDDED[spec.data]
    train, held_out = embedded.examples()
    if spec.partition == "iid":
        order = np.random.default_rng(spec.seed).permutation(len(train))
        return [[train[index] for index in order[client::clients]] for client in range(clients)], held_out
    return partition_by_slot(train, embedded.label, clients, spec.alpha, spec.seed), held_out
