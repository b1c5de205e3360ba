"""A command whose reader leaves early (``| head``) ends in silence, as other commands do."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

READER_LEFT = 141
"""exit code, as shells have it: 128 + SIGPIPE"""


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around a whole command: ends the process with `READER_LEFT` where nobody reads its standard output any more."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise  # another pipe or socket: somebody's error
        raise SystemExit(READER_LEFT) from None


def _reader_left() -> bool:
    descriptor = sys.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # for the interpreter's own last flush
    return True
