"""The benchmark of real links: its arithmetic by hand, its skipping, and, as root, the links themselves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.experiments.settings import SETTINGS
from hsplit_flwr.training.config import TrainingConfig
from tests.helpers.benchmarks import BENCHMARKS, benchmark

TOLERANCE = 1e-9
"""relative, of sums of a handful of floats"""
RATE_TOLERANCE = 0.02
GONE_S = 10.0
HIDDEN = 96
"""of the embedded model"""


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark("exchange", monkeypatch)


@pytest.fixture
def rows(exchange: ModuleType) -> ModuleType:
    return sys.modules["_exchange_rows"]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = benchmark("_network", monkeypatch)
    if reason := module.why_not():
        pytest.skip(reason)
    return module


def measured(rows: ModuleType, *seconds: float, form: tuple[BatchForm, ...]) -> Any:
    """Two steps of heads that took `seconds` each, a quarter of it to compute, and of a tail that took 0.2 s a step.

    `form`: of the parts of a batch.
    """
    counts = {"bytes_up": 2000, "bytes_down": 1000, "forms": (form,) * 2}
    heads = [
        rows.HeadRound(seconds=total, compute_s=total / 4, exchange_s=3 * total / 4, **counts) for total in seconds
    ]
    return rows.Measured(steps=2, heads=tuple(heads), tail_s=0.4)


def training(exchange: ModuleType, technique: str, steps: int = 2) -> TrainingConfig:
    config: TrainingConfig = exchange.training_of(exchange.TECHNIQUES[technique], steps)
    return config


def test_a_prediction_is_compute_and_bytes_over_rate_and_latency(exchange: ModuleType, rows: ModuleType) -> None:
    deployment = exchange.DEPLOYMENTS["tiny-gpt2"]
    form = (BatchForm(4, 80, 250, 100),)
    link = rows.Link(name="60/110", rates=rows.Rates(60, 110), latency_s=0.001)
    row = rows.row_of(
        deployment, "int8", exchange.TECHNIQUES["int8"], training(exchange, "int8"), link,
        [measured(rows, 4.0, form=form), measured(rows, 6.0, form=form)],
    )  # fmt: skip
    (work,) = rows.work_of(deployment, training(exchange, "int8"), measured(rows, 4.0, form=form))
    up, down = work.step_bytes_up, work.step_bytes_down
    assert row["measured_s"] == 2.5
    assert row["measured_each_s"] == [2.0, 3.0]
    by_hand = 2.5 / 4 + 0.2 + up / 7.5e6 + down / 13.75e6 + 2 * 0.001
    assert row["predicted_s"] == pytest.approx(by_hand, rel=TOLERANCE)
    assert row["prediction_error"] == pytest.approx(by_hand / 2.5 - 1, rel=TOLERANCE)
    assert row["bytes_per_step"] == 1500
    assert row["predicted_bytes"] == up + down
    assert row["bytes_over_payload"] == pytest.approx(1500 / (250 * HIDDEN * 2), rel=TOLERANCE)
    assert row["bytes_over_rate_s"] == pytest.approx(1000 / 7.5e6 + 500 / 13.75e6, rel=TOLERANCE)
    assert row["beyond_s"] == pytest.approx(2.5 * 3 / 4 - 0.2 - row["bytes_over_rate_s"], rel=TOLERANCE)
    assert row["full_batch_bytes"] > up + down, "what padding would have added"


def test_of_two_heads_the_last_counts_and_the_tail_serves_one_after_the_other(
    exchange: ModuleType, rows: ModuleType
) -> None:
    deployment = exchange.replace(exchange.DEPLOYMENTS["tiny-gpt2"], heads=2)
    round_ = measured(rows, 4.0, 4.0, form=(BatchForm(4, 80, 250, 100),))
    config = training(exchange, "int8")
    link = rows.Link(name="none", rates=rows.Rates(1e9, 1e9), latency_s=0.0)
    assert round_.step_s == 2.0
    # Both compute 0.5 s a step at once; the tail's 0.2 s of a step are half of the one and half of the other.
    assert rows.predicted_step_s(deployment, config, round_, link) == pytest.approx(0.7, rel=0.1)


def test_what_handling_takes_comes_once_a_part(exchange: ModuleType, rows: ModuleType) -> None:
    """What a step of whole batches takes beyond compute and transfer; parts, one at a time, take it each."""
    deployment, config = exchange.DEPLOYMENTS["tiny-gpt2"], training(exchange, "bf16")
    whole = measured(rows, 4.0, form=(BatchForm(4, 80, 250, 100),))
    link = rows.Link(name="fast", rates=rows.Rates(1e9, 1e9), latency_s=0.001)
    handling_s = rows.handling_of(whole, link)
    assert handling_s == pytest.approx(2.0 - 0.5 - 0.2 - 0.002, rel=TOLERANCE)
    told = exchange.replace(link, handling_s=handling_s)
    assert rows.predicted_step_s(deployment, config, whole, told) == pytest.approx(2.0, rel=TOLERANCE)
    parts = exchange.replace(config, micro_batches=4, micro_batches_in_flight=1)
    plain, handled = (rows.predicted_step_s(deployment, parts, whole, one) for one in (link, told))
    assert handled - plain == pytest.approx(4 * handling_s, rel=TOLERANCE)


def test_a_link_in_proportion_takes_as_long_beside_compute_as_in_the_experiments(
    exchange: ModuleType, rows: ModuleType
) -> None:
    deployment, config = exchange.DEPLOYMENTS["tiny-gpt2"], training(exchange, "bf16")
    round_ = measured(rows, 4.0, form=(BatchForm.largest(deployment.batch, deployment.max_length),))
    rates = rows.in_proportion(deployment, config, round_)
    costs, (work,) = rows.costs_of(deployment, config), rows.work_of(deployment, config, round_)
    device, server = SETTINGS["homogeneous"].devices(costs)["0"], SETTINGS["homogeneous"].server(costs)
    stated_compute = (work.forward_flops + work.backward_flops) / device.flops_per_s
    stated_compute += work.tail_flops / server.flops_per_s
    up, down = work.step_bytes_up, work.step_bytes_down
    stated_transfer = up / device.uplink_bytes_per_s + down / device.downlink_bytes_per_s
    here_transfer = up / (rates.up_mbit_s * 125e3) + down / (rates.down_mbit_s * 125e3)
    assert here_transfer / (4.0 / 4 / 2 + 0.2) == pytest.approx(stated_transfer / stated_compute, rel=TOLERANCE)


def test_parts_in_flight_are_predicted(exchange: ModuleType, rows: ModuleType) -> None:
    """The clock knew no parts at first: their rows had no prediction."""
    deployment, technique, config = (
        exchange.DEPLOYMENTS["tiny-gpt2"],
        exchange.TECHNIQUES["all"],
        training(exchange, "all"),
    )
    parts = tuple(BatchForm(1, width, width - 5, width - 50) for width in (80, 70, 60, 80))
    round_ = measured(rows, 4.0, form=parts)
    link = rows.Link(name="slow", rates=rows.Rates(0.5, 1), latency_s=0.001)
    row = rows.row_of(deployment, "all", technique, config, link, [round_])
    (work,) = rows.work_of(deployment, config, round_)
    load, H = rows.costs_of(deployment, config).workload, HIDDEN
    assert work.step_bytes_up == sum(frame_bytes.step_bytes_up(load, H, part) for part in parts)
    assert work.step_bytes_down == sum(frame_bytes.step_bytes_down(load, H, part) for part in parts)
    assert row["predicted_bytes"] == work.step_bytes_up + work.step_bytes_down
    assert row["bytes_over_payload"] == pytest.approx(1500 / (270 * HIDDEN * 2), rel=TOLERANCE)
    one_by_one = 0.5 + 0.2 + work.step_bytes_up / 62.5e3 + work.step_bytes_down / 125e3
    assert work.step_bytes_up / 62.5e3 < row["predicted_s"] < one_by_one, "the link's time, and little beside it"
    row["speedup_over_bf16"] = 1.0
    assert rows.summary([row], [])["worst_prediction_error"] == abs(row["prediction_error"])


def test_speedups_are_medians_over_repeats_against_the_same_link(rows: ModuleType) -> None:
    def row(technique: str, link: str, *each: float) -> dict[str, Any]:
        return {
            "model": "m", "link": link, "technique": technique, "measured_each_s": list(each),
            "predicted_s": 1.0, "prediction_error": -0.2 if link == "slow" else 0.1,
            "bytes_per_step": 110, "predicted_bytes": 100,
        }  # fmt: skip

    found = [row("a", "slow", 4.0, 6.0, 9.0), row("b", "slow", 2.0, 2.0, 1.0), row("a", "fast", 1.0, 1.0, 1.0)]
    rows.add_speedups(found, "a")
    assert [one["speedup_over_bf16"] for one in found] == [1.0, 3.0, 1.0]
    links = [{"link": "slow", "up_rate_error": -0.015, "down_rate_error": 0.01}, {"link": "loopback"}]
    assert rows.summary(found, links) == {
        "worst_prediction_error": 0.2,
        "worst_rate_error": 0.015,
        "worst_byte_error": pytest.approx(0.1),
        "speedup_over_bf16": {"m": {"slow": {"a": 1.0, "b": 3.0}, "fast": {"a": 1.0}}},
    }


def test_padding_travels_only_where_it_is_asked_for(exchange: ModuleType) -> None:
    deployment = exchange.DEPLOYMENTS["tiny-gpt2"]
    plain, padded = (next(deployment.batches("0", padding_travels=travels)) for travels in (False, True))
    forms = [BatchForm.of(batch["attention_mask"], batch["labels"]) for batch in (plain, padded)]
    assert torch.equal(plain["input_ids"], padded["input_ids"])
    assert forms[0].positions < forms[1].positions == forms[1].rows * (forms[1].width - 1)
    assert forms[0].targets == forms[1].targets


def test_heads_hold_different_examples(exchange: ModuleType) -> None:
    deployment = exchange.replace(exchange.DEPLOYMENTS["tiny-gpt2"], heads=2)
    first, second = (next(deployment.batches(client, padding_travels=False)) for client in deployment.clients)
    assert not torch.equal(first["labels"], second["labels"])


def test_a_line_stands_below_its_headings(rows: ModuleType) -> None:
    keys = "measured_s predicted_s prediction_error bytes_per_step bytes_over_payload head_s tail_s bytes_over_rate_s"
    row = dict.fromkeys([*keys.split(), "beyond_s"], 0.5)
    line = rows.line_of({"model": "smollm2-135m", "link": "in proportion", "technique": "bf16, padded", **row})
    assert len(line) == len(rows.HEADINGS)


def test_without_root_nothing_is_measured_and_people_hear_why(
    exchange: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr(sys, "argv", ["exchange.py", "--json", str(tmp_path / "out.json")])
    exchange.main()
    assert capsys.readouterr().out == "exchange.py measures nothing here: network namespaces and tc need root.\n"
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("links", "expected"),
    [("60/110,lopback", "found lopback"), ("in proportion,loopback", "Expected loopback before in proportion")],
)
def test_links_that_cannot_be_measured_are_refused(
    exchange: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    links: str,
    expected: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["exchange.py", "--json", "out.json", "--links", links])
    with pytest.raises(SystemExit):
        exchange.asked()
    assert expected in capsys.readouterr().err


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("_network", monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    assert module.why_not() == "there is no tc (packages util-linux, iproute2)"


@pytest.mark.slow
def test_a_link_has_the_rate_that_is_stated(network: ModuleType) -> None:
    with network.Star(1) as star:
        star.limit(network.Rates(60, 110))
        up, down = star.transfer(60, up=True), star.transfer(110, up=False)
    assert up.wire_mbit_s == pytest.approx(60, rel=RATE_TOLERANCE)
    assert down.wire_mbit_s == pytest.approx(110, rel=RATE_TOLERANCE)
    assert (up.dropped, down.dropped) == (0, 0)


def test_every_link_has_the_same_congestion_control_on_every_machine(network: ModuleType) -> None:
    """A machine whose own is BBR allows no namespace to choose another for all: the benchmark did not start there."""
    begun = "import socket, sys; s = socket.socket(); s.setblocking(False); s.connect_ex((sys.argv[1], 9))"
    asked = f"{begun}; print(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).strip(bytes(1)).decode())"
    with network.Star(2) as star:
        ways = [(star.heads[0], "10.77.0.1"), (star.tail, "10.77.1.2"), (star.heads[1], "127.0.0.1")]
        found = [inside.run(sys.executable, "-c", asked, address).strip() for inside, address in ways]
    assert found == ["cubic"] * 3


def test_a_process_that_is_killed_leaves_no_namespace_behind(network: ModuleType) -> None:
    """They were named at first: what a killed run left had to be found and removed by hand."""
    script = (
        "import json, time\nfrom _network import Star\n"
        "star = Star(2)\nprint(json.dumps([n.pid for n in (star.tail, *star.heads)]), flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout
        pids = json.loads(process.stdout.readline())
        inside = [Path(f"/proc/{pid}/ns/net") for pid in pids]
        assert len({path.readlink() for path in (*inside, Path("/proc/self/ns/net"))}) == 4
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(GONE_S)
    end = time.monotonic() + GONE_S
    while any(path.exists() for path in inside) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [path for path in inside if path.exists()]


@pytest.mark.slow
def test_heads_and_tail_train_over_real_links(network: ModuleType, exchange: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--models", "tiny-gpt2", "--links", "loopback,60/110", "--steps", "1", "--repeats", "1", "--heads", "2"]
    command = [sys.executable, str(BENCHMARKS / "exchange.py"), "--json", str(out), *options, "--without-monolithic"]
    subprocess.run(command, check=True, timeout=500)
    result = json.loads(out.read_text())
    measured = {(row["link"], row["technique"]) for row in result["rows"]}
    assert measured == {(link, technique) for link in ("loopback", "60/110") for technique in exchange.TECHNIQUES}
    assert result["worst_byte_error"] == 0
    assert result["worst_rate_error"] <= RATE_TOLERANCE
    assert all(row["measured_s"] > row["head_s"] > 0 for row in result["rows"])
    assert all(row["predicted_s"] > 0 for row in result["rows"])
