"""Commands whose reader leaves: silence and the code of shells, not a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsplit_flwr.common.closed_pipe import READER_LEFT, reader_may_leave

STORE = Path(__file__).resolve().parents[2] / "simulations" / "evidence" / "settings.csv"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("hsplit_flwr.experiments", "table", str(STORE)), {READER_LEFT}),
        (("hsplit_flwr.cli", "plan", "--help"), {READER_LEFT, 0}),  # argparse itself may overlook it
    ],
)
def test_a_command_whose_reader_is_gone(command: tuple[str, ...], code: set[int], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
            env=environment,
        )
    assert done.returncode in code, done.stderr
    assert "Error" not in done.stderr


def test_another_pipes_end_is_an_error() -> None:
    with pytest.raises(BrokenPipeError, match="a socket"), reader_may_leave():
        raise BrokenPipeError("a socket")
