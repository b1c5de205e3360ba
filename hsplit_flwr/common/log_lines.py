"""Log records as lines of JSON, for programs that collect logs.

Whoever logs something that programs should find says what it is::

    _log.info("round %d: ...", number, extra=about("round_opened", round=number, clients=len(tasks)))
"""

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

_ABOUT = "hsplit_about"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def about(event: str, **fields: Any) -> dict[str, Any]:
    """The ``extra`` of a log call: a name of what happened, and facts such as ``round`` and ``client``."""
    return {_ABOUT: {"event": event, **fields}}


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, event, message and what the call was `about`.

    Records that say nothing about themselves, those of other libraries among them, have the event ``message``.

    Args:
        always: fields of every line, such as the id of the run.
    """

    def __init__(self, **always: Any) -> None:
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **self._always,
            "event": "message",
            **getattr(record, _ABOUT, {}),
            "message": _COLOURS.sub("", record.getMessage()).strip(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
