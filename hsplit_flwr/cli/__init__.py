"""The command ``hsplit-flwr``: an app, a plan before anyone trains, how a run goes, a result tried and uploaded."""

from collections.abc import Sequence

from hsplit_flwr.cli import chat, export, new, plan, push, results, status
from hsplit_flwr.cli.parsing import PROGRAM, USER_ERROR, OneLineParser, fail
from hsplit_flwr.common.closed_pipe import reader_may_leave
from hsplit_flwr.errors import HSplitError

__all__ = ["USER_ERROR", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, `NOBODY` or `USER_ERROR`, both with one line on stderr."""
    parser = OneLineParser(prog=PROGRAM, description="Heterogeneous split LoRA fine-tuning with Flower.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    plan.declare(commands)
    new.declare(commands)
    results.declare(commands)
    chat.declare(commands)
    export.declare(commands)
    push.declare(commands)
    status.declare(commands)
    with reader_may_leave():
        options = parser.parse_args(arguments)
        try:
            code: int = options.run(options)
        except HSplitError as error:
            return fail(USER_ERROR, str(error))
        return code
