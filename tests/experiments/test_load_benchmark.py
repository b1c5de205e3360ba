"""The benchmark of load: its arithmetic by hand, and a small round of real clients."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests.helpers.benchmarks import BENCHMARKS, benchmark

FIGURES: dict[str, Any] = {
    "clients": 2,
    "seconds": 10.0,
    "steps": 5,
    "batches": 10,
    "computing_s": 8.0,
    "waiting_s": 2.0,
    "cpu_s": {"worker": 7.5, "streams": 1.0, "grpc": 0.5},
    "alone_cpu_s": 0.7,
    "idle_bytes_per_client": 1000.0,
    "bytes_per_client": 2000.0,
}
HEADS = [
    {"seconds": 12.0, "cpu_s": 3.0, "batches": 6, "median_s": 1.0, "p95_s": 2.0, "errors": {}},
    {"seconds": 11.0, "cpu_s": 1.8, "batches": 6, "median_s": 3.0, "p95_s": 1.5, "errors": {"tail_full: x": 2}},
]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark("load", monkeypatch)


def row(load: ModuleType, machine_cpu_s: float = 18.0, **figures: Any) -> dict[str, Any]:
    found: dict[str, Any] = load.row_of({**FIGURES, **figures}, HEADS, [{"tail_full: x": 1}], machine_cpu_s)
    return found


def test_a_row_is_what_was_measured(load: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    found = row(load)
    assert (found["batches_per_s"], found["steps_per_s"]) == (1.0, 0.5)
    assert (found["median_s"], found["p95_s"]) == (2.0, 2.0)
    assert found["computing_share"] == 0.8
    assert found["cores"] == pytest.approx({"worker": 0.75, "streams": 0.1, "grpc": 0.05, "heads": 0.4})
    assert found["others_cores"] == pytest.approx(18 / 12 - 1.3)
    assert found["machine_busy_share"] == pytest.approx(0.75)
    expected = {"worker": 0.75, "streams": 0.1, "grpc": 0.05, "heads": 0.4}
    assert found["cpu_s_per_batch"] == pytest.approx(expected)
    assert found["errors"] == {"tail_full: x": 3}
    assert len(load.line_of(found)) == len(load.HEADINGS)


@pytest.mark.parametrize(
    ("figures", "machine_cpu_s", "expected"),
    [
        ({}, 18.0, "the tail's compute"),
        ({"cpu_s": {"worker": 4.0, "streams": 4.0, "grpc": 1.0}}, 18.0, "the tail's compute, short of a core or"),
        ({"computing_s": 3.0}, 12.0, "the barrier: a turn waits for its client"),
        (
            {"computing_s": 3.0, "cpu_s": {"worker": 2.0, "streams": 9.0, "grpc": 1.0}},
            23.0,
            "the cores of this machine, most of them for a Python thread for each client",
        ),
        (
            {"computing_s": 3.0, "cpu_s": {"worker": 2.0, "streams": 1.0, "grpc": 1.0}},
            24.0,
            "most of them for other work",
        ),
    ],
)
def test_the_first_bottleneck_follows_from_the_figures(
    load: ModuleType, monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any], machine_cpu_s: float, expected: str
) -> None:
    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    assert expected in row(load, machine_cpu_s, **figures)["first_bottleneck"]


def test_numbers_of_clients_are_numbers(
    load: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["load.py", "--json", "out.json", "--clients", "10,many"])
    with pytest.raises(SystemExit):
        load.asked()
    assert "Expected --clients as numbers with commas" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_round_of_real_clients(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "load.py"), "--json", str(out), "--clients", "3,5", "--batches", "9"]
    subprocess.run(command, check=True, timeout=400)
    result = json.loads(out.read_text())
    assert [found["clients"] for found in result["rows"]] == [3, 5]
    for found in result["rows"]:
        assert (found["steps"], found["batches"]) == (2, 2 * found["clients"]), "after the first of three"
        assert found["errors"] == {}
        assert found["refusals"] == {}
        assert found["dropped"] == 0
        assert found["bytes_up"] > found["bytes_down"] > 0
        assert found["computing_s"] + found["waiting_s"] == pytest.approx(found["seconds"], rel=0.05)
        assert 0 < found["cpu_s"]["worker"] <= 1.05 * found["seconds"]
        assert found["first_bottleneck"]
    here = psutil.Process()
    assert [child for child in here.children(recursive=True) if "_load_" in " ".join(child.cmdline())] == []
