"""The command ``python -m hsplit_flwr.experiments``: run a matrix of experiments, and read its results.

run FILE --store CSV      the runs of an experiment file (`experiment_file`) that the store lacks
table CSV                 tables: perplexity, speed-up, time to target, costs, text scores
plot CSV --output DIR     pictures: perplexity over rounds, virtual time and tokens
search CSV                the best learning rate of every method, also as TOML
audit FILE --store CSV    whether all runs are there, of one clean commit, and hold what the file claims of them
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hsplit_flwr.common.closed_pipe import reader_may_leave
from hsplit_flwr.errors import ConfigError, HSplitError
from hsplit_flwr.experiments.evidence.audit import AuditPlan, audit, audit_table
from hsplit_flwr.experiments.evidence.paired import paired_table
from hsplit_flwr.experiments.evidence.store import Store
from hsplit_flwr.experiments.evidence.stored_runs import StoredRuns
from hsplit_flwr.experiments.evidence.summary import (
    best_learning_rates,
    cost_table,
    perplexity_table,
    search_table,
    speed_up_table,
    speed_ups_table,
    text_table,
    time_table,
)
from hsplit_flwr.experiments.experiment_file import read_experiment
from hsplit_flwr.experiments.methods import METHODS, RIVALS
from hsplit_flwr.experiments.records import Evaluation, RunSpec
from hsplit_flwr.experiments.runner import describe, pending, run_all

PROGRAM = "python -m hsplit_flwr.experiments"
FAILED = 1
USER_ERROR = 2
OURS = "hsplitlora"
SETTING_NAMES = (
    *("homogeneous", "heterogeneous", "highly_heterogeneous", "deep_heads"),
    *("small_server", "many_clients", "twenty_clients", "privacy_floor", "tight_memory", "phones", "flowertune"),
)
"""those of `settings.SETTINGS`, whose import takes seconds for torch"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    0; 1 if runs failed or an audit found something; 2 for what the user can mend; 130 after Ctrl-C.
    """
    with reader_may_leave():
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        try:
            return command(options)
        except HSplitError as error:
            print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
            return USER_ERROR


def run_engine(spec: RunSpec, on_round: Callable[[Evaluation], None], device: str = "cpu") -> Sequence[Evaluation]:
    """Compute a run on `device`; for a worker process, which alone imports torch."""
    from hsplit_flwr.experiments.engine import run

    return run(spec, on_round, device).evaluations


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Run a matrix of experiments, and read its results.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="compute the runs that a store lacks")
    run.add_argument("file", type=Path, metavar="FILE", help="TOML file of the experiment")
    run.add_argument("--store", required=True, type=Path, metavar="CSV", help="where results are kept")
    run.add_argument("--workers", type=int, default=1, metavar="N", help="runs at once, one thread each (default: 1)")
    run.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where models compute (default: cpu)")
    run.add_argument("--list", action="store_true", help="only list the runs that the store lacks")
    run.set_defaults(command=_run)

    table = commands.add_parser("table", help="perplexity, speed-up, time to target, costs, text scores")
    table.add_argument("store", type=Path, metavar="CSV")
    table.add_argument("--markdown", action="store_true")
    table.add_argument("--ours", default=OURS, metavar="METHOD", help=f"compared with the best rival (default: {OURS})")
    rivals = ",".join(RIVALS)
    table.add_argument("--rivals", default=rivals, metavar="A,B", help=f"methods to beat (default: {rivals})")
    table.set_defaults(command=_table)

    plot = commands.add_parser("plot", help="perplexity over rounds, virtual time and tokens")
    plot.add_argument("store", type=Path, metavar="CSV")
    plot.add_argument("--output", required=True, type=Path, metavar="DIR")
    plot.set_defaults(command=_plot)

    search = commands.add_parser("search", help="the best learning rate of every method")
    search.add_argument("store", type=Path, metavar="CSV")
    search.add_argument("--markdown", action="store_true")
    search.set_defaults(command=_search)

    check = commands.add_parser("audit", help="are all runs there, of one clean commit, and do they hold the claims?")
    check.add_argument("file", type=Path, metavar="FILE", help="TOML file of the experiment")
    check.add_argument("--store", required=True, type=Path, metavar="CSV")
    check.add_argument("--markdown", action="store_true")
    check.set_defaults(command=_audit)
    return parser


def _run(options: argparse.Namespace) -> int:
    specs = read_experiment(options.file, METHODS, SETTING_NAMES)
    store = Store(options.store)
    if not options.list:
        engine = partial(run_engine, device=options.device)
        return run_all(specs, store, engine, workers=options.workers).exit_code
    todo = pending(specs, store)
    for spec in todo:
        print(describe(spec))
    print(f"{len(todo)} of {len(specs)} runs to do")
    return 0


def _table(options: argparse.Namespace) -> int:
    runs = _runs(options.store)
    rivals = options.rivals.split(",")
    sections = {
        "Final perplexity": perplexity_table(runs, markdown=options.markdown),
        f"{options.ours} against the best rival": speed_up_table(runs, options.ours, rivals, markdown=options.markdown),
        f"{options.ours} against every rival: how much sooner it is where the rival ends": speed_ups_table(
            runs, options.ours, rivals, markdown=options.markdown
        ),
        f"{options.ours} against every rival: by how much it ends above (below: -), 95 % interval": paired_table(
            runs, options.ours, rivals, markdown=options.markdown
        ),
        "Virtual seconds to the best rival's final perplexity": time_table(runs, rivals, markdown=options.markdown),
        "Costs": cost_table(runs, markdown=options.markdown),
        "Text scores": text_table(runs, markdown=options.markdown),
    }
    heading = "### {}\n\n{}" if options.markdown else "{}\n{}"
    print("\n\n".join(heading.format(title, body) for title, body in sections.items() if body))
    return 0


def _plot(options: argparse.Namespace) -> int:
    from hsplit_flwr.experiments.evidence.curves import LABELS, draw_curves  # matplotlib

    rows = Store(options.store).rows()
    for x in LABELS:
        path = options.output / f"perplexity_{x}.png"
        try:
            draw_curves(rows, path, x=x, order=_order())
        except OSError as error:
            raise ConfigError(f"Expected a folder to write into at {options.output}, found: {error}.") from error
        print(path)
    return 0


def _search(options: argparse.Namespace) -> int:
    runs = _runs(options.store)
    print(search_table(runs, markdown=options.markdown))
    best = best_learning_rates(runs)
    print("\n".join(["", "[learning_rates]", *(f"{method} = {rate!r}" for method, rate in best.items())]))
    return 0


def _audit(options: argparse.Namespace) -> int:
    wanted = read_experiment(options.file, METHODS, SETTING_NAMES)
    findings = audit(AuditPlan.read(options.file), wanted, Store(options.store), _order())
    print(audit_table(findings, markdown=options.markdown))
    return 0 if all(finding.fine for finding in findings) else FAILED


def _runs(path: Path) -> StoredRuns:
    return StoredRuns.of(Store(path).rows(), _order())


def _order() -> tuple[str, ...]:
    return (*METHODS, *SETTING_NAMES, "iid", "dirichlet")
