"""``hsplit-flwr push``: a result goes to the hub, with its model card."""

import argparse
from pathlib import Path

from hsplit_flwr.cli.parsing import Defaults, OneLineParser


def declare(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "push",
        help="upload an adapter or a merged model to the hub",
        description="Upload a run's adapter or merged_model folder, with the model card that lies in it.",
        formatter_class=Defaults,
    )
    command.add_argument("folder", type=Path, help="adapter, merged_model or best/round-*/adapter of a run")
    command.add_argument("repository", help="user/name on the hub; made if it is not there")
    command.add_argument("--private", action="store_true", help="of a repository that is made")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Upload, and print where to."""
    from hsplit_flwr.reports.model_card import push

    print(push(options.folder, options.repository, private=options.private))
    return 0
