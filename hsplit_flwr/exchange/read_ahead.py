"""Frames that arrive while the tail computes.

A transport hands out a frame when it is asked for one; until then HTTP/2 holds back most of it at the sender. Where a
head has several parts of a batch on their way, the link would idle while the tail computes.
"""

import queue
import threading
from collections.abc import Iterator

_POLL_S = 1.0
_END = object()


def read_ahead(frames: Iterator[bytes], count: int) -> Iterator[bytes]:
    """`frames`, of which up to `count` (and one in hand) are taken in before they are asked for, in a thread.

    Whatever taking them in raises is raised here in its place. The thread ends with the frames; who stops early must
    see to it that they end.
    """
    if count < 1:
        yield from frames
        return
    taken: queue.Queue[object] = queue.Queue(count)
    stopped = threading.Event()

    def take() -> None:
        try:
            for frame in frames:
                if not _put(taken, frame, stopped):
                    return
            _put(taken, _END, stopped)
        except BaseException as error:
            _put(taken, error, stopped)

    threading.Thread(target=take, name="tail-read-ahead", daemon=True).start()
    try:
        while (item := taken.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            assert isinstance(item, bytes)
            yield item
    finally:
        stopped.set()


def _put(taken: "queue.Queue[object]", item: object, stopped: threading.Event) -> bool:
    """Put `item` in once there is room; False if nobody takes any more."""
    while not stopped.is_set():
        try:
            taken.put(item, timeout=_POLL_S)
        except queue.Full:
            continue
        return True
    return False
