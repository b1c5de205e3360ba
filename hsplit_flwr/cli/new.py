"""``hsplit-flwr new``: a Flower app for one's own data."""

import argparse

from hsplit_flwr.cli.parsing import Defaults, OneLineParser


def declare(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "new",
        help="a Flower app for your own data",
        description="Write a Flower app that trains on your own files, with every setting in its pyproject.toml.",
        formatter_class=Defaults,
    )
    command.add_argument("folder", help="new folder, named as the app: letters, digits and hyphens, such as my-app")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the app, and print what to do with it."""
    from hsplit_flwr.flower.finetune.new_app import write_app

    for path in write_app(options.folder):
        print(path)
    print(f"\nflwr run {options.folder} --stream --run-config 'data=\"my.jsonl\"'")
    return 0
