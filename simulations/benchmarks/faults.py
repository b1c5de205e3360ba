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
    """The rows that `fault/phase` patterns, with commas between them, choose."""
    every = [(fault, phase) for phase in PHASES for fault in FAULTS]
    wanted = [pattern if "/" in pattern else f"{pattern}/*" for pattern in patterns.split(",")]
    return [row for row in every if any(fnmatch("/".join(row), pattern) for pattern in wanted)]


def table(rows: list[Row]) -> str:
    """Fault by phase: outcome and seconds lost."""
    found = {(row.fault, row.phase): f"{row.outcome} {row.seconds_lost:+.0f} s" for row in rows}
    faults = list(dict.fromkeys(row.fault for row in rows))
    cells = [[fault, *(found.get((fault, phase), "") for phase in PHASES)] for fault in faults]
    return format_table(["fault", *PHASES], cells, markdown=False, left_aligned=1 + len(PHASES))


def measure(wanted: list[tuple[str, str]], folder: Path, report: dict[str, Any]) -> list[Row]:
    """Play the reference and all rows; what is found goes to `report` after each."""
    rows: list[Row] = []
    with faulty_deployment(folder) as deployment:
        runs = Rows(deployment, folder)
        for evaluates in sorted({phase == "evaluation" for _, phase in wanted}):
            whole, unhit = runs.prepare(evaluates)
            kind = "with evaluation" if evaluates else "without evaluation"
            report["without_fault"][kind] = {"whole_s": whole.seconds, "from_round_2_s": unhit.seconds}
            print(f"no fault, {kind}: {whole.seconds:.1f} s, from round 2 {unhit.seconds:.1f} s", flush=True)
        for number, (fault, phase) in enumerate(wanted, 1):
            if reason := FAULTS[fault].why_not():
                report["skipped"].append({"fault": fault, "phase": phase, "reason": reason})
                print(f"{number}/{len(wanted)}  {fault}/{phase}  skipped: {reason}", flush=True)
                continue
            row = runs.play(FAULTS[fault], phase)
            rows.append(row)
            report["rows"].append(row.to_dict())
            said = f"{row.outcome}  {row.seconds_lost:+.1f} s  ({row.detail})"
            print(f"{time.strftime('%H:%M:%S')}  {number}/{len(wanted)}  {fault}/{phase}  {said}", flush=True)
            report["lost"] += row.outcome == "lost"
    return rows


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
    report: dict[str, Any] = {"lost": 0, "rows": [], "skipped": [], "without_fault": {}}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            rows = measure(wanted, arguments.folder or Path(scratch, "faults"), report)
        finally:
            outcomes = dict(Counter(row["outcome"] for row in report["rows"]))
            setting = {"rounds": ROUNDS, "nodes": NODES, "outcomes": outcomes}
            arguments.json.write_text(json.dumps({**report, **setting, **provenance(SEED)}, indent=2) + "\n")
    print(table(rows))
    print(json.dumps({"lost": report["lost"], **outcomes}))


if __name__ == "__main__":
    main()
