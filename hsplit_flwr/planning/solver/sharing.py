"""How clients share the server: cuts of the largest total value with a limited number of blocks in the tail.

A client's *lift* is the number of blocks by which its cut is above the deepest; the sum of lifts is limited. This is a
multiple-choice knapsack with small whole weights: the Lagrangian dual bounds it and fixes most clients' cuts, a dynamic
programme over the few that are left makes the answer exact.
"""

import numpy as np

from hsplit_flwr.planning.solver.objective import Floats, Ints

PRICES = 12
"""bisections of the price of a lift where only a bound is asked for"""
FINE_PRICES = 60
CORE_ENTRIES = 20_000_000
"""the largest table of the dynamic programme; beyond it the answer is what the dual's price leads to"""


def upper_bounds(values: Floats, limits: Ints) -> Floats:
    """(N,) no choice of cuts with a sum of lifts within `limits` (N,) has a larger sum of `values` (n, C, N).

    A client's *lift* is the number of blocks by which its cut is above the deepest. The Lagrangian dual: the least,
    over prices p >= 0 of a lift, of sum_i max_s (value - p lift) + p limit, found by bisection. -inf: no such choice.
    """
    lifts = np.arange(values.shape[1])[::-1, None]
    least = np.where(np.isfinite(values), lifts, values.shape[1]).min(axis=1)
    low, high = np.zeros(len(limits)), np.full(len(limits), float(np.max(values, initial=1.0)))
    bounds = values.max(axis=1).sum(axis=0)
    for _ in range(PRICES):
        price = (low + high) / 2
        net = values - price * lifts
        bounds = np.minimum(bounds, net.max(axis=1).sum(axis=0) + price * limits)
        dear = len(lifts) * len(values) - len(values) - np.argmax(net, axis=1).sum(axis=0) <= limits
        low, high = np.where(dear, low, price), np.where(dear, price, high)
    hopeless = (least == values.shape[1]).any(axis=0) | (least.sum(axis=0) > limits)
    return np.where(hopeless, -np.inf, bounds)


def share(values: Floats, limit: int) -> Ints | None:
    """(n,) cuts that maximize the sum of `values` with a sum of lifts within `limit`; None: there are none.

    Args:
        values: (n, C), -inf where a client cannot have a cut.
        limit: on the sum of lifts.
    """
    by_lift = values[:, ::-1]
    lifts = np.arange(by_lift.shape[1])
    if not np.isfinite(by_lift).any(axis=1).all() or np.isfinite(by_lift).argmax(axis=1).sum() > limit:
        return None
    chosen = np.argmax(by_lift, axis=1)
    if chosen.sum() > limit:
        price, chosen = _priced(by_lift, limit)
        net = by_lift - price * lifts
        missed = net.max(axis=1)[:, None] - net
        bound = net.max(axis=1).sum() + price * limit
        value = np.take_along_axis(by_lift, chosen[:, None], axis=1).sum()
        keep = missed <= max(bound - value, 0.0) + 1e-12 * abs(bound)
        chosen = _best_of_kept(np.where(keep, by_lift, -np.inf), limit, chosen)
    cuts: Ints = len(lifts) - chosen
    return cuts


def _priced(by_lift: Floats, limit: int) -> tuple[float, Ints]:
    """The least price of a lift at which the clients' own choices are within `limit`; those, filled up."""
    lifts = np.arange(by_lift.shape[1])
    low, high = 0.0, float(by_lift.max()) + 1.0
    for _ in range(FINE_PRICES):
        price = (low + high) / 2
        if np.argmax(by_lift - price * lifts, axis=1).sum() > limit:
            low = price
        else:
            high = price
    chosen = np.argmax(by_lift - high * lifts, axis=1)
    wanted = np.argmax(by_lift - low * lifts, axis=1)
    room = limit - chosen.sum()
    for client in np.flatnonzero(wanted > chosen):
        if wanted[client] - chosen[client] <= room:
            room -= wanted[client] - chosen[client]
            chosen[client] = wanted[client]
    return high, chosen


def _best_of_kept(by_lift: Floats, limit: int, fallback: Ints) -> Ints:
    """(n,) lifts that maximize the sum of `by_lift` (n, C) within `limit`, by dynamic programming."""
    able = np.isfinite(by_lift)
    least = able.argmax(axis=1)
    spread = by_lift.shape[1] - 1 - able[:, ::-1].argmax(axis=1) - least
    core = np.flatnonzero(spread)
    room = int(limit - least.sum())
    width = int(min(room, spread.sum())) + 1
    if (len(core) + 1) * width > CORE_ENTRIES:
        return fallback
    tables = np.full((len(core) + 1, width), -np.inf)
    tables[0] = 0.0
    for row, client in enumerate(core):
        for lift in np.flatnonzero(able[client]):
            extra = lift - least[client]
            if extra < width:
                candidate = tables[row, : width - extra] + by_lift[client, lift]
                np.maximum(tables[row + 1, extra:], candidate, out=tables[row + 1, extra:])
    chosen: Ints = least.copy()
    left = width - 1
    for row, client in reversed(list(enumerate(core))):
        options = [lift for lift in np.flatnonzero(able[client]) if lift - least[client] <= left]
        sums = [tables[row, left - (lift - least[client])] + by_lift[client, lift] for lift in options]
        chosen[client] = options[int(np.argmax(sums))]
        left -= chosen[client] - least[client]
    return chosen
