"""Which client has which examples, by the partitioners of flwr-datasets.

flwr-datasets is imported where parts are made. The arguments alone decide them, in every process.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsplit_flwr.common.checks import is_above, require
from hsplit_flwr.data.forms import Chat, Document, Example, Instruction, Pair
from hsplit_flwr.errors import ConfigError

PARTITIONS = ("iid", "dirichlet", "natural")
LENGTH = "length"
"""as ``by``: the quarter of the examples, by their length in characters, that an example belongs to"""
MISSING = "none"
"""the label of an example without the column"""
_QUARTERS = 4


@dataclass(frozen=True)
class Partition:
    """How examples are divided."""

    kind: str = "iid"
    """``iid``: shuffled parts of equal size; ``dirichlet``: Dirichlet shares of every label; ``natural``: all examples
    of one value together"""
    by: str = LENGTH
    """the column of the label or value, or `LENGTH`; without meaning for ``iid``"""
    alpha: float = 0.3
    """concentration of the Dirichlet shares; smaller is less IID"""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.kind in PARTITIONS, "partition", f"as one of {PARTITIONS}", self.kind)
        require(is_above(self.alpha, 0), "dirichlet_alpha", "> 0", self.alpha)


def divide(examples: Sequence[Example], parts: int, partition: Partition) -> list[list[Example]]:
    """`examples` in `parts` parts, each with at least one of them; every example is in exactly one.

    Raises:
        ConfigError: fewer examples, labels or values than parts, no such column, or no such shares.
    """
    if parts > len(examples):
        raise ConfigError(
            f"Expected at least one example for each of {parts} clients, found {len(examples)}. Give more data or "
            "fewer clients."
        )
    if parts == 1:
        return [list(examples)]
    rows = _DIVIDERS[partition.kind](examples, parts, partition)
    return [[examples[row] for row in part] for part in rows]


def labels_of(examples: Sequence[Example], by: str) -> list[str]:
    """The label of every example.

    Raises:
        ConfigError: no example has such a column.
    """
    if by == LENGTH:
        lengths = [characters(example.document) for example in examples]
        borders = np.quantile(lengths, np.arange(1, _QUARTERS) / _QUARTERS)
        return [str(quarter) for quarter in np.searchsorted(borders, lengths)]
    if not any(by in example.columns for example in examples):
        known = sorted({str(column) for example in examples for column in example.columns})
        raise ConfigError(f"Expected partition-by as {LENGTH!r} or one of the columns {known}, found {by!r}.")
    values = [example.columns.get(by) for example in examples]
    return [MISSING if value is None else str(value) for value in values]


def characters(document: Document) -> int:
    """The length of a document."""
    if isinstance(document, Chat):
        return sum(len(str(message.get("content", ""))) for message in document.messages)
    if isinstance(document, Instruction):
        return len(document.instruction) + len(document.context) + len(document.output)
    return len(document.prompt) + len(document.completion) if isinstance(document, Pair) else len(document.text)


def _iid(examples: Sequence[Example], parts: int, partition: Partition) -> list[list[int]]:
    partitioner = _flwr_datasets().IidPartitioner(parts)
    partitioner.dataset = _dataset(["" for _ in examples]).shuffle(seed=partition.seed)
    return [list(partitioner.load_partition(part)["row"]) for part in range(parts)]


def _dirichlet(examples: Sequence[Example], parts: int, partition: Partition) -> list[list[int]]:
    partitioner = _flwr_datasets().DirichletPartitioner(parts, "label", partition.alpha, 1, seed=partition.seed)
    partitioner.dataset = _dataset(labels_of(examples, partition.by)).shuffle(seed=partition.seed)
    try:
        with warnings.catch_warnings():  # one per draw, with all alphas; the error below says it once
            warnings.filterwarnings("ignore", message="The specified min_partition_size")
            return [list(partitioner.load_partition(part)["row"]) for part in range(parts)]
    except ValueError as error:
        raise ConfigError(
            f"Expected {parts} parts of at least one example by {partition.by!r} with alpha={partition.alpha}, found "
            f"none: {error} Take fewer clients or raise alpha (dirichlet-alpha)."
        ) from error


def _natural(examples: Sequence[Example], parts: int, partition: Partition) -> list[list[int]]:
    """Values in their order, dealt out one after another: with more values than clients, a client has several."""
    labels = labels_of(examples, partition.by)
    partitioner = _flwr_datasets().NaturalIdPartitioner("label")
    partitioner.dataset = _dataset(labels)
    values = len(set(labels))
    if values < parts:
        raise ConfigError(
            f"Expected a value of {partition.by!r} for each of {parts} clients, found {values}. Take fewer clients, "
            "another partition-by, or partition=iid."
        )
    divided: list[list[int]] = [[] for _ in range(parts)]
    for value in range(values):
        divided[value % parts] += partitioner.load_partition(value)["row"]
    return divided


_DIVIDERS = {"iid": _iid, "dirichlet": _dirichlet, "natural": _natural}


def _dataset(labels: Sequence[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"row": list(range(len(labels))), "label": list(labels)})


def _flwr_datasets() -> Any:
    try:
        from flwr_datasets import partitioner
    except ImportError as error:
        raise ConfigError(
            "Expected the package flwr-datasets to divide examples, found none. Run: pip install "
            "'hsplit_flwr[finetune]', give every node its own file (data in its node config), or take one client."
        ) from error
    return partitioner
