"""E2E NLG (Novikova, Dušek, Rieser 2017, arXiv:1706.09254), a part per client by flwr-datasets' partitioners.

The source is a folder with ``train.csv`` and ``valid.csv`` (columns ``mr``, ``ref``) or the name of a hub
data set. flwr-datasets is imported where partitions are made, so a process that only validates does not pay
for it.
"""

import csv
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hsplit_flwr.data.text_batches import Example
from hsplit_flwr.errors import ConfigError

IID = "iid"
"""As ``partition_by``: shuffled parts of equal size"""
MISSING = "none"
"""The label of a meaning representation without the field"""
MIN_EXAMPLES = 8
"""A smaller part makes the Dirichlet partitioner draw again"""

_COLUMNS = (
    ("mr", "ref"),
    ("meaning_representation", "human_reference"),
    ("meaning_representation", "target"),
)
"""What published copies call the meaning representation and the sentence"""
_HUB_SPLITS = {"train": "train", "valid": "validation"}
_HUB_NAME = re.compile(r"[A-Za-z0-9]([\w.-]*/)?[\w.-]*")
_FIELD = re.compile(r"\s*([^\[\],]+)\[([^\[\]]*)\]\s*(?:,|$)")


def client_examples(
    source: str,
    partition_id: int,
    *,
    num_partitions: int,
    partition_by: str = "food",
    alpha: float = 0.3,
    seed: int = 0,
) -> list[Example]:
    """The training examples of one client; every example belongs to exactly one client.

    ``partition_by`` is a field of the meaning representation (label skew with Dirichlet(``alpha``) shares, a
    missing field counting as the label ``"none"``) or ``"iid"``. Take a field with few values: one example
    cannot be shared. The arguments alone decide the parts, in every process.

    Raises:
        ConfigError: a source, file, column or field that is not there, or parts that cannot be made.
    """
    if not 0 <= partition_id < num_partitions:
        raise ConfigError(f"Expected partition_id from 0 to {num_partitions - 1}, found {partition_id}.")
    rows = _partitioner(source, num_partitions, partition_by, alpha, seed).load_partition(partition_id)
    return [_example(mr, ref) for mr, ref in zip(rows["mr"], rows["ref"], strict=True)]


def validation_examples(source: str) -> list[Example]:
    """All validation examples, in the order of the file; training has none of their representations."""
    return [_example(mr, ref) for mr, ref in _pairs(source, "valid")]


def check_partitions(
    source: str, *, num_partitions: int, partition_by: str = "food", alpha: float = 0.3, seed: int = 0
) -> None:
    """Read both parts of the data and make all clients' parts once, so that a server finds out before its clients do.

    Raises:
        ConfigError: as `client_examples` or `validation_examples` would in every client.
    """
    _partitioner(source, num_partitions, partition_by, alpha, seed)
    validation_examples(source)


def parse_mr(mr: str) -> dict[str, str]:
    """``name[The Eagle], food[French]`` -> ``{"name": "The Eagle", "food": "French"}``."""
    fields, end = {}, 0
    while end < len(mr) and (match := _FIELD.match(mr, end)):
        fields[match[1]], end = match[2], match.end()
    if end < len(mr) or not fields:
        raise ConfigError(
            f"Expected a meaning representation such as 'name[The Eagle], food[French]', found {mr!r}. "
            "Check that the columns mr and ref are not swapped."
        )
    return fields


def _example(mr: str, ref: str) -> Example:
    return Example(mr, ref, parse_mr(mr))


@lru_cache(maxsize=1)  # a simulation actor asks for the same partitions in every round
def _partitioner(source: str, num_partitions: int, partition_by: str, alpha: float, seed: int) -> Any:
    """A flwr-datasets partitioner that holds the training pairs, its parts decided."""
    examples = [_example(mr, ref) for mr, ref in _pairs(source, "train")]
    if num_partitions > len(examples):
        raise ConfigError(f"Expected at most {len(examples)} partitions (examples), found {num_partitions}.")
    known = sorted({name for example in examples for name in example.slots})
    if partition_by not in (IID, *known):
        raise ConfigError(f"Expected partition_by to be {IID!r} or one of {known}, found {partition_by!r}.")

    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    columns = {"mr": [e.mr for e in examples], "ref": [e.ref for e in examples]}
    columns["label"] = [e.slots.get(partition_by, MISSING) for e in examples]
    # Shuffled, because IidPartitioner cuts contiguous parts and the file is sorted by meaning representation.
    dataset = Dataset.from_dict(columns).shuffle(seed=seed)
    if partition_by == IID:
        partitioner = IidPartitioner(num_partitions)
        partitioner.dataset = dataset
        return partitioner
    try:
        partitioner = DirichletPartitioner(num_partitions, "label", float(alpha), MIN_EXAMPLES, seed=seed)
        partitioner.dataset = dataset
        with warnings.catch_warnings():  # one per draw, with all alphas; the error below says it once
            warnings.filterwarnings("ignore", message="The specified min_partition_size")
            partitioner.load_partition(0)
    except ValueError as error:
        raise ConfigError(
            f"Expected {num_partitions} parts of at least {MIN_EXAMPLES} examples by {partition_by!r} with "
            f"alpha={alpha}, found none: {error} Lower num_partitions or raise alpha (dirichlet-alpha)."
        ) from error
    return partitioner


def _pairs(source: str, split: str) -> list[tuple[str, str]]:
    """(meaning representation, sentence) of every row of the split."""
    if Path(source).is_dir():
        return _csv_pairs(Path(source) / f"{split}.csv")
    if not _HUB_NAME.fullmatch(source):
        raise ConfigError(f"Expected a folder with train.csv and valid.csv, found no folder {source!r}.")
    from datasets import load_dataset

    try:
        rows = load_dataset(source, split=_HUB_SPLITS[split])
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a folder or a hub data set with a {_HUB_SPLITS[split]!r} split, found neither at "
            f"{source!r}: {error} Offline, give the folder that holds train.csv and valid.csv."
        ) from error
    mr, ref = _mr_and_ref(rows.column_names, source)
    return list(zip(rows[mr], rows[ref], strict=True))


def _csv_pairs(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise ConfigError(f"Expected the file {path.name} in {path.parent}, found none. Give E2E NLG's folder as data.")
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        mr, ref = _mr_and_ref(reader.fieldnames or [], path.name)
        pairs = [(row[mr], row[ref]) for row in reader]
    if not pairs:
        raise ConfigError(f"Expected at least one row in {path}, found none.")
    for row, pair in enumerate(pairs, start=1):
        if not pair[1]:
            raise ConfigError(f"Expected a sentence in row {row} of {path.name}, found none. Complete the file.")
    return pairs


def _mr_and_ref(found: Sequence[str], where: str) -> tuple[str, str]:
    for mr, ref in _COLUMNS:
        if mr in found and ref in found:
            return mr, ref
    raise ConfigError(f"Expected the columns mr and ref in {where}, found {list(found)}. Rename the columns.")
