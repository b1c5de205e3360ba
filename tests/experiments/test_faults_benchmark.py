"""The benchmark of faults: how it judges what a run left, and what it does to links."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.benchmarks import benchmark

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark("_faults_rows", monkeypatch)


def left(folder: Path, rows: ModuleType, *, adapter: bytes = b"a", status: str = "completed", **record: Any) -> Any:
    """What a run leaves in `folder`, and that it has ended."""
    for name, content in zip(rows.RESULTS, (adapter, b"merged"), strict=True):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    scores = {"central_perplexity": 3.0, "federated_perplexity": 4.0, "clients": ["0", "1"], "failures": [], **record}
    summary = {"status": status, "history": [scores] * rows.ROUNDS}
    (folder / "summary.json").write_text(json.dumps(summary))
    return rows.Finished(folder, seconds=10.0, hangs=False, log=folder / "log", summary=summary)


def test_what_becomes_of_a_run(rows: ModuleType, tmp_path: Path) -> None:
    reference = left(tmp_path / "reference", rows)
    same = left(tmp_path / "same", rows)
    one_bit = left(tmp_path / "bit", rows, adapter=b"b")
    scored_otherwise = left(tmp_path / "scores", rows, federated_perplexity=4.0000001)
    nobody = left(tmp_path / "nobody", rows, adapter=b"b", clients=[])
    broken = left(tmp_path / "broken", rows, status="running")
    hung = replace(same, hangs=True)
    gone = replace(same, folder=tmp_path / "gone", summary={})
    outcomes = [
        ([same], "survived_exact"),
        ([one_bit], "survived_reweighted"),
        ([scored_otherwise], "survived_reweighted"),
        ([nobody], "lost"),
        ([broken, same], "resumed_exact"),
        ([gone, same], "resumed_exact"),
        ([broken, one_bit], "lost"),
        ([broken, broken], "lost"),
        ([gone], "lost"),
        ([hung], "lost"),
        ([hung, same], "lost"),
    ]
    for runs, outcome in outcomes:
        assert rows.outcome_of(runs, reference.folder) == outcome, (runs, outcome)


def test_patterns_choose_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = benchmark("faults", monkeypatch).chosen
    assert len(chosen("*/*")) == 12 * 5
    assert chosen("cut-*/upload,flwr-stop/load") == [
        ("cut-one", "upload"),
        ("cut-all", "upload"),
        ("flwr-stop", "load"),
    ]
    assert chosen("nothing") == []


# --- links ---


@contextmanager
def echo() -> Iterator[int]:
    """A server that says what it is told; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(connection: socket.socket) -> None:
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), 5.0)
    connection.settimeout(20.0)
    return connection


def heard(connection: socket.socket, size: int) -> int:
    """Bytes that come back of `size`."""
    connection.sendall(bytes(size))
    count = 0
    while count < size and (data := connection.recv(1 << 16)):
        count += len(data)
    return count


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_a_link_breaks_for_its_node_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    links_module = benchmark("_faults_links", monkeypatch)
    with echo() as port, links_module.Links(2, port, port, lambda _: 0) as links:
        one, other = (connected(links.superlink_address(node)) for node in range(2))
        tail = connected(links.tail_address)
        assert [heard(end, 100) for end in (one, other, tail)] == [100] * 3
        links.cut([0], 0.2)
        assert is_closed(one)
        assert is_closed(tail)  # by its owner
        assert heard(other, 100) == 100
        with connected(links.superlink_address(0)) as again:
            assert heard(again, 100) == 100
        cutting = threading.Thread(target=links.cut, args=([0], 1.0))
        cutting.start()
        time.sleep(0.3)
        started = time.monotonic()
        with connected(links.superlink_address(0)) as meanwhile:
            assert heard(meanwhile, 100) == 100  # late
        assert time.monotonic() - started > 0.5
        cutting.join()
        other.close()


def test_a_link_is_as_slow_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    links_module = benchmark("_faults_links", monkeypatch)
    with echo() as port, links_module.Links(1, port, port, lambda _: 0) as links:
        links.limit([0], 50e3)
        with connected(links.superlink_address(0)) as connection:
            started = time.monotonic()
            assert heard(connection, 50_000) == 50_000
            assert time.monotonic() - started > 0.9
            links.limit([0], None)
            started = time.monotonic()
            assert heard(connection, 50_000) == 50_000
            assert time.monotonic() - started < 0.9
