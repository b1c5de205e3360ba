"""What a client reads of Flower's run config and node config."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.tls_files import CLIENT, TAIL_ROOTS, ClientTls
from hsplit_flwr.planning.budgets.fleet import Fleet

RunConfig = Mapping[str, bool | float | int | str]
Value = TypeVar("Value", bound=bool | int | float | str)


def read_fleet(run_config: RunConfig, folder: Path) -> Fleet | None:
    """The budgets that the run config names under ``profiles``; None without the key, or where plans are configured.

    A relative path counts from the app's `folder`, if it is there, else from where the process was started.

    Raises:
        ConfigError: not a profile file.
    """
    name = get(run_config, "profiles", "")
    if not name or get(run_config, "cuts", ""):
        return None
    path = folder / name
    return Fleet.from_toml(path if path.exists() else name, seed=get(run_config, "seed", 0))


def count_clients(run_config: RunConfig, node_config: RunConfig, folder: Path) -> int:
    """How many clients there are: as many as configured cuts, else as profiles, else as SuperNodes."""
    if get(run_config, "cuts", ""):
        return len(integers(run_config, "cuts"))
    fleet = read_fleet(run_config, folder)
    return len(fleet.profiles) if fleet else get(node_config, "num-partitions", 1)


def read_tls(run_config: RunConfig, node_config: RunConfig) -> ClientTls | None:
    """The client's side of TLS; None where no file is named. A node's config comes before the run's: paths differ.

    Raises:
        ConfigError: as `ClientTls.from_files`.
    """
    named = (get(node_config, key, "") or get(run_config, key, "") for key in (TAIL_ROOTS, *CLIENT))
    return ClientTls.from_files(*(Path(path) if path else None for path in named))


def get(run_config: RunConfig, key: str, default: Value) -> Value:
    """The value of `key`, of the type of `default`; an integer is good for a float.

    Raises:
        ConfigError: another type.
    """
    value = run_config.get(key, default)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # type: ignore[return-value]
    if type(value) is not type(default):
        raise ConfigError(f"Expected {key} as {type(default).__name__}, found {value!r}. Example: {key}={default!r}.")
    return value


def integers(run_config: RunConfig, key: str, default: str = "") -> dict[str, int]:
    """Position ("0", "1", ...) -> the number there in a list such as ``"2,4,6"``.

    Raises:
        ConfigError: the key is missing or not such a list.
    """
    text = str(run_config.get(key, default))
    try:
        return {str(client): int(part) for client, part in enumerate(text.split(","))}
    except ValueError:
        raise ConfigError(
            f"Expected {key} as integers with commas, such as '2,4,6', found {text!r}. Set it in the run config."
        ) from None


def hosted_clients(node_config: RunConfig, num_clients: int) -> list[str]:
    """The clients that a SuperNode hosts: node k of n hosts k, k+n, k+2n, ... of `num_clients`.

    With as many nodes as clients every node is one client; with fewer, a simulation still runs all clients.

    Raises:
        ConfigError: not a node among so many.
    """
    node, nodes = get(node_config, "partition-id", 0), get(node_config, "num-partitions", 1)
    if not 0 <= node < nodes:
        raise ConfigError(
            f"Expected 0 <= partition-id < num-partitions, found partition-id={node} and num-partitions={nodes}. "
            "Start each SuperNode with --node-config 'partition-id=K num-partitions=N'."
        )
    return [str(client) for client in range(node, num_clients, nodes)]
