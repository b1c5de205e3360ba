import subprocess
import sys
from pathlib import Path
from statistics import correlation, mean

import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.budgets.devices import DEVICES
from hsplit_flwr.planning.budgets.fleet import Fleet

SERVER = '[server]\ndevice = "workstation"\n'
OWN = "memory_gb = 2\ngflops = 10\nuplink_mbps = 8\ndownlink_mbps = 16\n"


def fleet(tmp_path: Path, text: str, *, seed: int = 0, server: str = SERVER) -> Fleet:
    path = tmp_path / "profiles.toml"
    path.write_text(server + text)
    return Fleet.from_toml(path, seed=seed)


def test_clients_count_up_through_the_file(tmp_path: Path) -> None:
    read = fleet(tmp_path, '[[client]]\ndevice = "phone"\ncount = 2\n[[client]]\ndevice = "laptop-gpu"\n')
    assert read.client_ids == ("0", "1", "2")
    assert read.server == DEVICES["workstation"]
    assert read.budgets(1) == {"0": DEVICES["phone"], "1": DEVICES["phone"], "2": DEVICES["laptop-gpu"]}


def test_an_entry_overrides_its_device_or_stands_alone(tmp_path: Path) -> None:
    text = f'[[client]]\ndevice = "phone"\nmemory_mb = 900\nlatency_ms = 5\n[[client]]\n{OWN}'
    read = fleet(tmp_path, text, server="[server]\n" + OWN.replace("memory_gb = 2", "memory_gb = 30"))
    phone = DEVICES["phone"]
    up, down = phone.uplink_bytes_per_s, phone.downlink_bytes_per_s
    assert read.budget("0", 1) == Budget(900_000_000, phone.flops_per_s, up, down, 0.005)
    assert read.budget("1", 1) == Budget(2_000_000_000, 10e9, 1e6, 2e6)
    assert read.server == Budget(30_000_000_000, 10e9, 1e6, 2e6)


def test_the_last_change_that_has_begun_holds_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    later, earlier = "from_round = 5\ncompute = 2.0\n", "from_round = 3\nmemory = 0.5\nlink = 0.25\n"
    changes = f"[[client.change]]\n{later}[[client.change]]\n{earlier}"
    read = fleet(tmp_path, f"[[client]]\n{OWN}count = 2\n{changes}[[client]]\n{OWN}")
    whole = Budget(2_000_000_000, 10e9, 1e6, 2e6)
    shrunk = Budget(1_000_000_000, 10e9, 0.25e6, 0.5e6)
    recovered = Budget(2_000_000_000, 20e9, 1e6, 2e6)
    expected = {1: whole, 2: whole, 3: shrunk, 4: shrunk, 5: recovered, 99: recovered}
    for client in ("0", "1"):
        assert {round_number: read.budget(client, round_number) for round_number in expected} == expected
    assert read.budget("2", 4) == whole


FLUCTUATING = f"[[client]]\n{OWN}latency_ms = 7\ncount = 40\nfluctuation = 0.2\n"


def factors(read: Fleet, rounds: int = 10) -> list[tuple[float, float, float]]:
    budgets = [read.budget(client, round_number) for client in read.client_ids for round_number in range(1, rounds + 1)]
    assert all(budget.latency_s == 0.007 for budget in budgets)
    assert all(b.downlink_bytes_per_s == pytest.approx(2 * b.uplink_bytes_per_s) for b in budgets)
    return [(b.memory_bytes / 2e9, b.flops_per_s / 10e9, b.uplink_bytes_per_s / 1e6) for b in budgets]


def test_fluctuations_fill_their_range_evenly_and_independently(tmp_path: Path) -> None:
    drawn = factors(fleet(tmp_path, FLUCTUATING))
    assert len(set(drawn)) == 400
    columns = list(zip(*drawn, strict=True))
    for column in columns:
        assert 0.8 <= min(column) < 0.82
        assert 1.18 < max(column) <= 1.2
        assert abs(mean(column) - 1) < 0.02  # standard error 0.0058
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(correlation(columns[one], columns[other])) < 0.2  # standard error 0.05


def test_fluctuations_depend_on_the_seed_and_on_nothing_of_this_process(tmp_path: Path) -> None:
    read = fleet(tmp_path, FLUCTUATING)
    assert factors(read) == factors(fleet(tmp_path, FLUCTUATING))
    assert set(factors(read)).isdisjoint(factors(fleet(tmp_path, FLUCTUATING, seed=1)))
    code = "from hsplit_flwr.planning.budgets.fleet import Fleet; import sys; "
    code += "print(Fleet.from_toml(sys.argv[1]).budget('3', 5))"
    command = [sys.executable, "-c", code, str(tmp_path / "profiles.toml")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == str(read.budget("3", 5))


def test_fluctuation_comes_on_top_of_a_change(tmp_path: Path) -> None:
    change = "[[client.change]]\nfrom_round = 2\nmemory = 0.5\n"
    steady = fleet(tmp_path, FLUCTUATING).budget("0", 2)
    changed = fleet(tmp_path, FLUCTUATING + change).budget("0", 2)
    assert changed.memory_bytes == pytest.approx(steady.memory_bytes / 2, abs=1)
    assert changed.flops_per_s == steady.flops_per_s


def test_a_client_beyond_the_file(tmp_path: Path) -> None:
    read = fleet(tmp_path, f"[[client]]\n{OWN}count = 3\n")
    with pytest.raises(ConfigError, match="Expected a client of the profile file, one of 0 to 2, found '3'"):
        read.budget("3", 1)


ONE = f"[[client]]\n{OWN}"
CHANGE = ONE + "[[client.change]]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE + "memroy_mb = 1", r"\[\[client\]\] number 1: Expected keys among device, .*, found memroy_mb"),
        (ONE + '[[client]]\ndevice = "fone"', r"\[\[client\]\] number 2: Expected device as one of phone.*'fone'"),
        (ONE + "memory_mb = 5", r"number 1: Expected memory_gb or memory_mb, found both"),
        (
            "[[client]]\nmemory_gb = 1",
            "number 1: Expected a device or all .* found no downlink_mbps, gflops, upl",
        ),
        ('[[client]]\ndevice = "phone"\ngflops = "10"', "Expected gflops as a number > 0, found '10'"),
        ('[[client]]\ndevice = "phone"\nlatency_ms = -1', "Expected latency_ms as a number >= 0, found -1"),
        (ONE + "count = 0", "Expected count as a whole number >= 1, found 0"),
        (ONE + "count = 2.0", "Expected count as a whole number >= 1, found 2.0"),
        (ONE + "count = true", "Expected count as a whole number >= 1, found True"),
        (ONE + "fluctuation = 1.0", r"Expected fluctuation as a number in \[0, 1\), found 1.0"),
        (ONE + "fluctuation = -0.1", "Expected fluctuation"),
        (ONE + "fluctuation = true", "Expected fluctuation"),
        (ONE + "change = 3", r"Expected \[\[client.change\]\] entries, found 3"),
        (ONE + "change = [3]", r"\[\[client.change\]\] number 1: Expected a table, found 3"),
        (CHANGE + "memory = 0.5", "number 1: Expected from_round, found none"),
        (CHANGE + "from_round = 0", "Expected from_round as a whole number >= 1, found 0"),
        (
            CHANGE + "from_round = 1\nmemory = 0",
            r"number 1: \[\[client.change\]\] number 1: Expected memory as",
        ),
        (CHANGE + "from_round = 1\nlink = inf", "Expected link as a factor > 0, found inf"),
        (CHANGE + 'from_round = 1\ncompute = "x"', "Expected compute as a factor > 0, found 'x'"),
        (
            CHANGE + "from_round = 1\nmemory_gb = 2",
            "Expected keys among from_round, .* link, found memory_gb",
        ),
        (
            CHANGE + "from_round = 2\n[[client.change]]\nfrom_round = 2",
            r"Expected each from_round once, .* \[2, 2\]",
        ),
        ("", r"Expected at least one \[\[client\]\], found none"),
        ("client = 3", r"Expected keys among device, .*, found client"),
        (ONE + "[[clients]]\ncount = 1", "Expected keys among server, client, found clients"),
        ("[[client", "Expected a TOML file with device profiles"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_entry(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        fleet(tmp_path, text)
    assert "profiles.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ("", r"Expected a table \[server\], found none"),
        ("server = 3\n", r"Expected a table \[server\], found none"),
        ("[server]\ncount = 2\n", r"\[server\]: Expected keys among device, .*, found count"),
        ("[server]\nmemory_gb = 2\n", r"\[server\]: Expected a device or all of .* found no downlink_mbps, gflops"),
    ],
)
def test_a_wrong_server_is_named(tmp_path: Path, server: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fleet(tmp_path, ONE, server=server)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected a TOML file with device profiles at .*missing.toml"):
        Fleet.from_toml(tmp_path / "missing.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="Expected a TOML file"):
        Fleet.from_toml(binary)
