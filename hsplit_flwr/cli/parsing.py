"""What the commands of ``hsplit-flwr`` have in common: how options are declared, how errors are said."""

import argparse
import sys
from typing import NoReturn

from hsplit_flwr.planning.exchange_choice import AUTO

PROGRAM = "hsplit-flwr"
NOBODY = 1
"""exit code: the plan leaves every client out"""
USER_ERROR = 2
"""exit code: what the user gave cannot be worked with"""


class OneLineParser(argparse.ArgumentParser):
    """Errors on one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and leave."""
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def number(group: argparse._ActionsContainer, option: str, default: int, meaning: str) -> None:
    """An option that is a whole number."""
    group.add_argument(option, type=int, default=default, metavar="N", help=meaning)


def number_or_auto(group: argparse._ActionsContainer, option: str, default: int, meaning: str) -> None:
    """An option that is a whole number, or the plan's to choose."""
    kind, meaning = _whole_or_auto, f"{meaning}; auto: what is quickest"
    group.add_argument(option, type=kind, default=default, metavar="N", help=meaning)


def _whole_or_auto(text: str) -> int | str:
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number or auto, found {text!r}") from None


def model_command(
    commands: "argparse._SubParsersAction[OneLineParser]", name: str, summary: str, description: str
) -> OneLineParser:
    """A command for a model: which one."""
    command = commands.add_parser(name, help=summary, description=description, formatter_class=Defaults)
    command.add_argument("--model", required=True, help="merged_model or adapter of a run, or any base model")
    command.add_argument("--base", default="", help="the base of the adapter (default: the one that it names)")
    return command


def asking_command(
    commands: "argparse._SubParsersAction[OneLineParser]", name: str, summary: str, description: str
) -> OneLineParser:
    """A command that asks a model: which one, and how chats are written."""
    command = model_command(commands, name, summary, description)
    template = 'Jinja file, or "plain" for a tokenizer without (default: the tokenizer\'s own)'
    command.add_argument("--chat-template", default="", metavar="FILE", help=template)
    return command


def fail(code: int, message: str) -> int:
    """`message` on one line of stderr; returns `code`."""
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
