"""How much of its time each client spent on its link, from what clients and tail measured.

A client's `exchange` seconds are those in which it waits for answers. The tail knows how long it had the client's
batches: it computed, or those before it had their turn, slower clients among them. The rest is what the client's own
link took. Where parts are in flight the client computes while others are with the tail, so it is at least that much.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hsplit_flwr.common.tables import client_order
from hsplit_flwr.reports.records import ClientRecord, RoundRecord


@dataclass(frozen=True)
class LinkUse:
    """One client over a run."""

    client: str
    compute_s: float
    exchange_s: float
    link_s: float
    """of `exchange_s`: neither the tail's compute nor waiting for other clients"""
    bytes: int
    """up and down"""
    steps: int
    tail_known: bool
    """False: `link_s` includes what the tail took in some round"""

    @property
    def share(self) -> float:
        """Share of the client's time in its steps that its link took."""
        return self.link_s / (self.compute_s + self.exchange_s)


def link_use(history: Sequence[RoundRecord]) -> tuple[LinkUse, ...]:
    """Every client that reported finite seconds, in the order of ids."""
    uses: dict[str, list[LinkUse]] = defaultdict(list)
    for record in history:
        for client in filter(_timed, record.clients):
            uses[client.client_id].append(_round_use(client))
    return tuple(_total(uses[client]) for client in sorted(uses, key=client_order))


def _round_use(client: ClientRecord) -> LinkUse:
    exchange, held = client.seconds["exchange"], client.held_s
    return LinkUse(
        client.client_id,
        client.seconds["compute"],
        exchange,
        max(0.0, exchange - (held or 0.0)),
        client.bytes_up + client.bytes_down,
        client.steps,
        held is not None,
    )


def _total(rounds: Sequence[LinkUse]) -> LinkUse:
    return LinkUse(
        rounds[0].client,
        sum(use.compute_s for use in rounds),
        sum(use.exchange_s for use in rounds),
        sum(use.link_s for use in rounds),
        sum(use.bytes for use in rounds),
        sum(use.steps for use in rounds),
        all(use.tail_known for use in rounds),
    )


def _timed(client: ClientRecord) -> bool:
    compute, exchange = (client.seconds.get(phase, math.nan) for phase in ("compute", "exchange"))
    return 0 <= compute < math.inf and 0 <= exchange < math.inf and compute + exchange > 0
