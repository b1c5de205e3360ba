"""Importance over clients and rounds: merged profiles, their drift, and a history with dynamic balance.

A *profile* maps whole-model module names to importance >= 0 (`training/importance.py`). HSplitLoRA (arXiv:2505.02795)
balances past and present importance dynamically: the present weighs less as training proceeds and more when importance
fluctuates. The paper's exact expressions are not public to us; names and formulas here are ours.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

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

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; `from_dict` takes it back."""
        return {"profile": dict(self.profile), "updates": self.updates, "beta": self.beta}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The history that `to_dict` wrote.

        Raises:
            ConfigError: unknown or missing keys, or values out of range.
        """
        expected = {"profile", "updates", "beta"}
        if set(data) != expected:
            raise ConfigError(f"Expected an importance history with the keys {sorted(expected)}, found {sorted(data)}.")
        history = cls()
        history.profile = normalize(data["profile"]) if data["profile"] else {}
        history.updates, history.beta = int(data["updates"]), float(data["beta"])
        return history


def _checked(profile: Profile) -> Profile:
    wrong = {name: value for name, value in profile.items() if not 0 <= value < math.inf}
    if wrong:
        name, value = next(iter(wrong.items()))
        raise ConfigError(f"Expected importance to be a finite number >= 0, found {value} for {name!r}.")
    return profile
