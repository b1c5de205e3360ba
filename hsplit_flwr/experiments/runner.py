"""Run what is missing in a store, in worker processes, and say how it goes.

Only the process that calls `run_all` writes to the store. Ctrl-C ends it and its workers; finished runs stay.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hsplit_flwr.common.progress import format_duration
from hsplit_flwr.common.tables import format_number
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.evidence.store import Store, key_of
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.experiments.workers import Event, Failed, Finished, RoundDone, RunFunction, WorkerPool

QUIET_SECONDS = 60.0
"""without a line, before a round of a long run gets one"""
INTERRUPTED = 130
"""exit code after Ctrl-C, as shells have it: 128 + SIGINT"""
Report = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of the runs that were asked for."""

    finished: int
    skipped: int
    """runs that are in the store already"""
    failures: tuple[Failed, ...]
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0: all runs are in the store; 1: some failed; 130: interrupted."""
        return INTERRUPTED if self.interrupted else 1 if self.failures else 0


def pending(specs: Sequence[RunSpec], store: Store) -> list[RunSpec]:
    """The runs that are not in the store, each once, in order."""
    done = store.done_keys()
    return list({key_of(spec): spec for spec in specs if key_of(spec) not in done}.values())


def run_all(
    specs: Sequence[RunSpec],
    store: Store,
    run: RunFunction,
    *,
    workers: int = 1,
    report: Report = lambda line: print(line, flush=True),
) -> Outcome:
    """Compute the runs that `store` lacks and append each as soon as it is finished.

    A run that raises, or whose process dies, is reported and does not stop the others.

    Args:
        specs: what is wanted.
        store: where results go; other runners may append to it meanwhile.
        run: computes one run, see `RunFunction`.
        workers: runs at once.
        report: takes every line of progress.

    Raises:
        ConfigError: workers < 1, or the store cannot be written.
    """
    if workers < 1:
        raise ConfigError(f"Expected at least one worker, found {workers}.")
    store.prepare()
    todo = pending(specs, store)
    report(f"{len(specs)} runs: {len(specs) - len(todo)} in {store.path.name} already, {len(todo)} to do")
    matrix = _Matrix(todo, store, report, workers, skipped=len(specs) - len(todo))
    interrupted = False
    try:
        with WorkerPool(run, workers) as pool:
            matrix.work(pool)
    except KeyboardInterrupt:
        interrupted = True
    outcome = Outcome(matrix.finished, matrix.skipped, tuple(matrix.failures), interrupted)
    _report_end(outcome, report)
    return outcome


def describe(spec: RunSpec) -> str:
    """The run in a few words."""
    parts = [spec.method, spec.setting, spec.partition, f"seed {spec.seed}", f"lr {spec.learning_rate:g}"]
    parts += [f"{name} {value}" for name, value in (("cut", spec.cut), ("rank", spec.rank)) if value]
    return " ".join(parts)


def seconds_left(
    durations: Mapping[str, Sequence[float]], waiting: Sequence[str], running: Sequence[tuple[str, float]], workers: int
) -> float | None:
    """Until all is done, if workers share the work evenly; None before the first run is finished.

    Args:
        durations: method -> seconds of its finished runs; a method without takes the mean of all.
        waiting: the method of every run that has not started.
        running: method and seconds so far of every run in progress.
        workers: runs at once.
    """
    everything = [seconds for of_method in durations.values() for seconds in of_method]
    if not everything:
        return None

    def expected(method: str) -> float:
        known = durations.get(method) or everything
        return sum(known) / len(known)

    started = [max(0.0, expected(method) - seconds) for method, seconds in running]
    ahead = [expected(method) for method in waiting]
    # Runs are not shared: whatever the number of workers, the longest of what is left takes its time.
    return max((sum(started) + sum(ahead)) / workers, *started, *ahead, 0.0)


class _Matrix:
    """The state of a call of `run_all`."""

    def __init__(self, todo: Sequence[RunSpec], store: Store, report: Report, workers: int, skipped: int) -> None:
        self.finished = 0
        self.skipped = skipped
        self.failures: list[Failed] = []
        self._waiting = deque(todo)
        self._total = len(todo)
        self._store = store
        self._report_line = report
        self._workers = workers
        self._durations: dict[str, list[float]] = {}
        self._last_line_at = time.monotonic()

    def work(self, pool: WorkerPool) -> None:
        while True:
            while pool.has_room and (spec := self._next()) is not None:
                pool.start(spec)
            if not pool.running():
                return
            for event in pool.events():
                self._take(event, pool)

    def _next(self) -> RunSpec | None:
        done = self._store.done_keys() if self._waiting else frozenset()
        while self._waiting:
            spec = self._waiting.popleft()
            if key_of(spec) not in done:
                return spec
            self.skipped += 1  # another runner was faster
            self._total -= 1
        return None

    def _take(self, event: Event, pool: WorkerPool) -> None:
        """Store and report; the run of `event` is no longer among the running ones of `pool`, unless it is not done."""
        match event:
            case RoundDone(spec, evaluation):
                if time.monotonic() - self._last_line_at >= QUIET_SECONDS:
                    where = f"round {evaluation.round} of {spec.rounds}"
                    self._report(f"     {describe(spec)}: {where}, perplexity {format_number(evaluation.perplexity)}")
            case Finished(spec, ()):
                self._fail(Failed(spec, "it returned no evaluations"))
            case Finished(spec, evaluations, seconds):
                self._store.append(spec, evaluations)
                self.finished += 1
                self._durations.setdefault(spec.method, []).append(seconds)
                perplexity = format_number(evaluations[-1].perplexity)
                took = f"perplexity {perplexity}, {format_duration(seconds)}{self._left(pool)}"
                self._report(f"{self._count()}  {describe(spec)}: {took}")
            case Failed():
                self._fail(event)

    def _fail(self, failure: Failed) -> None:
        self.failures.append(failure)
        self._report(f"{self._count()}  {describe(failure.spec)}: FAILED: {failure.error}")

    def _count(self) -> str:
        return f"{self.finished + len(self.failures):{len(str(self._total))}}/{self._total}"

    def _left(self, pool: WorkerPool) -> str:
        running = [(spec.method, seconds) for spec, seconds in pool.running()]
        left = seconds_left(self._durations, [spec.method for spec in self._waiting], running, self._workers)
        return f", about {format_duration(left)} left" if left else ""

    def _report(self, line: str) -> None:
        self._last_line_at = time.monotonic()
        self._report_line(line)


def _report_end(outcome: Outcome, report: Report) -> None:
    if outcome.interrupted:
        report("interrupted; finished runs are in the store, the same command does the rest")
    report(f"{outcome.finished} finished, {outcome.skipped} skipped, {len(outcome.failures)} failed")
    for failure in outcome.failures:
        report(f"  {describe(failure.spec)}: {failure.error}")
    traces = [failure.traceback for failure in outcome.failures if failure.traceback]
    if traces:
        report(f"the first traceback:\n{traces[0]}")
