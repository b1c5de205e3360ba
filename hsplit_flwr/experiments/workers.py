"""Processes that compute runs, one run at a time each. A process that dies fails its own run only."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from hsplit_flwr.errors import HSplitError
from hsplit_flwr.experiments.records import Evaluation, RunSpec

OnRound = Callable[[Evaluation], None]
RunFunction = Callable[[RunSpec, OnRound], Sequence[Evaluation]]
"""computes a run, calls back after every round; importable by name, since it runs in another process"""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
END_SECONDS = 10.0
"""for a killed process to be gone"""


@dataclass(frozen=True)
class RoundDone:
    """A run has finished a round, not its last."""

    spec: RunSpec
    evaluation: Evaluation


@dataclass(frozen=True)
class Finished:
    """A run is complete."""

    spec: RunSpec
    evaluations: tuple[Evaluation, ...]
    seconds: float = 0.0
    """real ones, with what its process took to start"""


@dataclass(frozen=True)
class Failed:
    """A run has raised, or its process has died."""

    spec: RunSpec
    error: str
    """one line"""
    traceback: str = ""
    """empty for errors that explain themselves"""


Event = RoundDone | Finished | Failed


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    spec: RunSpec | None = None
    started: float = 0.0


class WorkerPool:
    """Up to `workers` processes, each with one torch thread, started when first needed. Leaving the context kills them.

    Args:
        run: see `RunFunction`.
        workers: at most so many runs at once.
    """

    def __init__(self, run: RunFunction, workers: int) -> None:
        self._run = run
        self._limit = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            self._end(worker)

    @property
    def has_room(self) -> bool:
        """Another run can start."""
        return len(self.running()) < self._limit

    def running(self) -> list[tuple[RunSpec, float]]:
        """The runs that are being computed, with the seconds since their start."""
        now = time.monotonic()
        return [(worker.spec, now - worker.started) for worker in self._workers if worker.spec is not None]

    def start(self, spec: RunSpec) -> None:
        """Compute `spec`; there must be room."""
        assert self.has_room
        for worker in [worker for worker in self._workers if worker.spec is None]:
            if self._handed_over(worker, spec):
                return
            self._discard(worker)  # it died while it had nothing to do
        worker = _new_worker()
        self._workers.append(worker)
        if not self._handed_over(worker, spec):
            worker.spec = spec  # its death is then reported as this run's

    def events(self) -> list[Event]:
        """Wait until something happens; at least one run must be in progress."""
        busy = {worker.connection: worker for worker in self._workers if worker.spec is not None}
        assert busy
        ready = wait(list(busy))
        return [self._event(worker) for connection, worker in busy.items() if connection in ready]

    def _handed_over(self, worker: _Worker, spec: RunSpec) -> bool:
        try:
            worker.connection.send(spec)
            worker.connection.send(self._run)
        except OSError:
            return False
        worker.spec, worker.started = spec, time.monotonic()
        return True

    def _event(self, worker: _Worker) -> Event:
        assert worker.spec is not None
        try:
            event: Event = worker.connection.recv()
        except (EOFError, OSError):
            spec = worker.spec
            self._discard(worker)
            return Failed(spec, f"its process {_end_of(worker.process)}")
        if isinstance(event, RoundDone):
            return event
        worker.spec = None
        return replace(event, seconds=time.monotonic() - worker.started) if isinstance(event, Finished) else event

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._end(worker)

    @staticmethod
    def _end(worker: _Worker) -> None:
        worker.connection.close()
        worker.process.join(END_SECONDS)


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit code {code}"


def _new_worker() -> _Worker:
    # Spawned: a forked copy of a process with threads (torch's, Arrow's) may hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that the pipe breaks when the process ends
    return _Worker(process, ours)


def _serve(connection: Any) -> None:
    """A worker process: compute runs until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the runner ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))  # torch reads them when `recv` first imports it
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            _compute_next(connection)


def _compute_next(connection: Any) -> None:
    spec = connection.recv()
    try:
        run = connection.recv()  # imports the module of the function, which may fail
        evaluations = run(spec, lambda evaluation: connection.send(RoundDone(spec, evaluation)))
        connection.send(Finished(spec, tuple(evaluations)))
    except Exception as error:
        connection.send(Failed(spec, *_described(error)))


def _described(error: Exception) -> tuple[str, str]:
    """One line, and the traceback where the line does not say enough."""
    text = " ".join(str(error).split())
    if isinstance(error, HSplitError):
        return text, ""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}", "".join(traceback.format_exception(error)).rstrip()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
