"""``hsplit-flwr chat``: a result is talked to, line by line."""

import argparse
from typing import TYPE_CHECKING

from hsplit_flwr.cli.parsing import OneLineParser, asking_command, number
from hsplit_flwr.errors import ConfigError

if TYPE_CHECKING:
    from hsplit_flwr.models.conversation import Conversation

FORGET, END = "/forget", "/end"
PROMPT = "> "


def declare(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Add the command and its options."""
    chat = asking_command(commands, "chat", "talk to a model", "Talk to a model, line by line; it answers greedily.")
    chat.add_argument("--system", default="", metavar="TEXT", help="message of the system before all others")
    number(chat, "--max-new-tokens", 128, "tokens of an answer")
    chat.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer every line of the standard input, until it ends."""
    from hsplit_flwr.data.chat_template import chat_template
    from hsplit_flwr.models.conversation import Conversation
    from hsplit_flwr.models.trained import load_trained

    model, tokenizer = load_trained(options.model, base=options.base)
    template = chat_template(tokenizer, options.chat_template)
    if template is None:
        raise ConfigError(
            f"Expected a chat template in the tokenizer of {options.model}, found none. "
            "Give one: --chat-template plain, or a Jinja file."
        )
    talk = Conversation(model, tokenizer, template, max_new_tokens=options.max_new_tokens, system=options.system)
    room = f"chat and answer within {talk.positions} tokens, " if talk.positions else ""
    print(f"{room}answers of up to {options.max_new_tokens}; {FORGET} begins anew, {END} ends")
    _talk(talk, options.max_new_tokens)
    return 0


def _talk(talk: "Conversation", max_new_tokens: int) -> None:
    while (line := _next_line()) is not None:
        if line == FORGET:
            talk.forget()
            print("(begun anew)")
        elif line:
            _answer(talk, line, max_new_tokens)


def _next_line() -> str | None:
    """What a person types; None at the end."""
    try:
        line = input(PROMPT).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line == END else line


def _answer(talk: "Conversation", line: str, max_new_tokens: int) -> None:
    """An answer as it is written, and what it lacks; an error or an interruption costs this answer alone."""
    pieces: list[str] = []

    def say(piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)

    try:
        answer = talk.ask(line, say)
    except ConfigError as error:
        print(f"({error})")
        return
    except KeyboardInterrupt:
        print("\n(interrupted: neither message nor answer is kept)")
        return
    print()
    if "".join(pieces) != answer.text:  # a decoder that takes back what it made of the first tokens
        print(f"(as a whole: {answer.text})")
    if answer.left_out:
        print(f"(no room for the chat so far: left out its {answer.left_out} oldest messages with their answers)")
    if not answer.ended:
        print(f"(cut at {max_new_tokens} tokens, see --max-new-tokens)")
