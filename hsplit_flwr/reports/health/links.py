"""How much of its time each client spent on its link, from what clients and tail measured.

A client's `exchange` seconds hold the tail's compute, waiting for slower clients of its steps, and the link. The tail's
compute is known. In a synchronous step all of a wave take as long as its slowest, so what a client would have waited
had no byte been sent is the compute of the slowest of its wave minus its own; the rest is what links cost its rounds,
its own link or another's, and further passes of the tail (`tail_passes`) that it had to wait for.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsplit_flwr.common.tables import client_order
from hsplit_flwr.reports.health.records import TailSteps
from hsplit_flwr.reports.records import ClientRecord, RoundRecord


@dataclass(frozen=True)
class LinkUse:
    """One client over a run."""

    client: str
    compute_s: float
    exchange_s: float
    link_s: float
    """of `exchange_s`: neither the tail's compute nor waiting for slower devices"""
    bytes: int
    """up and down"""
    steps: int
    tail_known: bool
    """False: `link_s` includes the tail's compute in some round"""

    @property
    def share(self) -> float:
        """Share of the client's time in its steps that its link took."""
        return self.link_s / (self.compute_s + self.exchange_s)


def link_use(history: Sequence[RoundRecord]) -> tuple[LinkUse, ...]:
    """Every client that reported finite seconds, in the order of ids."""
    uses: dict[str, list[LinkUse]] = defaultdict(list)
    for record in history:
        timed = {client.client_id: client for client in record.clients if _timed(client)}
        for client in timed.values():
            uses[client.client_id].append(_round_use(client, timed, record.steps))
    return tuple(_total(uses[client]) for client in sorted(uses, key=client_order))


def _round_use(client: ClientRecord, timed: Mapping[str, ClientRecord], steps: TailSteps | None) -> LinkUse:
    compute, exchange = client.seconds["compute"], client.seconds["exchange"]
    tail = steps.tail_seconds.get(client.client_id) if steps else None
    wave = next((wave for wave in steps.waves if client.client_id in wave), ()) if steps else ()
    slowest = max([compute, *(timed[other].seconds["compute"] for other in wave if other in timed)])
    link = exchange - (tail or 0.0) - (slowest - compute)
    return LinkUse(
        client.client_id,
        compute,
        exchange,
        max(0.0, link),
        client.bytes_up + client.bytes_down,
        client.steps,
        tail is not None and math.isfinite(tail),
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
