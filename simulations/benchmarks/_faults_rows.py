"""A row of `faults.py`: a run that is hit in one phase, what people do then, and what became of its result."""

import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from _faults_deployment import FaultyDeployment
from _faults_kinds import Fault

Outcome = Literal["survived_exact", "survived_reweighted", "resumed_exact", "lost"]
PHASES = ("load", "first-step", "mid-round", "upload", "evaluation")
ROUNDS = 2
HIT_ROUND = 2
RUN_LIMIT_S = 600.0
"""longest a run may take that is hit, or resumed; who takes longer hangs"""
RESTARTS = 2
RESULTS = ("adapter/adapter_model.safetensors", "merged_model/model.safetensors")
_POLL_S = 0.02


@dataclass(frozen=True)
class Row:
    """What one fault did in one phase."""

    fault: str
    phase: str
    outcome: Outcome
    seconds_lost: float
    """until the result was there, over a run without a fault"""
    detail: str
    """what the runs said of themselves"""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Finished:
    """A run whose command has ended, or that took too long."""

    folder: Path
    seconds: float
    hangs: bool
    log: Path
    summary: dict[str, Any]
    """what it wrote last; empty where there is none"""
    struck_s: float | None = None
    """when the fault came, from the start on"""

    @property
    def is_complete(self) -> bool:
        """It has all that a run leaves."""
        is_there = all((self.folder / name).exists() for name in RESULTS)
        is_over = self.summary.get("status") == "completed" and len(self.summary["history"]) == ROUNDS
        return is_over and is_there and not self.hangs

    @property
    def said(self) -> str:
        """How it ended, in a few words."""
        failures = [line for record in self.summary.get("history", ()) for line in record["failures"]]
        hit = "" if self.struck_s is None else f", hit at {self.struck_s:.0f} s"
        status = f"{self.summary.get('status', 'no summary')} after {self.seconds:.0f} s{hit}"
        words = [status, self.summary.get("reason", ""), *failures, "hangs" if self.hangs else ""]
        return "; ".join(word for word in words if word)


def is_exact(found: Path, reference: Path) -> bool:
    """Adapter and merged weights are alike bit by bit, and so is what the rounds scored."""
    if any((found / name).read_bytes() != (reference / name).read_bytes() for name in RESULTS):
        return False
    return _scores(found) == _scores(reference)


def outcome_of(runs: list[Finished], reference: Path) -> Outcome:
    """What became of a run, by its own result and that of its restarts."""
    last = runs[-1]
    if not last.is_complete or any(run.hangs for run in runs):
        return "lost"
    exact = is_exact(last.folder, reference)
    if len(runs) > 1:
        return "resumed_exact" if exact else "lost"
    trained = all(record["clients"] for record in last.summary["history"])
    return "survived_exact" if exact else "survived_reweighted" if trained else "lost"


class Rows:
    """Runs on a deployment. All begin at the checkpoint of a reference's first round, so that they are short.

    Args:
        deployment: serves all of them.
        folder: for what is left of them.
    """

    def __init__(self, deployment: FaultyDeployment, folder: Path) -> None:
        self._deployment = deployment
        self._folder = folder
        self._whole: dict[bool, Finished] = {}
        self._unhit: dict[bool, Finished] = {}

    def prepare(self, evaluates: bool) -> tuple[Finished, Finished]:
        """Runs without a fault, with or without the clients' evaluation: a whole one, and the same from round 2 on.

        Raises:
            RuntimeError: they do not complete, or differ.
        """
        whole = self._whole[evaluates] = self._play("whole", evaluates)
        unhit = self._unhit[evaluates] = self._play(self._begun("unhit", evaluates), evaluates, resume="latest")
        if not (whole.is_complete and unhit.is_complete and is_exact(unhit.folder, whole.folder)):
            raise RuntimeError(f"Expected equal runs without a fault, found: {whole.said} | {unhit.said}.")
        return whole, unhit

    def play(self, fault: Fault, phase: str) -> Row:
        """One row."""
        evaluates = phase == "evaluation"
        reference, unhit = self._whole[evaluates], self._unhit[evaluates]
        name = self._begun(f"{fault.name}-{phase}", evaluates)
        runs = [self._play(name, evaluates, resume="latest", fault=fault, phase=phase)]
        fault.mend(self._deployment)
        while not runs[-1].is_complete and not runs[-1].hangs and len(runs) <= RESTARTS:
            runs.append(self._play(name, evaluates, resume="latest"))
        self._deployment.end_apps()
        outcome = outcome_of(runs, reference.folder)
        lost_s = sum(run.seconds for run in runs) - unhit.seconds
        row = Row(fault.name, phase, outcome, lost_s, " | then ".join(run.said for run in runs))
        self._tidy(runs[-1].folder)
        return row

    def _begun(self, name: str, evaluates: bool) -> str:
        """A run that broke off after the round before the one that is hit; returns its name."""
        checkpoint = Path("checkpoints", f"round-{HIT_ROUND - 1:04}")
        folder = self._deployment.disk.folder / _named(name, evaluates)
        shutil.copytree(self._whole[evaluates].folder / checkpoint, folder / checkpoint)
        return name

    def _tidy(self, folder: Path) -> None:
        """Make room; the summary stays."""
        kept = self._folder / "summaries"
        kept.mkdir(exist_ok=True)
        if (folder / "summary.json").exists():
            shutil.copyfile(folder / "summary.json", kept / f"{folder.name}.json")
        shutil.rmtree(folder)

    def _play(
        self, name: str, evaluates: bool, *, resume: str = "", fault: Fault | None = None, phase: str = ""
    ) -> Finished:
        folder = self._deployment.disk.folder / _named(name, evaluates)
        mark = self._deployment.hold(HIT_ROUND, phase or "nowhere")
        started = time.monotonic()
        process, log = self._deployment.run(
            {"output-dir": str(folder), "resume": resume, "federated-evaluation": evaluates}
        )
        with ThreadPoolExecutor(1) as pool:
            striking = pool.submit(self._strike, fault, mark, process, log) if fault else None
            try:
                hangs = not _ends(process, started + RUN_LIMIT_S)
            finally:
                process.kill()  # interrupted: nobody waits for it any more, nor for its phases
            seconds = time.monotonic() - started
            struck = striking.result() - started if striking else None
        return Finished(folder, seconds, hangs, log, _summary(folder), struck)

    def _strike(self, fault: Fault, mark: Path, process: "subprocess.Popen[bytes]", log: Path) -> float:
        """Wait for the phase and do it; returns when it began."""
        while not mark.exists():
            if process.poll() is not None:
                raise RuntimeError(f"Expected the run to get to {mark.name}, found it ended before. See {log}.")
            time.sleep(_POLL_S)
        began = time.monotonic()
        found = re.search(r"started run (\d+)", log.read_text(errors="replace"))
        fault.strike(self._deployment, found[1] if found else "")
        return began


def _named(name: str, evaluates: bool) -> str:
    return name if evaluates else f"{name}-plain"


def _summary(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def _scores(folder: Path) -> list[Any]:
    return [(record["central_perplexity"], record["federated_perplexity"]) for record in _summary(folder)["history"]]


def _ends(process: "subprocess.Popen[bytes]", deadline: float) -> bool:
    """Wait for a command; it is ended where it does not end before the deadline."""
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True
