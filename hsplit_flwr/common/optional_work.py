"""Work that a run can do without: what it raises is logged and ends nothing."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from hsplit_flwr.errors import HSplitError

_log = logging.getLogger(__name__)


class OptionalWork:
    """Guards one kind of work: logs why it failed once a cause, and in the end how often.

    Args:
        loss: what is missing where it failed, as the log says it.
    """

    def __init__(self, loss: str) -> None:
        self._loss = loss
        self._failures: Counter[str] = Counter()

    @contextmanager
    def spared(self) -> Iterator[None]:
        """Do the work of this `with`, as far as it goes; a `BaseException` that is no `Exception` passes."""
        try:
            yield
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Count a failure and log it, unless one of its kind was logged."""
        kind = f"{type(error).__name__} {getattr(error, 'code', '')}".strip()
        self._failures[kind] += 1
        if self._failures[kind] == 1:
            ours = isinstance(error, HSplitError)  # says itself what was expected, found and what to do
            text = str(error) if ours else f"{type(error).__name__}: {error}"
            _log.warning("%s: %s", self._loss, text, exc_info=None if ours else error)

    def close(self) -> None:
        """Log how often each kind failed, where that was more than once, and count from 0 again."""
        for kind, times in self._failures.items():
            if times > 1:
                _log.warning("%s: %d times in all (%s)", self._loss, times, kind)
        self._failures.clear()
