"""How far one client can move a round: its share of the aggregation, the size of its update, its word on importance.

Whatever is within the bounds goes through bit for bit. The size of a head's update is the root mean square over its
adapters of ``||c B A||_F``, so that heads of different cuts compare. Measured against the round's own clients the
bounds hold as long as most of them are honest; the median is the lower one, so that of two clients the larger update
is not its own measure.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median_low
from typing import TypeVar

from hsplit_flwr.common.reasons import describe_failure
from hsplit_flwr.federation.acceptance import Accepted
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.lora.factors import LoraFactors, largest_product_norm

_log = logging.getLogger("hsplit_flwr")
IMPORTANCE_RATIO = 10.0
"""a client's total importance beyond so many times the median of the round's is not taken at its word"""
Client = TypeVar("Client")
Profiles = Mapping[str, Mapping[str, float]]
"""client id -> importance by module name"""


def bounded_shares(shares: Mapping[Client, float], most: float) -> dict[Client, float]:
    """Shares p_i of which none is above `most`; what is cut off goes to the others in proportion to theirs.

    That is ``min(most, c p_i)`` with the one c that gives the sum 1. Where `most` cannot be held (it is below 1/n for n
    clients with a share) all of them have 1/n.

    Args:
        shares: >= 0, sum 1.
        most: in (0, 1]; 1: no bound.
    """
    open_shares = {client: share for client, share in shares.items() if share > 0}
    limit = max(most, 1 / len(open_shares))
    if max(open_shares.values()) <= limit:
        return dict(shares)
    bounded = dict.fromkeys(shares, 0.0)
    while open_shares:
        rest = 1 - math.fsum(bounded.values())
        total = math.fsum(open_shares.values())
        above = [client for client, share in open_shares.items() if rest * share / total > limit]
        if not above:
            return bounded | {client: rest * share / total for client, share in open_shares.items()}
        for client in above:
            bounded[client] = limit
            del open_shares[client]
    return bounded


def bound_updates(accepted: Mapping[str, Accepted], config: StrategyConfig) -> tuple[dict[str, Accepted], list[str]]:
    """The clients with updates no larger than `config` allows, and a line for each one that was larger.

    Such an update is scaled down to the limit or, with ``update_excess = "refuse"``, left out with its client.
    """
    bounded, lines = dict(accepted), []
    sizes = {client: update_size(done.trained.factors.values()) for client, done in _with_bounds(accepted, config)}
    limit = _largest_size(sizes.values(), config)
    for client, size in sizes.items():
        if size <= limit:
            continue
        done = bounded.pop(client)
        what = "left out"
        if config.update_excess == "clip":
            bounded[client] = done._replace(trained=replace(done.trained, factors=_scaled(done, limit / size)))
            what = "scaled down to it"
        lines.append(describe_failure(client, f"Expected an update of size <= {limit:.4g}, found {size:.4g}: {what}."))
    return dict(sorted(bounded.items())), lines


def update_size(adapters: Iterable[LoraFactors]) -> float:
    """Root mean square of ``||c B A||_F`` over a head's `adapters`; 0 without any.

    Each norm is taken as the largest that float32 may make of it: factors that cancel in exact arithmetic do not cancel
    in the weights.
    """
    norms = [abs(factors.scaling) * largest_product_norm(factors) for factors in adapters]
    return math.sqrt(math.fsum(norm**2 for norm in norms) / len(norms)) if norms else 0.0


def balanced_importance(heads: Profiles, tail: Profiles) -> tuple[dict[str, Mapping[str, float]], Profiles]:
    """What heads and tail measured, per client, with nobody's profile far above the others'.

    Profiles are merged by the clients' shares, so one of 1e15 would be the only one to count. A client's whose total is
    more than `IMPORTANCE_RATIO` times the lower median is scaled down to that median: it still says what it says, and
    counts for its share.
    """
    totals = {client: math.fsum([*head.values(), *tail.get(client, {}).values()]) for client, head in heads.items()}
    measured = [total for total in totals.values() if total > 0]
    usual = median_low(measured) if measured else 0.0
    factors = {client: usual / total for client, total in totals.items() if total > IMPORTANCE_RATIO * usual}
    for client in factors:
        _log.warning("client %s: importance %.3g is scaled down to %.3g", client, totals[client], usual)
    return _scale_some(heads, factors), _scale_some(tail, factors)


def _scale_some(profiles: Profiles, factors: Mapping[str, float]) -> dict[str, Mapping[str, float]]:
    return {
        client: {name: factors[client] * value for name, value in profile.items()} if client in factors else profile
        for client, profile in profiles.items()
    }


def _with_bounds(accepted: Mapping[str, Accepted], config: StrategyConfig) -> list[tuple[str, Accepted]]:
    """The clients whose updates are to be measured: none where nothing is bounded, nor any without adapters."""
    if not (config.max_update_norm or config.max_update_ratio):
        return []
    return [(client, done) for client, done in accepted.items() if done.trained.factors]


def _largest_size(sizes: Iterable[float], config: StrategyConfig) -> float:
    found = list(sizes)
    limits = [config.max_update_norm] if config.max_update_norm else []
    if config.max_update_ratio and found:
        limits.append(config.max_update_ratio * median_low(found))
    return min(limits, default=math.inf)


def _scaled(done: Accepted, factor: float) -> dict[str, LoraFactors]:
    return {name: replace(pair, scaling=pair.scaling * factor) for name, pair in done.trained.factors.items()}
