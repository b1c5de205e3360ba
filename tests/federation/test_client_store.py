"""A client's copy of the weight delta on its disk: bit-equal to one in memory, or gone and said to be gone."""

import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hsplit_flwr.federation import client_store
from hsplit_flwr.federation.client_store import FileStore
from hsplit_flwr.federation.delta_folder import Stamp
from hsplit_flwr.lora.delta_log import DeltaLog
from hsplit_flwr.lora.delta_update import DeltaReplica, DeltaUpdate
from hsplit_flwr.lora.factors import LoraFactors
from tests.helpers.full_disk import no_file_beyond

SHAPES = {"h.0.q": (16, 16), "h.0.up": (24, 12), "h.1.q": (16, 16)}
ROUNDS = 14
"""after which the matrices of block 0 are dense; that of block 1, which changes in every other round, is not"""


@pytest.fixture(autouse=True)
def nothing_said_yet_and_never_just_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_store, "_said", set())
    monkeypatch.setattr(client_store, "CLEANING_S", 0.0)


def factors(name: str, seed: int, rank: int = 1) -> LoraFactors:
    d_out, d_in = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), 1.0)


def log_after(rounds: int, seed: int = 0) -> DeltaLog:
    log = DeltaLog()
    for number in range(rounds):
        log.append({name: factors(name, 1000 * seed + number) for name in list(SHAPES)[: 2 + number % 2]})
    return log


def update(replica: DeltaReplica, log: DeltaLog) -> DeltaUpdate:
    """Bring `replica` up to date, as a client does it; returns what it was sent."""
    lacking = log.since(replica.version, SHAPES)
    received = DeltaUpdate.from_tensors(lacking.to_tensors(), SHAPES, base=lacking.base, version=lacking.version)
    replica.apply(received, SHAPES)
    return received


def play(store: FileStore, log: DeltaLog, run: str = "run", client: str = "0") -> str:
    """A round of a client; returns what kind of update it got."""
    with store.open(run, client, SHAPES) as replica:
        return update(replica, log).kind


def assert_equal(found: DeltaReplica, expected: DeltaReplica) -> None:
    assert (found.version, found.names) == (expected.version, expected.names)
    ours, theirs = found.total.to_tensors(), expected.total.to_tensors()
    assert ours.keys() == theirs.keys()
    assert [key for key, tensor in theirs.items() if not torch.equal(ours[key], tensor)] == []


def copies(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def test_every_round_it_holds_what_a_client_that_never_ended_holds(tmp_path: Path) -> None:
    in_memory, log, kinds = DeltaReplica(), DeltaLog(), []
    for number in range(ROUNDS):
        log.append({name: factors(name, number) for name in list(SHAPES)[: 2 + number % 2]})
        update(in_memory, log)
        with FileStore(tmp_path).open("run", "0", SHAPES) as replica:  # a new process in every round
            kinds.append(update(replica, log).kind)
            assert_equal(replica, in_memory)
        with FileStore(tmp_path).open("run", "0", SHAPES) as replica:
            assert_equal(replica, in_memory)
    assert kinds == ["whole"] + ["increments"] * (ROUNDS - 1)
    (folder,) = copies(tmp_path)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert len(list(folder.glob("*.safetensors"))) == 2 + ROUNDS // 2  # and nothing of older versions
    assert len(list(folder.glob("*.json"))) == 1


def overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def other_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 14', '"version": 13'))


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a bit of a matrix": ("*.safetensors", overwrite),
    "half a matrix": ("*.safetensors", cut_short),
    "no matrix": ("*.safetensors", Path.unlink),
    "a bit of the list": ("*.json", overwrite),
    "half the list": ("*.json", cut_short),
    "the list of another version": ("*.json", other_version),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_none(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    log = log_after(ROUNDS)
    assert play(FileStore(tmp_path), log) == "whole"
    pattern, harm = DAMAGES[damage]
    (folder,) = copies(tmp_path)
    harm(sorted(folder.glob(pattern))[0])
    with FileStore(tmp_path).open("run", "0", SHAPES) as replica:
        assert (replica.version, replica.total.names()) == (None, [])
        assert "damaged, it takes the whole" in caplog.text
        update(replica, log)
    expected = DeltaReplica()
    update(expected, log)
    with FileStore(tmp_path).open("run", "0", SHAPES) as replica:  # and the whole is kept again
        assert_equal(replica, expected)


class NotedStamp:
    """A client's memory of what it kept."""

    def __init__(self) -> None:
        self.stamp: Stamp | None = None

    def read(self, client: str) -> Stamp | None:
        return self.stamp

    def write(self, client: str, stamp: Stamp) -> None:
        self.stamp = stamp


def test_the_copy_of_another_state_folder_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    """Both are whole, and of the same client, run and version; only what was noted tells them apart."""
    notes = NotedStamp()
    play(FileStore(tmp_path / "own", notes=notes), log_after(3))
    assert notes.stamp
    assert (notes.stamp.run, notes.stamp.version, notes.stamp.name) == ("run", 3, copies(tmp_path / "own")[0].name)
    play(FileStore(tmp_path / "other"), log_after(3, seed=7))
    with FileStore(tmp_path / "other", notes=notes).open("run", "0", SHAPES) as replica:
        assert replica.version is None
    with FileStore(tmp_path / "own", notes=notes).open("run", "0", SHAPES) as replica:
        assert replica.version == 3


def test_a_round_that_fails_leaves_the_version_before_it(tmp_path: Path) -> None:
    log = log_after(3)
    play(FileStore(tmp_path), log)
    log.append({"h.0.q": factors("h.0.q", 77)})

    def fail() -> None:
        with FileStore(tmp_path).open("run", "0", SHAPES) as replica:
            update(replica, log)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert play(FileStore(tmp_path), log) == "increments"


def test_what_comes_in_can_wait_on_the_disk(tmp_path: Path) -> None:
    """A new client of a late round gets dense matrices of its whole head, which need not fit into memory at once."""
    log = log_after(ROUNDS)
    expected = DeltaReplica()
    update(expected, log)
    lacking = log.since(None, SHAPES)
    with FileStore(tmp_path).open("run", "0", SHAPES) as replica:
        waiting = {key: replica.total.place.aside(tensor) for key, tensor in lacking.to_tensors().items()}
        assert all(torch.equal(waiting[key], tensor) for key, tensor in lacking.to_tensors().items())
        assert not any(tensor.data_ptr() == waiting[key].data_ptr() for key, tensor in lacking.to_tensors().items())
        assert list(copies(tmp_path)[0].iterdir()) == []
        replica.apply(DeltaUpdate.from_tensors(waiting, SHAPES, base=None, version=log.version), SHAPES)
        assert_equal(replica, expected)
    with FileStore(tmp_path).open("run", "0", SHAPES) as replica:
        assert_equal(replica, expected)


def test_a_head_of_other_blocks(tmp_path: Path) -> None:
    """A shallower one finds what it needs; a deeper one lacks modules that the server believes it to hold."""
    log = log_after(3)
    shallow = {name: SHAPES[name] for name in ("h.0.q", "h.0.up")}
    play(FileStore(tmp_path), log)
    with FileStore(tmp_path).open("run", "0", shallow) as replica:
        assert (replica.version, sorted(replica.total.names())) == (3, ["h.0.q", "h.0.up"])
        replica.apply(log.since(3, shallow), shallow)
    with FileStore(tmp_path).open("run", "0", SHAPES) as replica:
        assert replica.version is None


def test_runs_and_clients_do_not_meet(tmp_path: Path) -> None:
    logs = {(run, client): log_after(2 + i + 2 * j) for i, run in enumerate("ab") for j, client in enumerate("01")}
    for (run, client), log in logs.items():
        assert play(FileStore(tmp_path), log, run, client) == "whole"
    for (run, client), log in logs.items():
        expected = DeltaReplica()
        update(expected, log)
        with FileStore(tmp_path).open(run, client, SHAPES) as replica:
            assert_equal(replica, expected)


# --- processes ---


def hold(folder: Path, ready: "multiprocessing.synchronize.Event", end: "multiprocessing.synchronize.Event") -> None:
    with FileStore(folder).open("run", "0", SHAPES) as replica:
        update(replica, log_after(4))
        ready.set()
        end.wait(60)


def test_two_processes_with_one_client_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A simulation's actor still trains client 0 as another one is told to score it: that one gets the whole."""
    play(FileStore(tmp_path), log_after(3))
    spawn = multiprocessing.get_context("spawn")
    ready, end = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(tmp_path, ready, end))
    other.start()
    try:
        assert ready.wait(60)
        monkeypatch.setattr(client_store, "LOCK_LIMIT_S", 0.1)
        assert play(FileStore(tmp_path), log_after(5)) == "whole"
        assert "another process uses" in caplog.text
    finally:
        end.set()
        other.join(60)
    assert other.exitcode == 0
    with FileStore(tmp_path).open("run", "0", SHAPES) as replica:
        assert replica.version == 4


def test_a_process_that_was_killed_leaves_the_version_before_it(tmp_path: Path) -> None:
    play(FileStore(tmp_path), log_after(3))
    spawn = multiprocessing.get_context("spawn")
    ready, end = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(tmp_path, ready, end))
    other.start()
    assert ready.wait(60)
    other.kill()
    other.join(60)
    (folder,) = copies(tmp_path)
    (folder / ".unfinished").write_bytes(b"half a file")
    assert play(FileStore(tmp_path), log_after(4)) == "increments"
    assert not (folder / ".unfinished").exists()


# --- room ---


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    for number in range(1, 4):
        assert play(FileStore(tmp_path / "file" / "state"), log_after(number)) == "whole"
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "state-dir" in warnings[0].message
    assert str(tmp_path / "file" / "state") in warnings[0].message


def test_a_full_disk_costs_bytes_not_the_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, expected = log_after(ROUNDS), DeltaReplica()
    update(expected, log)
    play(FileStore(tmp_path), log_after(ROUNDS - 1))
    with no_file_beyond(600), FileStore(tmp_path).open("run", "0", SHAPES) as replica:
        assert update(replica, log).kind == "increments"
        assert_equal(replica, expected)
    assert "keeps no weight delta" in caplog.text
    (folder,) = copies(tmp_path)
    assert list(folder.iterdir()) == []
    assert play(FileStore(tmp_path), log) == "whole"
    assert play(FileStore(tmp_path), log) == "increments"


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_store_beyond_its_limit_lets_the_oldest_go(tmp_path: Path) -> None:
    play(FileStore(tmp_path), log_after(ROUNDS), client="0")
    one = bytes_of(tmp_path)
    for client in "123":
        play(FileStore(tmp_path, limit_bytes=int(2.5 * one)), log_after(ROUNDS), client=client)
    assert bytes_of(tmp_path) <= 2.5 * one
    assert [play(FileStore(tmp_path), log_after(ROUNDS), client=c) for c in "32"] == ["increments"] * 2
    assert [play(FileStore(tmp_path), log_after(ROUNDS), client=c) for c in "01"] == ["whole"] * 2


def test_one_client_beyond_the_limit_keeps_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert play(FileStore(tmp_path, limit_bytes=500), log_after(ROUNDS)) == "whole"
    assert bytes_of(tmp_path) <= 500
    assert caplog.text.count("state-limit-gb") == 1


def test_copies_that_nobody_uses_any_more_are_removed(tmp_path: Path) -> None:
    """That of a client's older run after a day, any after a week."""
    days = {("old", "0"): 2, ("recent", "0"): 0.5, ("other", "1"): 2, ("other", "2"): 8}
    for (run, client), age in days.items():
        play(FileStore(tmp_path), log_after(3), run, client)
        (new,) = [path for path in copies(tmp_path) if path.stat().st_mtime > time.time() - 3600]
        for path in [*new.iterdir(), new]:
            os.utime(path, (time.time() - age * 86400,) * 2)
    play(FileStore(tmp_path), log_after(3), "new", "0")
    kinds = {key: play(FileStore(tmp_path), log_after(3), *key) for key in days}
    assert kinds == {
        ("old", "0"): "whole",
        ("recent", "0"): "increments",
        ("other", "1"): "increments",
        ("other", "2"): "whole",
    }


def test_nothing_in_it_is_executable_content(tmp_path: Path) -> None:
    """Lists are JSON, matrices safetensors, names hashes: whatever ids a server makes up, no path comes of them."""
    play(FileStore(tmp_path / "state"), log_after(2), run="../../run", client="../client\n")
    (folder,) = copies(tmp_path / "state")
    (listed,) = folder.glob("*.json")
    assert json.loads(listed.read_text())["client"] == "../client\n"
    assert copies(tmp_path) == [tmp_path / "state"]
    shutil.rmtree(folder)
    assert play(FileStore(tmp_path / "state"), log_after(2), run="../../run", client="../client\n") == "whole"
