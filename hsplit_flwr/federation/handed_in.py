"""Adapters as clients handed them in last, where they are kept: what their next ones are compared with.

A client's adapters travel as they are, once, and the server takes the difference: to send it would be twice the bytes.
Who has lost what it handed in, or handed it in to another run, restarts, and says so.
"""

from collections.abc import Mapping

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.factors import LoraFactors

Factors = Mapping[str, LoraFactors]


class HandedIn:
    """Each client's last adapters, in memory."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, Factors]] = {}

    def round_of(self, client: str) -> int:
        """The round in which `client` handed in its last ones; 0: it never did."""
        return self._last[client][0] if client in self._last else 0

    def adapters(self, client: str, round_number: int) -> Factors:
        """What `client` handed in in that round; 0: nothing, it restarted.

        Raises:
            AggregationError: that was not its last time.
        """
        last = self.round_of(client)
        if round_number not in (0, last):
            raise AggregationError(
                f"Expected adapters that go on from round {last}, or that restarted (0), found round {round_number}."
            )
        return self._last[client][1] if round_number else {}

    def take(self, client: str, round_number: int, adapters: Factors) -> None:
        """`client` handed in `adapters`."""
        self._last[client] = round_number, adapters
