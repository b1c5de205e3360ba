"""Our log lines where Flower's go, as text or as JSON."""

import logging
import sys
from typing import Any

from hsplit_flwr.common.log_lines import JsonLines
from hsplit_flwr.errors import ConfigError

TEXT, JSON = "text", "json"
OURS, FLOWER = "hsplit_flwr", "flwr"


def log_through_flower() -> None:
    """Let our log lines go to the console and to `flwr run --stream`, as Flower's own."""
    ours = logging.getLogger(OURS)
    ours.setLevel(logging.INFO)
    for handler in logging.getLogger(FLOWER).handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)


def log_as(log_format: str, run: int) -> None:
    """With `log_format` ``json``, let Flower and us log one JSON object a line, which names the `run`.

    The lines go where Flower's console lines went, `flwr run --stream` and `flwr log` included. For a whole process.

    Raises:
        ConfigError: another ``log-format``.
    """
    if log_format not in (TEXT, JSON):
        raise ConfigError(f'Expected log-format = "{TEXT}" or "{JSON}", found {log_format!r}.')
    if log_format == JSON:
        _replace_console(JsonLines(run=str(run)))
        log_through_flower()


class _Console(logging.StreamHandler[Any]):
    """What is written to whatever standard error is by then: Flower puts its own in place, to stream it."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, unless it would be an empty one between others."""
        if record.getMessage().strip():
            self.stream = sys.stderr
            super().emit(record)


def _replace_console(formatter: logging.Formatter) -> None:
    for name in (FLOWER, OURS):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            if type(handler).__name__ == "ConsoleHandler" or isinstance(handler, _Console):
                logger.removeHandler(handler)
    logging.getLogger(FLOWER).addHandler(_Console(formatter))
