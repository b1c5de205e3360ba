"""What a run loses when a part of its deployment fails: faults x phases over real processes, one run each.

    python simulations/benchmarks/faults.py --json OUT
    python simulations/benchmarks/faults.py --json OUT --only 'kill-*/mid-round,cut-all/*'

SuperLink, SuperNodes, ServerApps and ClientApps are Flower's own, on loopback, with TLS and node authentication. A run
of two rounds and two clients is hit in its second round, while client 0 is in the phase; what does not go on by itself
is started again with ``resume="latest"``, as docs/deployment.md says. The result is compared, bit by bit, with that of
a run that nobody hit.
"""

import argparse
import json
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import _repository  # noqa: F401
from _faults_deployment import NODES, faulty_deployment
from _faults_kinds import FAULTS
from _faults_rows import PHASES, ROUNDS, Row, Rows
from _provenance import provenance

from hsplit_flwr.common.tables import format_table

SEED = 0


def chosen(patterns: str) -> list[tuple[str, str]]:
    """The rows that `fault/phase` patterns, with commas between them, choose, in the order of the patterns."""
    every = [(fault, phase) for phase in PHASES for fault in FAULTS]
    wanted = [pattern if "/" in pattern else f"{pattern}/*" for pattern in patterns.split(",")]
    return list(dict.fromkeys(row for pattern in wanted for row in every if fnmatch("/".join(row), pattern)))


def table(rows: Sequence[Row]) -> str:
    """Fault by phase: outcome and seconds lost."""
    found = {(row.fault, row.phase): f"{row.outcome} {row.seconds_lost:+.0f} s" for row in rows}
    faults = list(dict.fromkeys(row.fault for row in rows))
    cells = [[fault, *(found.get((fault, phase), "") for phase in PHASES)] for fault in faults]
    return format_table(["fault", *PHASES], cells, markdown=False, left_aligned=1 + len(PHASES))


def measure(wanted: list[tuple[str, str]], folder: Path, report: dict[str, Any]) -> Iterator[Row]:
    """Play runs without a fault and all rows, one after the other; what else is found out goes to `report`."""
    with faulty_deployment(folder) as deployment:
        runs = Rows(deployment, folder)
        for evaluates in sorted({phase == "evaluation" for _, phase in wanted}):
            whole, unhit = runs.prepare(evaluates)
            kind = "with evaluation" if evaluates else "without evaluation"
            report["without_fault"][kind] = {"whole_s": whole.seconds, "from_round_2_s": unhit.seconds}
            print(f"no fault, {kind}: {whole.seconds:.1f} s, from round 2 {unhit.seconds:.1f} s", flush=True)
        for fault, phase in wanted:
            if reason := FAULTS[fault].why_not():
                report["skipped"].append({"fault": fault, "phase": phase, "reason": reason})
                print(f"{fault}/{phase}  skipped: {reason}", flush=True)
            else:
                yield runs.play(FAULTS[fault], phase)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of all rows, and the rows."""
    outcomes = Counter(row.outcome for row in rows)
    return {"lost": outcomes["lost"], "outcomes": dict(outcomes), "rows": [row.to_dict() for row in rows]}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--only", default="*/*", help="fault/phase patterns with commas between them")
    parser.add_argument("--folder", type=Path, help="keep logs and results here; it must not exist yet")
    arguments = parser.parse_args()
    wanted = chosen(arguments.only)
    if not wanted:
        parser.error(f"Expected --only among {', '.join(FAULTS)} / {', '.join(PHASES)}, found {arguments.only}.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the deployment goes with it, too
    report: dict[str, Any] = {"skipped": [], "without_fault": {}, "rounds": ROUNDS, "nodes": NODES}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in measure(wanted, arguments.folder or Path(scratch, "faults"), report):
            rows.append(row)
            said = f"{row.outcome}  {row.seconds_lost:+.1f} s  ({row.detail})"
            print(
                f"{time.strftime('%H:%M:%S')}  {len(rows)}/{len(wanted)}  {row.fault}/{row.phase}  {said}", flush=True
            )
            # after each row: who is interrupted keeps those
            arguments.json.write_text(json.dumps({**summary(rows), **report, **provenance(SEED)}, indent=2) + "\n")
    print(table(rows))
    print(json.dumps({key: value for key, value in summary(rows).items() if key != "rows"}))


if __name__ == "__main__":
    main()
