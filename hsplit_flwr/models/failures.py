"""What to say where a model's own code stops: its first line, and the module that it happened in."""

from torch import nn

LONGEST = 200
"""characters of what is quoted"""


def first_line(error: BaseException) -> str:
    """The first line of what `error` says; the name of its class if it says nothing."""
    return (str(error).strip().partition("\n")[0].rstrip(" .:") or type(error).__name__)[:LONGEST]


def cause(error: BaseException) -> str:
    """Where it stopped and what is said there, for a message: ``that LlamaMLP stops: ...``."""
    return f"that {innermost_module(error)} stops: {first_line(error)}"


def innermost_module(error: BaseException) -> str:
    """The class of the innermost module that raised; ``the step`` where none did."""
    module, frame = "the step", error.__traceback__
    while frame:
        owner = frame.tb_frame.f_locals.get("self")
        module = type(owner).__name__ if isinstance(owner, nn.Module) else module
        frame = frame.tb_next
    return module
