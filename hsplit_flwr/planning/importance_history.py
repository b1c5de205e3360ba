"""Importance over clients and rounds: merged profiles, their drift, and a history with dynamic balance.

A *profile* maps whole-model module names to importance >= 0 (`training/importance.py`). HSplitLoRA (arXiv:2505.02795)
balances past and present importance dynamically: the present weighs less as training proceeds and more when importance
fluctuates. The paper's exact expressions are not public to us; names and formulas here are ours.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hsplit_flwr.common.checks import is_at_least, require, require_whole
from hsplit_flwr.common.dataclass_state import from_state, to_state
from hsplit_flwr.common.state import State
from hsplit_flwr.errors import ConfigError

LEAST_BALANCE = 0.1
"""how much a new profile weighs at least, however long training has gone on"""

Profile = Mapping[str, float]


def merge(per_client: Mapping[str, Profile], weights: Mapping[str, float]) -> dict[str, float]:
    """The mean profile of the clients: per module ``sum_i w_i I_i / sum_i w_i`` over the clients i that measured it.

    A client's profile joins what its head measured with what the tail measured for it (all blocks from its cut on).

    Args:
        per_client: client id -> profile; clients that measured nothing may be missing or empty.
        weights: client id -> weight > 0, such as its share p_i of the round's tokens (any scale).

    Raises:
        ConfigError: a client without a positive weight, or importance that is not a finite number >= 0.
    """
    totals: dict[str, float] = {}
    shares: dict[str, float] = {}
    for client, profile in per_client.items():
        weight = weights.get(client, 0.0)
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"Expected a finite weight > 0 for client {client!r}, found {weight}. "
                "Leave clients out that trained on nothing."
            )
        for name, value in _checked(profile).items():
            totals[name] = totals.get(name, 0.0) + weight * value
            shares[name] = shares.get(name, 0.0) + weight
    return {name: total / shares[name] for name, total in totals.items()}


def normalize(profile: Profile) -> dict[str, float]:
    """`profile` scaled to the sum 1.

    Raises:
        ConfigError: a value that is not a finite number >= 0, or nothing above 0.
    """
    total = math.fsum(_checked(profile).values())
    if total <= 0:
        raise ConfigError(
            f"Expected an importance profile with a value above 0, found {len(profile)} modules that sum to {total}. "
            "Measure importance on rows with target tokens."
        )
    return {name: value / total for name, value in profile.items()}


def drift(a: Profile, b: Profile) -> float:
    """Total variation distance of two profiles in [0, 1]: ``1/2 sum |a - b|`` of the normalized ones.

    0: the same distribution of importance over the modules; 1: none in common. A missing module counts as 0.
    """
    left, right = normalize(a), normalize(b)
    return min(1.0, math.fsum(abs(left.get(n, 0.0) - right.get(n, 0.0)) for n in left.keys() | right.keys()) / 2)


class ImportanceHistory:
    """The profile that plans are made from: ``I_bar <- beta_t I + (1 - beta_t) I_bar`` on normalized profiles.

    ``beta_t = b_t + (1 - b_t) d_t`` with ``b_t = max(LEAST_BALANCE, 1/t)`` for the t-th profile and d_t its `drift`
    from the history: without drift the history is the mean of all profiles at first and an exponential mean later; a
    profile whose importance lies wholly elsewhere replaces it.
    """

    def __init__(self) -> None:
        self.profile: dict[str, float] = {}
        """I_bar, sum 1; empty before the first update"""
        self.updates = 0
        """t"""
        self.beta = 0.0
        """the balance of the last update"""

    def update(self, profile: Profile) -> None:
        """Take in one round's merged profile; an empty one (nobody measured) changes nothing.

        Modules that this round did not measure keep their share of the history.

        Raises:
            ConfigError: a value that is not a finite number >= 0, or nothing above 0.
        """
        if not profile:
            return
        present = self._completed(profile)
        self.updates += 1
        least = max(LEAST_BALANCE, 1 / self.updates)
        self.beta = least + (1 - least) * drift(present, self.profile) if self.profile else 1.0
        names = [*self.profile, *(name for name in present if name not in self.profile)]
        self.profile = {
            name: self.beta * present[name] + (1 - self.beta) * self.profile.get(name, 0.0) for name in names
        }

    def _completed(self, profile: Profile) -> dict[str, float]:
        """`profile` with the history's share for the modules that it lacks; what it measured shares the rest of 1."""
        missing = {name: share for name, share in self.profile.items() if name not in profile}
        rest = 1 - math.fsum(missing.values())
        return {name: rest * share for name, share in normalize(profile).items()} | missing

    def update_from_round(
        self,
        heads: Mapping[str, Profile],
        tail: Mapping[str, Profile],
        shares: Mapping[str, float],
        modules: Iterable[str],
    ) -> None:
        """Take in what a round measured.

        Args:
            heads: client -> what its head measured.
            tail: client -> what the tail measured of that client's batches.
            shares: client -> p_i, its share of the trained tokens.
            modules: every linear layer of the model; a client that did not measure all of them does not count.

        Raises:
            ConfigError: see `merge`.
        """
        names = set(modules)
        whole = {client: {**tail.get(client, {}), **measured} for client, measured in heads.items()}
        complete = {client: profile for client, profile in whole.items() if shares[client] and profile.keys() == names}
        if complete:
            self.update(merge(complete, {client: shares[client] for client in complete}))

    def record(self) -> "HistoryRecord":
        """The history as it is now."""
        return HistoryRecord(dict(self.profile), self.updates, self.beta)

    def resume(self, record: "HistoryRecord") -> None:
        """Go on from a `record`, bit by bit."""
        self.profile, self.updates, self.beta = dict(record.profile), record.updates, record.beta

    def state(self) -> State:
        """The history as values that JSON knows; `load_state` takes it back."""
        state: State = to_state(self.record())
        return state

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave, bit by bit.

        Raises:
            ConfigError: not such a state; the message names the field.
        """
        self.resume(from_state(HistoryRecord, state))


@dataclass(frozen=True)
class HistoryRecord:
    """What an `ImportanceHistory` knows: see its fields."""

    profile: Profile
    updates: int
    beta: float

    def __post_init__(self) -> None:
        if self.profile:
            normalize(self.profile)  # refuses what is no profile; its rounding is not wanted
        require_whole("updates", self.updates, 0)
        require(is_at_least(self.beta, 0), "beta", ">= 0 and finite", self.beta)


def _checked(profile: Profile) -> Profile:
    wrong = {name: value for name, value in profile.items() if not 0 <= value < math.inf}
    if wrong:
        name, value = next(iter(wrong.items()))
        raise ConfigError(f"Expected importance to be a finite number >= 0, found {value} for {name!r}.")
    return profile
