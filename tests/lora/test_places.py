"""A delta in files is that in memory, bit for bit, and leaves nothing behind."""

import gc
from pathlib import Path

import pytest
import torch

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.delta_log import DeltaLog
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.places import ScratchFolder, StoredMatrix
from tests.helpers.full_disk import no_file_beyond
from tests.helpers.states import through_disk

SHAPES = {"h.0.q": (16, 16), "h.0.up": (24, 12), "h.1.q": (16, 16)}


def increment(number: int) -> dict[str, LoraFactors]:
    """Of a round: not every matrix, and some of rank 0."""
    generator = torch.Generator().manual_seed(number)
    rank = number % 3
    return {
        name: LoraFactors(
            torch.randn(rank, SHAPES[name][1], generator=generator),
            torch.randn(SHAPES[name][0], rank, generator=generator),
            0.7,
        )
        for name in list(SHAPES)[: 2 + number % 2]
    }


def in_files(folder: Path) -> DeltaLog:
    return DeltaLog(WeightDelta(place=ScratchFolder(folder)))


def assert_same_updates(found: DeltaLog, expected: DeltaLog, first: int = 0) -> None:
    """The same to every client, of every version since `first`."""
    assert found.version == expected.version
    assert first or found.nbytes == expected.nbytes
    for version in (None, *range(first, expected.version + 1)):
        ours, theirs = (log.since(version, SHAPES) for log in (found, expected))
        assert (ours.base, ours.nbytes, ours.names()) == (theirs.base, theirs.nbytes, theirs.names())
        tensors = theirs.to_tensors()
        assert [key for key, tensor in ours.to_tensors().items() if not torch.equal(tensor, tensors[key])] == []


def test_a_log_in_files_equals_one_in_memory_in_every_round_and_after_a_resume(tmp_path: Path) -> None:
    log, expected = in_files(tmp_path), DeltaLog()
    first = 0
    for number in range(40):
        for one in (log, expected):
            one.append(increment(number))
        if number % 5 == 4:
            assert_same_updates(log, expected, first)
        if number == 20:
            state = through_disk(log.state(), tmp_path / "run")
            log = in_files(tmp_path / "resumed")
            log.load_state(state, SHAPES)
            first = log.version


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_file_lives_as_long_as_somebody_needs_it(tmp_path: Path) -> None:
    log = in_files(tmp_path)
    for number in range(1, 30):
        log.append(increment(number))
    update = log.since(None, SHAPES)  # on its way to a client
    expected = {key: tensor.clone() for key, tensor in update.to_tensors().items()}
    before = set(files(tmp_path))
    log.append(increment(31))
    assert before - set(files(tmp_path)) == set()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in update.to_tensors().items())
    del update
    gc.collect()
    assert before - set(files(tmp_path))
    del log
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".delta-killed").mkdir()
    (tmp_path / ".delta-killed" / "1.safetensors").write_bytes(b"")
    (tmp_path / "results").mkdir()
    log = in_files(tmp_path)
    log.append(increment(1))
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".delta-")]
    assert [path.name for path in left] != [".delta-killed"]
    assert len(left) == 1
    assert (tmp_path / "results").exists()


def test_what_cannot_be_written_stays_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, expected = in_files(tmp_path), DeltaLog()
    for number in range(30):
        expected.append(increment(number))
        if number in range(12, 20):
            with no_file_beyond(100):
                log.append(increment(number))
        else:
            log.append(increment(number))
    assert_same_updates(log, expected)
    assert caplog.text.count("stays in memory") == 1


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(AggregationError, match=r"part of the weight delta in .*gone\.safetensors"):
        StoredMatrix(tmp_path / "gone.safetensors").read()
