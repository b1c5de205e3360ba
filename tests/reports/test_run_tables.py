import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsplit_flwr.data.slots import score_slots
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.reports.records import RoundRecord
from hsplit_flwr.reports.run_picture import plot_run
from hsplit_flwr.reports.run_tables import client_table, round_table, run_report, summary_table
from tests.reports.examples import CENTRAL, FEDERATED, client, round_record, run_summary


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


def test_importing_the_reports_does_not_import_matplotlib() -> None:
    modules = "hsplit_flwr.reports.run_tables, hsplit_flwr.reports.run_picture, hsplit_flwr.common.provenance"
    code = f"import sys, {modules}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
