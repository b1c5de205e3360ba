"""Instruction data of a run: the embedded chats of a library's desk, or a file of one's own (`data.forms`).

The loss is that of the answers alone, and rows that are too long are cut. Chats are written by the tokenizer's
template, or plainly where it has none.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hsplit_flwr.data.assets import DESK, DESK_HELD_OUT
from hsplit_flwr.data.fitting import Fit
from hsplit_flwr.data.own_data import DataSettings, OwnData
from hsplit_flwr.data.partitions import LENGTH, Partition
from hsplit_flwr.data.row_batches import spread
from hsplit_flwr.data.text_batches import Example
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.training.batch import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "desk"
"""`RunSpec.data` of the embedded chats"""
LABEL = "about"
"""their column whose values are spread unevenly (Dirichlet); of other files: the rows' lengths"""
HELD_OUT_SHARE = 0.2
"""of a file's examples, where the embedded chats have a file of their own"""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What clients train on and the server scores."""

    streams: Sequence[Callable[[int], Iterator[Batch]]]
    """of client 0, 1, ...: its endless batches from a step of the run on"""
    held_out: tuple[Example, ...]
    """meaning representations and their texts, to write texts for; none of instruction data"""
    eval_batches: Iterable[Batch]


def is_instructions(data: str) -> bool:
    """Whether that `RunSpec.data` is instruction data: the embedded chats or one file, not a folder."""
    return data == NAME or (bool(Path(data).suffix) and not Path(data).is_dir())


def instruction_data(spec: RunSpec, tokenizer: "PreTrainedTokenizerBase", clients: int, rows: int) -> RunData:
    """The data of `spec`, divided among so many `clients`; the server scores so many `rows` at a time.

    Raises:
        ConfigError: no such file, rows of no known form, fewer rows than clients, or text metrics asked for.
    """
    if spec.text_prompts:
        raise ConfigError(
            f"Expected text_prompts = 0 with the instruction data {spec.data}, found {spec.text_prompts}: an "
            "answer has one reference and no slots. Leave it out."
        )
    data = OwnData(_settings(spec, tokenizer.chat_template is None), tokenizer)
    half = [one for index, one in enumerate(data.held_out) if index % 2 == (spec.held_out == "test")]
    scored = data.scoring_batches(spread(half, spec.eval_examples), rows)
    if not scored:
        raise ConfigError(f"Expected answers to score in {spec.data}, found none held out. Give more rows.")
    streams = [data.training_batches(data.part(client, clients)).stream for client in range(clients)]
    return RunData(streams=streams, held_out=(), eval_batches=scored)


def _settings(spec: RunSpec, plain: bool) -> DataSettings:
    embedded = spec.data == NAME
    return DataSettings(
        source=str(DESK) if embedded else spec.data,
        held_out_source=str(DESK_HELD_OUT) if embedded else "",
        validation_share=HELD_OUT_SHARE,
        chat_template="plain" if plain else "",
        fit=Fit(spec.max_length),
        partition=Partition(spec.partition, LABEL if embedded else LENGTH, spec.alpha, spec.seed),
        batch_size=spec.batch_size,
        seed=spec.seed,
    )
