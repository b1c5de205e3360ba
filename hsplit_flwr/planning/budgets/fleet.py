"""The devices of a federation from a TOML file: a budget for the server, and one per client and round.

    [server]
    device = "datacenter-gpu"            # a name from `devices.DEVICES`

    [[client]]
    device = "phone"
    count = 3                            # so many alike; client ids count up from "0" through the file
    memory_mb = 900                      # overrides the device: memory_gb or memory_mb, gflops, uplink_mbps,
    uplink_mbps = 5                      # downlink_mbps, latency_ms. Without a device, all but latency are needed
    fluctuation = 0.1                    # each round, memory, compute and link each times a factor in [0.9, 1.1]

    [[client.change]]                    # of the client entry above
    from_round = 3                       # from this round on, until the next change ...
    memory = 0.5                         # ... half of the memory, a quarter of the link
    link = 0.25

Fluctuations depend on (seed, client, round) alone: every process that reads the file sees the same budgets.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hsplit_flwr.common.checks import require_whole
from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.common.toml_file import read_toml
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.budgets.budget import UNITS, Budget, budget_of, read_units
from hsplit_flwr.planning.budgets.devices import device_budget

FACTORS = ("memory", "compute", "link")
_DEVICE_KEYS = ("device", *UNITS)
_CLIENT_KEYS = (*_DEVICE_KEYS, "count", "fluctuation", "change")
_CHANGE_KEYS = ("from_round", *FACTORS)


@dataclass(frozen=True)
class Change:
    """From round `from_round` on, the client's means are these multiples of what its entry states."""

    from_round: int
    factors: Mapping[str, float]
    """by `FACTORS`"""


@dataclass(frozen=True)
class ClientProfile:
    """One client's means over the rounds."""

    base: Budget
    fluctuation: float = 0.0
    changes: tuple[Change, ...] = ()
    """in the order of their rounds"""


@dataclass(frozen=True)
class Fleet:
    """The server and the clients; client "0" is the first of the file."""

    server: Budget
    profiles: Mapping[str, ClientProfile]
    """by client id"""
    seed: int = 0

    @classmethod
    def from_toml(cls, path: str | Path, *, seed: int = 0) -> Self:
        """The fleet that the profile file at `path` describes (see the module's docstring).

        Raises:
            ConfigError: no such file, not TOML, or a wrong key, type or value; the message names file and entry.
        """
        table = read_toml(path, "device profiles")
        try:
            _only_keys(table, ("server", "client"))
            if not isinstance(table.get("server"), dict):
                raise ConfigError('Expected a table [server], found none. Add [server] with device = "workstation".')
            server = _in_entry("[server]", _server, table["server"])
            entries = table.get("client")
            if not isinstance(entries, list) or not entries:
                raise ConfigError('Expected at least one [[client]], found none. Add one with device = "phone".')
            named = ((f"[[client]] number {number}", entry) for number, entry in enumerate(entries, start=1))
            clients = [profile for name, entry in named for profile in _in_entry(name, _clients, entry)]
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return cls(server, {str(number): profile for number, profile in enumerate(clients)}, seed)

    @property
    def client_ids(self) -> tuple[str, ...]:
        """ "0", "1", ... in the order of the file."""
        return tuple(self.profiles)

    def budget(self, client: str, round_number: int) -> Budget:
        """What `client` can afford in round `round_number` (from 1).

        Raises:
            ConfigError: no such client.
        """
        if client not in self.profiles:
            raise ConfigError(
                f"Expected a client of the profile file, one of 0 to {len(self.profiles) - 1}, found {client!r}. "
                "Raise count, or run fewer clients."
            )
        profile = self.profiles[client]
        factors = dict.fromkeys(FACTORS, 1.0)
        for change in profile.changes:
            if change.from_round <= round_number:
                factors.update(change.factors)
        for name in FACTORS if profile.fluctuation else ():
            draw = random.Random(derive_seed(self.seed, "budget", client, round_number, name))
            factors[name] *= draw.uniform(1 - profile.fluctuation, 1 + profile.fluctuation)
        return profile.base.scaled(**factors)

    def budgets(self, round_number: int) -> dict[str, Budget]:
        """Every client's budget in round `round_number`, by client id."""
        return {client: self.budget(client, round_number) for client in self.client_ids}


def _in_entry(name: str, read: Any, entry: object) -> Any:
    """`read(entry)`, whose errors name the entry."""
    try:
        if not isinstance(entry, dict):
            raise ConfigError(f"Expected a table, found {entry!r}.")
        return read(entry)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _server(entry: Mapping[str, object]) -> Budget:
    _only_keys(entry, _DEVICE_KEYS)
    return _budget(entry)


def _clients(entry: Mapping[str, object]) -> list[ClientProfile]:
    _only_keys(entry, _CLIENT_KEYS)
    count = _whole(entry, "count", 1)
    fluctuation = entry.get("fluctuation", 0.0)
    if isinstance(fluctuation, bool) or not isinstance(fluctuation, int | float) or not 0 <= fluctuation < 1:
        raise ConfigError(f"Expected fluctuation as a number in [0, 1), found {fluctuation!r}. Example: 0.1 for 10 %.")
    changes = entry.get("change", [])
    if not isinstance(changes, list):
        raise ConfigError(f"Expected [[client.change]] entries, found {changes!r}. Mind the double brackets.")
    read = [_in_entry(f"[[client.change]] number {i}", _change, change) for i, change in enumerate(changes, start=1)]
    return [ClientProfile(_budget(entry), float(fluctuation), _in_order(read))] * count


def _change(entry: Mapping[str, object]) -> Change:
    _only_keys(entry, _CHANGE_KEYS)
    if "from_round" not in entry:
        raise ConfigError("Expected from_round, found none. State the first round it holds in.")
    factors = dict.fromkeys(FACTORS, 1.0)
    for name in FACTORS:
        value = entry.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"Expected {name} as a factor > 0, found {value!r}. Example: 0.5 for half of it.")
        factors[name] = float(value)
    return Change(_whole(entry, "from_round", 1), factors)


def _in_order(changes: Sequence[Change]) -> tuple[Change, ...]:
    rounds = [change.from_round for change in changes]
    if len(set(rounds)) < len(rounds):
        raise ConfigError(f"Expected each from_round once, found {rounds}. Join the changes of one round.")
    return tuple(sorted(changes, key=lambda change: change.from_round))


def _budget(entry: Mapping[str, object]) -> Budget:
    device = vars(device_budget(entry["device"])) if "device" in entry else {}
    return budget_of({**device, **read_units(entry)})


def _whole(entry: Mapping[str, object], key: str, default: int) -> int:
    value = entry.get(key, default)
    require_whole(key, value, 1, key=key)
    assert isinstance(value, int)
    return value


def _only_keys(entry: Mapping[str, object], allowed: Sequence[str]) -> None:
    if unknown := sorted(set(entry) - set(allowed)):
        raise ConfigError(f"Expected keys among {', '.join(allowed)}, found {', '.join(unknown)}. Check the spelling.")
