"""Log records as JSON: one object a line, whatever they say."""

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from hsplit_flwr.common.log_lines import JsonLines, about


class Caught(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def line_of(message: str, *arguments: object, **options: Any) -> dict[str, Any]:
    handler = Caught()
    logger = logging.getLogger("tests.log_lines")
    logger.propagate = False  # what is no UTF-8 cannot go into the report of a test that another process runs
    logger.addHandler(handler)
    try:
        logger.warning(message, *arguments, **options)
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    text = JsonLines(run="7").format(handler.records[0])
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_line_says_what_the_call_was_about() -> None:
    told = about("refused", client="3", round=2, code="bad_token")
    line = line_of("tail: refused %s", "3", extra=told)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "logger": "tests.log_lines",
        "run": "7",
        "event": "refused",
        "client": "3",
        "round": 2,
        "code": "bad_token",
        "message": "tail: refused 3",
    }


@pytest.mark.parametrize(
    "said", ['"quotes" and \\', "two\nlines\r\n", "\x1b[92mcolour\x1b[0m", "\u2028 \x00 \ud800", "%", ""]
)
def test_whatever_is_said_stays_one_line(said: str) -> None:
    line = line_of("%s", said)
    assert line["event"] == "message"
    assert line["message"] == said.replace("\x1b[92m", "").replace("\x1b[0m", "").strip()


def test_an_exception_is_in_its_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError as error:
        line = line_of("failed", exc_info=error)
    assert line["exception"].endswith("ValueError: broken")


PROGRAM = """
import logging
from flwr.common.logger import log
from hsplit_flwr.flower.flower_log import log_as, log_through_flower
for _ in range(2):  # a server's app is made anew in tests and simulations
    log_as("FORMAT", 42)
    log_through_flower()
log(logging.INFO, "")
log(logging.INFO, "[ROUND %s]", 1)
logging.getLogger("hsplit_flwr").warning("ours")
"""


def logged(log_format: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.replace("FORMAT", log_format)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


def test_flower_and_we_log_json_where_flower_logged_text() -> None:
    done = logged("json")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["run"], line["logger"], line["message"]) for line in lines] == [
        ("42", "flwr", "[ROUND 1]"),
        ("42", "hsplit_flwr", "ours"),
    ]


def test_text_stays_as_it_was() -> None:
    done = logged("text")
    assert done.stderr.count("ours") == done.stderr.count("[ROUND 1]") == 1
    assert "{" not in done.stderr


def test_another_format_is_refused() -> None:
    done = logged("xml")
    assert 'Expected log-format = "text" or "json", found \'xml\'.' in done.stderr
