import re
import time
from pathlib import Path

import psutil
import pytest
import torch

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.budgets import probe as budget_probe
from hsplit_flwr.planning.budgets.budget import Budget, budget_of, read_units
from hsplit_flwr.planning.budgets.devices import CPU_UTILISATION, DEVICES, GPU_UTILISATION, device_budget
from hsplit_flwr.planning.budgets.probe import (
    LARGE_BYTES,
    LINK_REPEATS,
    MATMUL,
    MEMORY_SHARE,
    TRAINING_SHARE,
    Link,
    available_memory,
    cgroup_headroom,
    measure_compute,
    measure_link,
    own_budget,
    stated_budget,
)

WHOLE = {"memory-gb": 4, "gflops": 50.5, "uplink-mbps": 8, "downlink-mbps": 80.0, "latency-ms": 20}
SLEEP_TOLERANCE = 0.35
"""relative; a shared machine oversleeps"""


def no_link() -> Link:
    raise AssertionError("measured a link that was stated")


# Units and devices


def test_units_become_bytes_and_operations_per_second() -> None:
    stated = read_units(
        {"memory_mb": 512, "gflops": 2, "uplink_mbps": 8, "downlink_mbps": 16, "latency_ms": 5, "x": "y"}
    )
    assert budget_of(stated) == Budget(512_000_000, 2e9, 1e6, 2e6, 0.005)
    assert read_units({"memory_gb": 0.5, "latency_ms": 0}) == {"memory_bytes": 5e8, "latency_s": 0.0}


@pytest.mark.parametrize("value", ["4", True, None, 0, -1, float("nan"), float("inf")])
def test_a_value_that_is_no_positive_number_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match=rf"Expected memory_gb as a number > 0, found {re.escape(repr(value))}"):
        read_units({"memory_gb": value})


def test_latency_may_be_zero_but_not_negative() -> None:
    with pytest.raises(ConfigError, match="Expected latency_ms as a number >= 0, found -1"):
        read_units({"latency_ms": -1})


def test_memory_is_stated_once() -> None:
    with pytest.raises(ConfigError, match="Expected memory_gb or memory_mb, found both"):
        read_units({"memory_gb": 1, "memory_mb": 1000})


def test_what_a_budget_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="found no downlink_mbps, memory_gb"):
        budget_of({"flops_per_s": 1.0, "uplink_bytes_per_s": 1.0})


def test_scaling_leaves_the_latency() -> None:
    budget = Budget(1000, 10.0, 20.0, 40.0, 0.5)
    assert budget.scaled(memory=0.5, compute=2.0, link=0.25) == Budget(500, 20.0, 5.0, 10.0, 0.5)
    assert budget.scaled() == budget


def test_devices_are_ordered_as_one_expects_and_within_their_data_sheets() -> None:
    order = ["phone", "raspberry-pi-5", "jetson-orin-nano", "laptop-gpu", "workstation", "datacenter-gpu"]
    assert list(DEVICES) == order
    fitted_gb = [8, 8, 8, 8, 24, 80]
    peak_tflops = [0.282, 0.154, 1.28, 14.9, 82.6, 67]
    for name, memory, peak in zip(order, fitted_gb, peak_tflops, strict=True):
        budget = DEVICES[name]
        assert 0.2 * memory < budget.memory_bytes / 1e9 < memory
        share = CPU_UTILISATION if peak < 1 else GPU_UTILISATION
        assert budget.flops_per_s == pytest.approx(share * peak * 1e12)
        assert budget.uplink_bytes_per_s <= budget.downlink_bytes_per_s
    assert device_budget("phone") is DEVICES["phone"]


@pytest.mark.parametrize("name", ["pohne", "", 3, None, ["phone"]])
def test_an_unknown_device_is_answered_with_the_known_ones(name: object) -> None:
    with pytest.raises(ConfigError, match=r"Expected device as one of phone, raspberry-pi-5, .*, found"):
        device_budget(name)


# Statements of a node


def test_a_whole_statement_is_the_budget() -> None:
    assert stated_budget(WHOLE) == Budget(4_000_000_000, 50.5e9, 1e6, 10e6, 0.02)
    assert own_budget(WHOLE, "cpu", no_link) == stated_budget(WHOLE)


def test_a_device_is_a_whole_statement_and_keys_override_it() -> None:
    assert stated_budget({"device": "phone", "partition-id": 3}) == DEVICES["phone"]
    faster = stated_budget({"device": "phone", "memory-mb": 100, "gflops": 1})
    phone = DEVICES["phone"]
    expected = Budget(100_000_000, 1e9, phone.uplink_bytes_per_s, phone.downlink_bytes_per_s, phone.latency_s)
    assert faster == expected


@pytest.mark.parametrize("missing", ["memory-gb", "gflops", "uplink-mbps", "downlink-mbps"])
def test_a_partial_statement_is_no_budget(missing: str) -> None:
    assert stated_budget({key: value for key, value in WHOLE.items() if key != missing}) is None
    assert stated_budget({}) is None


def test_without_a_latency_it_is_zero() -> None:
    assert stated_budget({k: v for k, v in WHOLE.items() if k != "latency-ms"}) == Budget(4 * 10**9, 50.5e9, 1e6, 10e6)


def test_a_statement_overrides_the_probe_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_probe, "measure_compute", lambda **_: 7e9)
    monkeypatch.setattr(budget_probe, "available_memory", lambda device: 1000)
    measured = own_budget({}, "cpu", lambda: Link(1.0, 2.0, 3.0))
    assert measured == Budget(int(1000 * MEMORY_SHARE), 7e9 * TRAINING_SHARE, 1.0, 2.0, 3.0)
    mixed = own_budget({"gflops": 5, "uplink-mbps": 8, "memory-mb": 1}, "cpu", lambda: Link(1.0, 2.0, 3.0))
    assert mixed == Budget(1_000_000, 5e9, 1e6, 2.0, 3.0)


def test_a_wrong_statement_is_an_error_and_not_a_measurement() -> None:
    with pytest.raises(ConfigError, match="Expected gflops as a number > 0, found 'fast'"):
        own_budget({"gflops": "fast"}, "cpu", no_link)
    with pytest.raises(ConfigError, match="Expected device as one of"):
        stated_budget({"device": "toaster"})


# Probes


def test_compute_agrees_with_a_product_timed_by_hand() -> None:
    rows, inner, columns = MATMUL
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    times = []
    for _ in range(15):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    by_hand = 2 * rows * inner * columns / sorted(times)[len(times) // 2]
    assert 0.3 * by_hand < measure_compute(seconds=0.3) < 3 * by_hand  # a core shared with other work


def test_compute_takes_about_the_time_it_was_given() -> None:
    started = time.perf_counter()
    measure_compute(seconds=0.2)
    assert 0.2 <= time.perf_counter() - started < 2.0


def test_available_memory_is_within_the_machine() -> None:
    assert 0 < available_memory("cpu") <= psutil.virtual_memory().total


def write_group(folder: Path, version: int, limit: str, usage: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    key = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{key} {cached}\n")


def test_cgroup_v2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/pod/container\n")
    groups = tmp_path / "fs"
    write_group(groups / "pod" / "container", 2, "max", 300)
    write_group(groups / "pod", 2, "1000", 700, cached=150)
    assert cgroup_headroom(groups, membership) == 450
    write_group(groups / "pod" / "container", 2, "500", 300)
    assert cgroup_headroom(groups, membership) == 200
    write_group(groups / "pod" / "container", 2, "500", 700)
    assert cgroup_headroom(groups, membership) == 0


def test_cgroup_v1_counts_in_the_memory_hierarchy_alone(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    groups = tmp_path / "fs"
    write_group(groups / "cpu,cpuacct" / "job", 1, "10", 1)
    write_group(groups / "memory" / "job", 1, "2000", 500, cached=100)
    write_group(groups / "memory", 1, "9223372036854771712", 500)
    assert cgroup_headroom(groups, membership) == 1600


def test_inside_a_container_only_the_mount_itself_is_there(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/host/path/unseen/here\n")
    write_group(tmp_path / "fs", 2, "800", 300)
    assert cgroup_headroom(tmp_path / "fs", membership) == 500


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    assert cgroup_headroom(tmp_path, membership) is None
    membership.write_text("0::/\n")
    assert cgroup_headroom(tmp_path, membership) is None


def test_a_control_group_bounds_the_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_probe, "cgroup_headroom", lambda: 12345)
    assert available_memory() == 12345


class SleepingLink:
    """An exchange that takes as long as a link of these figures would."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.calls: list[tuple[int, int]] = []

    def __call__(self, bytes_up: int, bytes_down: int) -> None:
        self.calls.append((bytes_up, bytes_down))
        up, down, latency = self.link
        time.sleep(2 * latency + bytes_up / up + bytes_down / down)


@pytest.mark.parametrize("link", [Link(20e6, 40e6, 0.005), Link(50e6, 10e6, 0.01)])
def test_a_link_of_known_speed_is_measured(link: Link) -> None:
    exchange = SleepingLink(link)
    measured = measure_link(exchange)
    for found, expected in zip(measured, link, strict=True):
        assert found == pytest.approx(expected, rel=SLEEP_TOLERANCE)
    assert len(exchange.calls) == 1 + 3 * LINK_REPEATS


def test_a_slow_link_is_not_measured_again_and_again() -> None:
    exchange = SleepingLink(Link(LARGE_BYTES / 1.1, 50e6, 0.001))  # 1.1 s for the large payload
    measured = measure_link(exchange)
    assert exchange.calls.count((LARGE_BYTES, 64)) == 1
    assert measured.uplink_bytes_per_s == pytest.approx(LARGE_BYTES / 1.1, rel=SLEEP_TOLERANCE)


def test_an_instant_link_is_fast_but_finite() -> None:
    measured = measure_link(lambda up, down: None)
    assert own_budget({"memory-gb": 1, "gflops": 1}, "cpu", lambda: measured).uplink_bytes_per_s > 1e9


def test_the_connection_is_not_part_of_the_latency() -> None:
    waits = iter([0.3])

    def exchange(bytes_up: int, bytes_down: int) -> None:
        time.sleep(next(waits, 0.001))

    assert measure_link(exchange).latency_s < 0.05
