"""``hsplit-flwr status``: how a run goes, from its output folder."""

import argparse
import json
from pathlib import Path

from hsplit_flwr.cli.parsing import Defaults, OneLineParser


def declare(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Add the command and its options."""
    status = commands.add_parser(
        "status",
        help="how a run goes: rounds, clients, perplexity, who was left out",
        description="Read a run's output folder, while it is under way or afterwards.",
        formatter_class=Defaults,
    )
    status.add_argument("folder", type=Path, metavar="FOLDER", help="output-dir of the run; its log names it")
    status.add_argument("--json", action="store_true", help="print the rounds and the summary as JSON")
    status.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print how the run goes."""
    from hsplit_flwr.reports.run_status import run_state

    state = run_state(options.folder)
    if options.json:
        print(json.dumps({"rounds": list(state.rounds), "summary": dict(state.summary)}, ensure_ascii=False))
    else:
        print(state.text())
    return 0
