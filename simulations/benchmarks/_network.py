"""Network namespaces joined by veth pairs whose rates `tc` limits (token bucket filter): real links on one machine.

Linux and root only; no netem is needed, and so there is no delay but that of the bytes. A namespace has no name: it is
that of a `cat` which waits for this process, and is gone with it, links and all, however this process ends.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

TOOLS = ("unshare", "nsenter", "ip", "tc")
COMMAND_LIMIT_S = 20.0
NAMESPACE_LIMIT_S = 5.0
TRANSFER_LIMIT_S = 60.0
BURST_S, LEAST_BURST_BYTES = 3e-4, 1600
"""of the token bucket: what timers may be late by, and a packet. More would let small frames pass unlimited."""
QUEUE_BYTES = 256 * 1024
"""before a link: no packet is dropped at the rates here (counted: 0 dropped of 9,500)"""
CONGESTION = ("congctl", "cubic")
"""of a route: Linux's default congestion control, whatever this machine's is. By route, because a machine whose own is
another one allows no namespace to choose it for all connections."""
HEAD_END, TAIL_END = "hsplit", "hsplit"
"""of a link, by the device's name; at the tail a number follows"""
CHECK_S, CHECKS = 1.0, 3
"""of a transfer that checks a rate, and how many"""


@dataclass(frozen=True)
class Rates:
    """Of one link, as Ethernet frames."""

    up_mbit_s: float
    down_mbit_s: float


class Transfer(NamedTuple):
    """A plain TCP transfer in one direction."""

    goodput_mbit_s: float
    """what the receiver reads"""
    wire_mbit_s: float
    """as Ethernet frames, headers included; what the filter limits"""
    dropped: int
    """packets"""


def why_not() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces are Linux's, this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces and tc need root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"there is no {', '.join(missing)} (packages util-linux, iproute2)"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, timeout=COMMAND_LIMIT_S)
    return f"this root may make no network namespace: {tried.stderr.strip()}" if tried.returncode else None


class Namespace:
    """A network namespace with nothing in it but its own loopback."""

    def __init__(self) -> None:
        # In a session of its own, so that Ctrl-C does not end it before what is inside.
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, start_new_session=True)
        self.enter = ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")
        """what comes before a command that is to run inside"""
        try:
            self._wait()
            self.run("ip", "link", "set", "lo", "up")
            self.run("ip", "route", "replace", "local", "127.0.0.1", "dev", "lo", "table", "local", *CONGESTION)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of a process inside."""
        return self._holder.pid

    def run(self, *command: str) -> str:
        """Run `command` inside; returns what it prints.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            [*self.enter, *command], capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"Expected `{' '.join(command)}` to work, found: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """Give it up; it is gone with the last process inside."""
        self._holder.kill()
        self._holder.wait(COMMAND_LIMIT_S)
        if self._holder.stdin:
            self._holder.stdin.close()

    def _wait(self) -> None:
        """Until `unshare` has left this process's namespace: before, commands would change the machine's own."""
        end = time.monotonic() + NAMESPACE_LIMIT_S
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{self.pid}/ns/net").readlink() == own:
            if self._holder.poll() is not None or time.monotonic() > end:
                raise RuntimeError("Expected a network namespace of its own, found none (unshare --net).")
            time.sleep(0.005)


class Star:
    """A namespace for the tail and one for each head, with a link of its own. Use as a context manager."""

    def __init__(self, heads: int) -> None:
        self._open = ExitStack()
        try:
            self.tail = self._namespace()
            self.heads = [self._namespace() for _ in range(heads)]
            for index, head in enumerate(self.heads):
                self._join(index, head)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def tail_address(self, head: int) -> str:
        """The tail's at the end of this head's link."""
        return f"10.77.{head}.1"

    def limit(self, rates: Rates) -> None:
        """Limit every link to `rates` from now on."""
        for index, head in enumerate(self.heads):
            for namespace, device, mbit_s in (
                (head, HEAD_END, rates.up_mbit_s),
                (self.tail, f"{TAIL_END}{index}", rates.down_mbit_s),
            ):
                burst = max(LEAST_BURST_BYTES, round(mbit_s * 1e6 / 8 * BURST_S))
                bucket = f"rate {mbit_s * 1e6:.0f}bit burst {burst} limit {QUEUE_BYTES}"
                namespace.run("tc", "qdisc", "replace", "dev", device, "root", "tbf", *bucket.split())

    def transfer(self, mbit_s: float, *, up: bool) -> Transfer:
        """Send by plain TCP over the first head's link, up or down, as much as takes `CHECK_S` at `mbit_s`.

        The fastest of `CHECKS`: a receiver that waits for a core makes a link look slower than it is.
        """
        return max((self._transfer(mbit_s, up=up) for _ in range(CHECKS)), key=lambda one: one.wire_mbit_s)

    def _transfer(self, mbit_s: float, *, up: bool) -> Transfer:
        sender, receiver = (self.heads[0], self.tail) if up else (self.tail, self.heads[0])
        device = HEAD_END if up else f"{TAIL_END}0"
        address = "10.77.0.1" if up else "10.77.0.2"
        script = [sys.executable, str(Path(__file__).with_name("_transfer.py"))]
        before = _queue(sender, device)
        receiving = subprocess.Popen(
            [*receiver.enter, *script, "receive", address], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            assert receiving.stdout
            port = receiving.stdout.readline().strip()
            sender.run(*script, "send", address, port, str(int(mbit_s * 1e6 / 8 * CHECK_S)))
            read = json.loads(receiving.communicate(timeout=TRANSFER_LIMIT_S)[0])
        finally:
            receiving.kill()
            receiving.wait(COMMAND_LIMIT_S)
        after = _queue(sender, device)
        goodput = 8e-6 * read["timed_bytes"] / read["seconds"]
        wire = (after["bytes"] - before["bytes"]) / read["bytes"]
        return Transfer(goodput, goodput * wire, after["drops"] - before["drops"])

    def _namespace(self) -> Namespace:
        namespace = Namespace()
        self._open.callback(namespace.close)
        return namespace

    def _join(self, index: int, head: Namespace) -> None:
        tail_end = f"{TAIL_END}{index}"
        pair = f"ip link add {tail_end} type veth peer name {HEAD_END} netns {head.pid}"
        self.tail.run(*pair.split())
        for namespace, device, last in ((self.tail, tail_end, 1), (head, HEAD_END, 2)):
            namespace.run("ip", "addr", "add", f"10.77.{index}.{last}/30", "dev", device, "noprefixroute")
            namespace.run("ip", "link", "set", "dev", device, "up")
            namespace.run("ip", "route", "add", f"10.77.{index}.0/30", "dev", device, *CONGESTION)


def _queue(namespace: Namespace, device: str) -> dict[str, Any]:
    """The counters of a device's filter."""
    (queue,) = json.loads(namespace.run("tc", "-s", "-j", "qdisc", "show", "dev", device, "root"))
    counters: dict[str, Any] = queue
    return counters
