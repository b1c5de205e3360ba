"""Failures in one line each, for logs and summaries."""

import re

REASON_CHARACTERS = (160, 320)
"""kept of the start and of the end of a failure's reason: Ray sends stack traces, whose last line says what it was"""


def describe_failure(client: str, reason: str) -> str:
    """A line that names the client: no line breaks, no colours, the middle of a long reason left out."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", reason).split())
    start, end = REASON_CHARACTERS
    if len(text) > start + end:
        text = f"{text[:start]} ... {text[-end:]}"
    return f"client {client}: {text}"


def client_of(line: str) -> str | None:
    """The client that a line of `describe_failure` names, whatever stands before it; None: nobody."""
    named = re.search(r"\bclient (.+?): ", line)
    return named[1] if named else None
