"""A process that answers every line of JSON with one."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

END_LIMIT_S = 20.0


def answer(report: Mapping[str, Any]) -> None:
    """One line to the parent."""
    print(json.dumps(report), flush=True)


class Child:
    """A script beside this file, in a process of its own; it ends when this one does, whose lines it waits for.

    Args:
        script: its file name.
        order: its one argument, as JSON.
        enter: what comes before the command, e.g. `Namespace.enter`.
        environment: added to this process's, without proxies: there are none in a namespace.
    """

    def __init__(
        self, script: str, order: Mapping[str, Any], enter: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        self._script = script
        self._process = subprocess.Popen(
            [*enter, sys.executable, str(Path(__file__).with_name(script)), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, **inherited},
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )

    def tell(self, order: Mapping[str, Any]) -> None:
        """Give it a line."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self, limit_s: float) -> dict[str, Any]:
        """Its next line.

        Raises:
            RuntimeError: it ended, or said nothing within `limit_s`.
        """
        assert self._process.stdout
        # It says one line at a time, so that none is ever left in the buffer, which `select` does not see.
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            raise RuntimeError(f"Expected {self._script} to answer within {limit_s:.0f} s, found nothing.")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait(END_LIMIT_S)
            raise RuntimeError(f"Expected {self._script} to answer, found it ended with exit code {code}; see above.")
        report: dict[str, Any] = json.loads(line)
        return report

    def ask(self, order: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """`tell` and `hear`."""
        self.tell(order)
        return self.hear(limit_s)

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait(END_LIMIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
