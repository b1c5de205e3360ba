import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsplit_flwr.common import provenance
from hsplit_flwr.common.progress import Progress, format_duration, format_rate
from hsplit_flwr.common.tables import describe_ranks, format_bytes, format_number, format_seconds
from hsplit_flwr.data.slots import score_slots
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.reports.records import ClientRecord, RoundRecord, RunSummary
from hsplit_flwr.reports.run_picture import MOST_BARS, plot_run, run_figure
from hsplit_flwr.reports.run_tables import client_table, round_table, run_report, summary_table

CENTRAL, FEDERATED = (41.5, 20.25, 10.125), (44.0, 22.0, 11.0)


def client(client_id: int, number: int) -> ClientRecord:
    return ClientRecord(
        client_id=str(client_id),
        cut=2 if number < 3 else 3,
        ranks=f"2-{4 + client_id}",
        mean_rank=3.5,
        tokens=1000 * (client_id + 1),
        steps=20,
        loss=4.0 - number / 2,
        bytes_up=1_500_000 * (client_id + 1),
        bytes_down=250_000,
        seconds={"load": 0.25, "compute": 12.5, "exchange": 0.004},
    )


def round_record(number: int, clients: int = 2) -> RoundRecord:
    return RoundRecord(
        round=number,
        central_perplexity=CENTRAL[(number - 1) % 3],
        federated_perplexity=FEDERATED[(number - 1) % 3],
        train_loss=3.25,
        clients=tuple(client(i, number) for i in reversed(range(clients))),
        failures=("client 7: UNAVAILABLE",) if number == 2 else (),
        seconds={"configure": 0.01, "fit": 16.0, "aggregate": 0.2, "evaluate": 4.0},
    )


def run_summary(rounds: int = 3, clients: int = 2) -> RunSummary:
    return RunSummary(
        initial_perplexity=812.5,
        history=tuple(round_record(number, clients) for number in range(1, rounds + 1)),
        seed=7,
        versions={"python": "3.11.7", "torch": "2.13.0", "hsplit_flwr": None},
        commit="0123abc",
        command="flwr run .",
        wall_seconds=83.4,
        config={"local-steps": 20, "model": "tiny"},
        adapter={"max_rank": 64, "relative_error": 0.0123, "exact": False, "ranks": {"m": 64}},
        samples=({"prompt": "name : Alimentum", "generated": "Alimentum is cheap — très bon."},),
    )


def strictly(text: str) -> Any:
    """Parse as RFC 8259 has it: Python's parser alone also takes NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"not JSON: {constant}")

    return json.loads(text, parse_constant=refuse)


def cells(table: str) -> list[list[str]]:
    """The cells of a plain-text table without its rule."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def test_summary_json_has_what_a_reader_looks_for(tmp_path: Path) -> None:
    run_summary().save(tmp_path / "results" / "summary.json")
    found = strictly((tmp_path / "results" / "summary.json").read_text(encoding="utf-8"))
    assert found["initial_perplexity"] == 812.5
    assert found["final_perplexity"] == 10.125
    assert found["rounds"] == 3
    assert [entry["round"] for entry in found["history"]] == [1, 2, 3]
    assert found["history"][1]["failures"] == ["client 7: UNAVAILABLE"]
    assert found["history"][0]["clients"][1]["bytes_up"] == 1_500_000
    assert found["history"][0]["clients"][1]["seconds"]["compute"] == 12.5
    assert found["versions"]["hsplit_flwr"] is None
    assert found["adapter"]["relative_error"] == 0.0123
    assert found["samples"][0]["generated"] == "Alimentum is cheap — très bon."
    assert (found["seed"], found["commit"], found["command"]) == (7, "0123abc", "flwr run .")
    assert (found["wall_seconds"], found["config"]["local-steps"]) == (83.4, 20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_numbers_that_are_not_finite_become_null(bad: float, tmp_path: Path) -> None:
    history = (replace(round_record(1), central_perplexity=bad, seconds={"fit": bad}),)
    replace(run_summary(), history=history, initial_perplexity=bad).save(tmp_path / "summary.json")
    found = strictly((tmp_path / "summary.json").read_text())
    assert found["initial_perplexity"] is None
    assert found["final_perplexity"] is None
    assert found["history"][0]["central_perplexity"] is None
    assert found["history"][0]["seconds"] == {"fit": None}


def test_numpy_scalars_are_numbers() -> None:
    config: dict[Any, Any] = {"a": np.float32(0.5), "b": np.int64(3), 4: True, "folder": Path("x") / "y"}
    found = replace(run_summary(), config=config).to_dict()["config"]
    assert found == {"a": 0.5, "b": 3, "4": True, "folder": "x/y"}
    assert [type(value) for value in found.values()] == [float, int, bool, str]


def test_a_value_that_json_does_not_know_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    run_summary().save(path)
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"Expected numbers, texts, lists and mappings .* found set"):
        replace(run_summary(), config={"bad": {1, 2}}).save(path)
    assert path.read_text() == before


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    run_summary().save(path)
    before = path.read_text()

    def disk_full(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(text.encode(encoding)[:10])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", disk_full)
        with pytest.raises(OSError, match="No space left"):
            replace(run_summary(), seed=8).save(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_final_perplexity_is_the_last_evaluated_one() -> None:
    unevaluated = RoundRecord(round=3)
    only_federated = replace(round_record(2), central_perplexity=None)
    assert replace(run_summary(), history=(round_record(1), unevaluated)).final_perplexity == CENTRAL[0]
    assert replace(run_summary(), history=(only_federated, unevaluated)).final_perplexity == FEDERATED[1]
    assert replace(run_summary(), history=()).final_perplexity == 812.5


@pytest.mark.parametrize(("ranks", "text"), [([], "0"), ([8, 8], "8"), ([4, 2, 16], "2-16")])
def test_describe_ranks(ranks: list[int], text: str) -> None:
    assert describe_ranks(ranks) == text


def test_round_table_has_a_row_per_round() -> None:
    header, first, second, third = cells(round_table(run_summary().history))
    assert header[:6] == ["round", "ppl central", "ppl federated", "train loss", "tokens", "incidents"]
    assert header[6:] == ["configure s", "fit s", "aggregate s", "evaluate s", "federated s"]
    assert first == ["1", "41.500", "44.000", "3.250", "3,000", "0", "0.010", "16.0", "0.200", "4.0", "-"]
    assert second[5] == "1"
    assert third[:3] == ["3", "10.125", "11.000"]


def test_what_was_not_measured_is_a_dash() -> None:
    _, row = cells(round_table([RoundRecord(round=1)]))
    assert row == ["1", "-", "-", "-", "0", "0", "-", "-", "-", "-", "-"]


def test_client_table_sums_over_rounds_in_the_order_of_ids() -> None:
    header, first, second = cells(client_table(run_summary().history))
    assert header[:9] == ["client", "cut", "rank", "rounds", "steps", "tokens", "loss", "up", "down"]
    assert header[9:] == ["load s", "compute s", "exchange s"]
    assert first[:9] == ["0", "2, 3", "2-4", "3", "60", "3,000", "2.500", "4.5 MB", "750.0 kB"]
    assert first[9:] == ["0.750", "37.5", "0.012"]
    assert second[:9] == ["1", "2, 3", "2-5", "3", "60", "6,000", "2.500", "9.0 MB", "750.0 kB"]


def test_clients_are_in_the_order_of_their_numbers() -> None:
    clients = tuple(replace(client(0, 1), client_id=name) for name in ("10", "node-3", "2", "node-20"))
    rows = cells(client_table([replace(round_record(1), clients=clients)]))[1:]
    assert [row[0] for row in rows] == ["2", "10", "node-3", "node-20"]


def test_summary_table_has_totals_and_the_adapter() -> None:
    values = dict(cells(summary_table(run_summary()))[1:])
    assert values["perplexity"] == "812.5 -> 10.125"
    assert (values["rounds"], values["clients"], values["tokens trained"]) == ("3", "2", "9,000")
    assert (values["bytes up"], values["bytes down"]) == ("13.5 MB", "1.5 MB")
    assert (values["incidents"], values["wall time"]) == ("1", "1:23")
    assert values["PEFT adapter"] == "rank 64, truncated (relative error 0.012)"
    assert values["versions"] == "python 3.11.7, torch 2.13.0, hsplit_flwr -"


def test_columns_of_a_plain_table_are_aligned() -> None:
    lines = round_table(run_summary().history).splitlines()
    assert len({len(line) for line in lines}) == 1  # right-aligned numbers end in one column
    assert set(lines[1]) == {"-", " "}


def test_markdown_tables_have_one_number_of_cells_and_escape_bars() -> None:
    tricky = replace(run_summary(), versions={"torch": "2|3"})
    for table in (
        round_table(tricky.history, markdown=True),
        client_table(tricky.history, markdown=True),
        summary_table(tricky, markdown=True),
    ):
        lines = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert re.fullmatch(r"\|( -+:? \|)+", lines[1])


@pytest.mark.parametrize("markdown", [False, True])
def test_report_has_every_section(markdown: bool) -> None:
    report = run_report(run_summary(), markdown=markdown)
    for part in ("Rounds", "Clients", "Result"):
        assert part in report
    assert "round 2: client 7: UNAVAILABLE" in report
    healthy = replace(run_summary(), history=(round_record(1),))
    assert "Failures" not in run_report(healthy, markdown=markdown)


@pytest.mark.parametrize("markdown", [False, True])
def test_a_run_that_is_not_completed_says_so_first(markdown: bool, tmp_path: Path) -> None:
    failed = replace(run_summary(rounds=1), status="failed", reason="no client finished in round 1")
    report = run_report(failed, markdown=markdown)
    assert report.splitlines()[0] == "THE RUN FAILED after 1 round: no client finished in round 1"
    running = run_report(replace(run_summary(), status="running"), markdown=markdown)
    assert running.splitlines()[0] == "The run is under way: these are its results after 3 rounds."
    assert "Rounds" in run_report(run_summary(), markdown=markdown).splitlines()[0]
    failed.save(tmp_path / "summary.json")
    found = strictly((tmp_path / "summary.json").read_text())
    assert (found["status"], found["reason"]) == ("failed", "no client finished in round 1")
    assert run_summary().to_dict()["status"] == "completed"


def test_the_summary_has_the_slots_that_samples_get_right() -> None:
    before, after = score_slots([("name[Cotto], food[Thai]", "x")]), score_slots([("name[Cotto], food[Thai]", "Cotto")])
    assert before is not None
    assert after is not None
    summary = replace(run_summary(), slots={"before": before, "after": after})
    assert dict(cells(summary_table(summary))[1:])["slots right"] == "0 of 2 (0 %) -> 1 of 2 (50 %)"
    assert summary.to_dict()["slots"]["after"] == {
        "prompts": 1,
        "right": 1,
        "total": 2,
        "right_by_slot": {"name": 1.0, "food": 0.0},
    }
    assert "slots right" not in summary_table(run_summary())


@pytest.mark.parametrize("markdown", [False, True])
def test_a_round_under_way_can_be_shown_and_saved(markdown: bool, tmp_path: Path) -> None:
    running = replace(run_summary(), status="running", history=(round_record(1), RoundRecord(2)))
    assert "Rounds" in run_report(running, markdown=markdown)
    running.save(tmp_path / "summary.json")
    assert running.final_perplexity == CENTRAL[0]
    plot_run(running, tmp_path / "run.png")


@pytest.mark.parametrize("markdown", [False, True])
def test_a_run_without_rounds_can_be_shown(markdown: bool, tmp_path: Path) -> None:
    empty = replace(run_summary(), history=(), initial_perplexity=None, adapter=None)
    assert "- -> -" in run_report(empty, markdown=markdown)
    plot_run(empty, tmp_path / "run.png")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (3 * 10**15, "3000.0 TB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_format_numbers_and_seconds() -> None:
    assert [format_number(v) for v in (1.23456, 812.34, 50257.0, 3e7)] == [
        "1.235",
        "812.3",
        "50,257.0",
        "3e+07",
    ]
    assert [format_seconds(v) for v in (0.0042, 0.9999, 61.26)] == ["0.004", "1.0", "61.3"]


def test_plot_is_a_png_of_readable_size(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "run.png"
    plot_run(run_summary(), path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1200, 1050)
    assert len(data) > 20_000


def test_plot_shows_the_start_and_stacks_up_and_down() -> None:
    upper, lower = run_figure(run_summary()).axes
    central, federated = upper.get_lines()
    assert list(central.get_xdata()) == [0, 1, 2, 3]
    assert list(central.get_ydata()) == [812.5, *CENTRAL]
    assert list(federated.get_xdata()) == [1, 2, 3]
    assert upper.get_yscale() == "log"
    tops = sorted(bar.get_y() + bar.get_height() for bar in lower.patches if bar.get_y() > 0)
    assert tops == pytest.approx(3 * [1.75] + 3 * [3.25])  # MB, up plus down
    assert "MB" in lower.get_ylabel()
    assert [text.get_text() for text in lower.texts] == 3 * ["1", "0"]
    assert lower.get_xlabel() == "round"


def test_plot_of_a_run_evaluated_by_its_clients_alone_starts_there() -> None:
    history = tuple(replace(record, central_perplexity=None) for record in run_summary().history)
    (federated,) = run_figure(replace(run_summary(), history=history, initial_perplexity=50.0)).axes[0].get_lines()
    assert list(federated.get_ydata()) == [50.0, *FEDERATED]


def test_plot_of_many_clients_has_one_bar_per_round() -> None:
    summary = run_summary(rounds=3, clients=MOST_BARS)
    lower = run_figure(summary).axes[1]
    ups = [bar.get_height() for bar in lower.patches if bar.get_y() == 0 and bar.get_height() > 0]
    total = sum(c.bytes_up for c in summary.history[0].clients) / 1e9
    assert ups == pytest.approx(3 * [total])
    assert "GB" in lower.get_ylabel()
    assert {text.get_text() for text in lower.texts} == {""}


def test_plot_numbers_clients_whose_ids_are_long() -> None:
    clients = tuple(replace(client(0, 1), client_id=name) for name in ("172293847561029302", "9"))
    history = (replace(round_record(1), clients=clients),)
    lower = run_figure(replace(run_summary(), history=history)).axes[1]
    assert {text.get_text(): text.xy[0] for text in lower.texts} == pytest.approx({"1": 0.8, "2": 1.2})


def test_importing_the_reports_does_not_import_matplotlib() -> None:
    modules = "hsplit_flwr.reports.run_tables, hsplit_flwr.reports.run_picture, hsplit_flwr.common.provenance"
    code = f"import sys, {modules}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_shows_rate_and_time_left() -> None:
    clock = Clock()
    progress = Progress(rounds=2, interval_seconds=0.0, clock=clock)
    progress.start_round(1, 20)
    clock.now += 2.0
    assert progress.step(1, 3.21, 2400) == "round 1/2  step 1/20  loss 3.21  1.2 k tok/s  eta 1:18"
    clock.now += 1.0
    assert progress.step(1, 3.0, 87) == "round 1/2  step 2/20  loss 3  87 tok/s  eta 0:57"
    clock.now += 600.0  # aggregation and evaluation
    progress.start_round(2, 20)
    clock.now += 1.5
    assert progress.step(20, 2.5, 150) == "round 2/2  step 20/20  loss 2.5  100 tok/s  eta 0:00"
    progress.start_round(2, 20, seconds_ago=2.0)  # it began before its first step was reported
    assert progress.step(5, 2.5, 100) == "round 2/2  step 5/20  loss 2.5  50 tok/s  eta 0:04"


def test_progress_speaks_once_per_interval_and_counts_what_it_did_not_show() -> None:
    clock = Clock()
    progress = Progress(rounds=1, interval_seconds=10.0, clock=clock)
    progress.start_round(1, 100)
    spoken = {}
    for step in range(1, 51):
        clock.now += 1.0
        line = progress.step(1, 3.0, 100 if step < 12 else 200)
        if line is not None:
            spoken[step] = line
    assert list(spoken) == [1, 11, 21, 31, 41]
    assert "100 tok/s" in spoken[11]
    assert "200 tok/s" in spoken[31]
    assert spoken[41].endswith("eta 0:59")


def test_progress_survives_a_clock_that_stands_still_and_more_steps_than_planned() -> None:
    progress = Progress(rounds=1, interval_seconds=0.0, clock=Clock())
    progress.start_round(1, 2)
    assert progress.step(3, math.nan, 10) == "round 1/1  step 3/2  loss nan  0 tok/s  eta 0:00"


def test_format_rate_and_duration() -> None:
    assert [format_rate(v) for v in (0.4, 999.0, 999.6, 1234.0, 2.5e6)] == [
        "0",
        "999",
        "1.0 k",
        "1.2 k",
        "2.5 M",
    ]
    assert [format_duration(v) for v in (0, 34.4, 59.6, 725, 3725)] == [
        "0:00",
        "0:34",
        "1:00",
        "12:05",
        "1:02:05",
    ]


def test_versions_name_what_a_result_depends_on() -> None:
    found = provenance.versions()
    assert set(found) == {"python", "torch", "transformers", "peft", "flwr", "hsplit_flwr"}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    import torch

    assert found["torch"] == torch.__version__


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-here",))
    assert provenance.versions()["no-such-package-here"] is None


def git(folder: Path, *arguments: str) -> str:
    identity = {f"GIT_{role}_{key}": "test@test" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env={**os.environ, **identity, "GIT_CONFIG_GLOBAL": os.devnull},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_commit_is_that_of_the_checkout_which_tracks_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "venv" / "provenance.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance.commit() is None  # no repository
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another project")
    assert provenance.commit() is None  # an installed copy inside another project's repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "ours")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.commit() == head
    module.write_text("changed")
    assert provenance.commit() == f"{head}+changes"
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None  # no git


def test_command_has_no_folders_of_the_machine_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/opt/env/bin/python", "/opt/env/bin/flwr-serverapp", "--token", "s3cret", "--insecure"]
    words += ["--api-key=s3cret", "--max-tokens", "64", "--out=/home/me/results", "--note", "two words"]
    monkeypatch.setattr(sys, "orig_argv", words)
    expected = "python flwr-serverapp --token '***' --insecure '--api-key=***' --max-tokens 64 --out=results"
    assert provenance.command() == f"{expected} --note 'two words'"
