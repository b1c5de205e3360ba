import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments import runner
from hsplit_flwr.experiments.evidence.store import Store, key_of
from hsplit_flwr.experiments.main import main
from hsplit_flwr.experiments.records import Evaluation, RunSpec
from hsplit_flwr.experiments.runner import describe, pending, run_all, seconds_left
from hsplit_flwr.experiments.workers import Finished, OnRound, RoundDone, WorkerPool

ROOT = Path(__file__).parents[2]
FOLDER = "RUNNER_TEST_FOLDER"
"""environment variable: where fake runs leave marks"""
Value = TypeVar("Value")
LONG = 120.0
"""seconds; nobody waits for them"""


def fake_run(spec: RunSpec, on_round: OnRound) -> list[Evaluation]:
    """Does what the name of the method says, in a worker process."""
    match spec.method:
        case "raises":
            raise ValueError("too\nbad")
        case "refuses":
            raise ConfigError("Expected this, found that.")
        case "is_killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exits":
            sys.exit(3)
        case "is_empty":
            return []
        case "is_odd":
            return [lambda: None]  # type: ignore[list-item]  # cannot be sent
        case "takes_long":
            Path(os.environ[FOLDER], f"pid-{spec.seed}").write_text(str(os.getpid()))
            time.sleep(LONG)
        case "tells_threads":
            assert "torch" not in sys.modules
            return [evaluation(0, tokens=int(os.environ["OMP_NUM_THREADS"]))]
    done = [evaluation(number) for number in range(spec.rounds + 1)]
    for each in done[1:]:
        on_round(each)
    return done


def evaluation(number: int, tokens: int = 0) -> Evaluation:
    return replace(Evaluation.untrained(100.0 / (number + 1)), round=number, tokens=tokens)


def quick_run(spec: RunSpec, on_round: OnRound) -> list[Evaluation]:
    """`fake_run`, whatever the method's name says."""
    return [evaluation(number) for number in range(spec.rounds + 1)]


def spec(method: str = "quick", seed: int = 0) -> RunSpec:
    return RunSpec(method, "alike", "iid", seed, 0.003, rounds=2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results.csv")


def stored(store: Store) -> list[tuple[str, int]]:
    """Method and seed of every run in the store; each must be whole."""
    rows = store.rows()
    runs = list(dict.fromkeys(row.spec for row in rows))
    for run in runs:
        assert [row.evaluation.round for row in rows if row.spec == run] == list(range(run.rounds + 1))
    return [(run.method, run.seed) for run in runs]


def test_missing_runs_are_computed_and_stored_ones_skipped(store: Store) -> None:
    lines: list[str] = []
    first = run_all([spec(seed=0), spec(seed=1)], store, fake_run, report=lines.append)
    assert (first.finished, first.skipped, first.failures, first.exit_code) == (2, 0, (), 0)
    assert stored(store) == [("quick", 0), ("quick", 1)]
    assert lines[0] == "2 runs: 0 in results.csv already, 2 to do"
    assert lines[1].startswith("1/2  quick alike iid seed 0 lr 0.003: perplexity 33.333, 0:0")
    assert lines[1].endswith(" left")
    assert lines[2].startswith("2/2  quick alike iid seed 1 lr 0.003: perplexity 33.333, 0:0")
    assert not lines[2].endswith(" left")
    assert lines[3:] == ["2 finished, 0 skipped, 0 failed"]

    second = run_all([spec(seed=seed) for seed in (0, 1, 2, 2)], store, fake_run, report=lines.append)
    assert (second.finished, second.skipped) == (1, 3)  # the fourth is the third again
    assert stored(store) == [("quick", 0), ("quick", 1), ("quick", 2)]


def test_failures_are_reported_and_stop_nothing(store: Store) -> None:
    lines: list[str] = []
    specs = [spec(method) for method in ("raises", "refuses", "exits", "is_empty", "is_odd", "is_killed", "quick")]
    outcome = run_all(specs, store, fake_run, report=lines.append)
    assert outcome.exit_code == 1
    assert stored(store) == [("quick", 0)]
    errors = {failure.spec.method: failure.error for failure in outcome.failures}
    assert list(errors) == ["raises", "refuses", "exits", "is_empty", "is_odd", "is_killed"]
    assert errors["raises"].startswith("ValueError: too bad (test_runner.py:")
    assert errors["refuses"] == "Expected this, found that."
    assert errors["exits"] == "its process ended with exit code 3"
    assert errors["is_empty"] == "it returned no evaluations"
    assert "lambda" in errors["is_odd"]
    assert errors["is_killed"] == "its process was ended by SIGKILL (out of memory?)"
    assert lines[1] == f"1/7  raises alike iid seed 0 lr 0.003: FAILED: {errors['raises']}"
    assert lines[8] == "1 finished, 0 skipped, 6 failed"
    assert lines[9:15] == [f"  {describe(f.spec)}: {f.error}" for f in outcome.failures]
    assert lines[15].startswith("the first traceback:\nTraceback")
    assert lines[15].endswith("ValueError: too\nbad")


def test_a_killed_worker_takes_no_other_run_with_it(store: Store, tmp_path: Path) -> None:
    code = f"run_all([spec('takes_long'), spec('quick', 1)], Store({str(store.path)!r}), fake_run, workers=2)"
    process = started(code, tmp_path)
    (pid,) = wait_for(lambda: pids(tmp_path))
    wait_for(store.done_keys)
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "takes_long alike iid seed 0 lr 0.003: FAILED: its process was ended by SIGKILL" in output
    assert stored(store) == [("quick", 1)]


def test_a_worker_that_dies_while_idle_costs_no_run() -> None:
    with WorkerPool(fake_run, 1) as pool:
        pool.start(spec())
        while not isinstance(pool.events()[0], Finished):
            pass
        (child,) = multiprocessing.active_children()
        child.kill()
        child.join(timeout=10)
        pool.start(spec(seed=1))
        while not isinstance(event := pool.events()[0], Finished):
            assert isinstance(event, RoundDone)
        assert event.spec == spec(seed=1)
    assert not multiprocessing.active_children()


def test_failed_runs_are_tried_again(store: Store) -> None:
    assert run_all([spec("raises")], store, fake_run, report=lambda _: None).exit_code == 1
    assert run_all([spec("raises")], store, quick_run, report=lambda _: None).exit_code == 0
    assert stored(store) == [("raises", 0)]


def test_workers_have_one_thread(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_all([spec("tells_threads")], store, fake_run, report=lambda _: None).exit_code == 0
    assert store.rows()[0].evaluation.tokens == 1


def test_no_workers_are_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="Expected at least one worker, found 0"):
        run_all([spec()], store, fake_run, workers=0)


def test_rounds_of_long_runs_get_a_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "QUIET_SECONDS", 0.0)
    lines: list[str] = []
    run_all([spec()], store, fake_run, report=lines.append)
    assert lines[1:3] == [
        "     quick alike iid seed 0 lr 0.003: round 1 of 2, perplexity 50.000",
        "     quick alike iid seed 0 lr 0.003: round 2 of 2, perplexity 33.333",
    ]


def test_a_run_that_another_runner_stored_meanwhile_is_skipped(store: Store) -> None:
    def other_runner(line: str) -> None:
        if line.startswith("1/"):
            store.append(spec(seed=1), quick_run(spec(seed=1), lambda _: None))

    outcome = run_all([spec(seed=0), spec(seed=1), spec(seed=2)], store, fake_run, report=other_runner)
    assert (outcome.finished, outcome.skipped) == (2, 1)
    assert sorted(stored(store)) == [("quick", 0), ("quick", 1), ("quick", 2)]


def test_two_runners_on_one_store_lose_and_repeat_nothing(store: Store, tmp_path: Path) -> None:
    code = f"run_all([spec(seed=s) for s in range(8)], Store({str(store.path)!r}), fake_run, workers=1)"
    processes = [started(code, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(stored(store)) == [("quick", seed) for seed in range(8)]


def test_ctrl_c_stops_at_once_keeps_finished_runs_and_the_rest_can_follow(store: Store, tmp_path: Path) -> None:
    specs = "[spec('quick'), spec('takes_long', 1), spec('takes_long', 2), spec('quick', 3)]"
    process = started(f"run_all({specs}, Store({str(store.path)!r}), fake_run, workers=2)", tmp_path)
    workers = wait_for(lambda: pids(tmp_path) if len(pids(tmp_path)) == 2 else [])
    assert all(psutil.pid_exists(pid) for pid in workers)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the runner and its workers
    output, errors = process.communicate(timeout=20)
    assert time.monotonic() - begun < 5.0
    assert process.returncode == 130
    assert "interrupted; finished runs are in the store" in output
    assert "1 finished, 0 skipped, 0 failed" in output
    assert "Traceback" not in errors
    assert not any(psutil.pid_exists(pid) for pid in workers)
    assert stored(store) == [("quick", 0)]

    everything = [spec("quick"), spec("takes_long", 1), spec("takes_long", 2), spec("quick", 3)]
    outcome = run_all(everything, store, quick_run, workers=2, report=lambda _: None)
    assert (outcome.finished, outcome.skipped, outcome.exit_code) == (3, 1, 0)
    assert sorted(stored(store)) == [("quick", 0), ("quick", 3), ("takes_long", 1), ("takes_long", 2)]


def test_workers_end_with_a_runner_that_is_killed(store: Store, tmp_path: Path) -> None:
    process = started(f"run_all([spec('takes_long')], Store({str(store.path)!r}), fake_run)", tmp_path)
    (worker,) = wait_for(lambda: pids(tmp_path))
    process.kill()
    process.wait(timeout=10)
    wait_for(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE)


def test_pending_runs_are_those_not_stored_whatever_the_folder(store: Store) -> None:
    store.append(replace(spec(), data="/here/e2e"), quick_run(spec(), lambda _: None))
    others = [replace(spec(), data="/there/e2e"), spec(seed=1)]
    assert pending(others, store) == [spec(seed=1)]
    assert key_of(others[0]) in store.done_keys()


def test_a_run_is_described_by_what_tells_it_apart() -> None:
    assert describe(spec()) == "quick alike iid seed 0 lr 0.003"
    assert describe(replace(spec(), cut=2, rank=4)) == "quick alike iid seed 0 lr 0.003 cut 2 rank 4"


@pytest.mark.parametrize(
    ("durations", "waiting", "running", "workers", "expected"),
    [
        ({}, ["a"], [], 1, None),
        ({"a": [10.0, 20.0]}, ["a", "a"], [], 1, 30.0),
        ({"a": [10.0], "b": [40.0]}, ["a", "b"], [], 1, 50.0),
        ({"a": [10.0], "b": [40.0]}, ["c"], [], 1, 25.0),  # unknown: the mean of all
        ({"a": [10.0]}, ["a"], [("a", 4.0)], 1, 16.0),
        ({"a": [10.0]}, [], [("a", 14.0)], 1, 0.0),  # overdue
        ({"a": [10.0]}, ["a", "a", "a"], [("a", 4.0)], 2, 18.0),
        ({"a": [10.0], "b": [40.0]}, ["a", "b"], [], 4, 40.0),  # no run is shared
    ],
)
def test_time_left(durations: Any, waiting: Any, running: Any, workers: int, expected: float | None) -> None:
    assert seconds_left(durations, waiting, running, workers) == expected


@pytest.mark.slow
def test_the_engine_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(
        "[run]\nrounds = 1\nlocal_steps = 1\neval_examples = 4\nwarmup_steps = 0\ntext_prompts = 3\n"
        '[matrix]\nmethods = ["hsplitlora", "cenlora"]\nsettings = ["heterogeneous"]\npartitions = ["iid"]\n'
        "seeds = [0]\nlearning_rates = [0.003]\n"
    )
    store = tmp_path / "results.csv"
    assert main(["run", str(experiment), "--store", str(store)]) == 0
    assert main(["table", str(store)]) == 0
    output = capsys.readouterr().out
    assert "hsplitlora against the best rival" in output
    assert "Text scores" in output
    rows = [row.evaluation for row in Store(store).rows()]
    assert [evaluation.round for evaluation in rows] == [0, 1, 0, 1]
    for untrained, last in (rows[:2], rows[2:]):
        assert (untrained.scores, untrained.intervals) == (None, None)
        assert last.scores
        assert last.intervals
        assert last.intervals.low.rouge_l <= last.scores.rouge_l <= last.intervals.high.rouge_l
    assert main(["run", str(experiment), "--store", str(store), "--list"]) == 0
    assert "0 of 2 runs to do" in capsys.readouterr().out


def started(code: str, folder: Path) -> subprocess.Popen[str]:
    """A runner as a process of its own process group, which ends with its outcome's exit code."""
    imports = "import sys\nfrom test_runner import *\nfrom hsplit_flwr.experiments.evidence.store import Store"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "experiments")])
    process = subprocess.Popen(
        [sys.executable, "-c", f"{imports}\nsys.exit({code}.exit_code)"],
        env={**os.environ, "PYTHONPATH": paths, FOLDER: str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _processes.append(process)
    return process


_processes: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    while _processes:
        process = _processes.pop()
        process.kill()
        process.communicate(timeout=10)


def pids(folder: Path) -> list[int]:
    """The worker processes of runs that take long."""
    return [int(text) for path in sorted(folder.glob("pid-*")) if (text := path.read_text())]


def wait_for(condition: Callable[[], Value], seconds: float = 30.0) -> Value:
    """The first true value of `condition`."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)
    return value
