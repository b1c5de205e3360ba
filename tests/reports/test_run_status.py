"""A run's rounds as JSON lines, and what can be told of a run from them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hsplit_flwr import cli
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.reports.best_round import CENTRAL
from hsplit_flwr.reports.records import BestRound
from hsplit_flwr.reports.rounds_file import ROUNDS, append_round, forget_rounds_after, read_rounds
from hsplit_flwr.reports.run_status import run_state
from tests.reports.examples import round_record, run_summary


def written(folder: Path, rounds: int = 3) -> Path:
    history = [round_record(number) for number in range(1, rounds + 1)]
    for number in range(1, rounds + 1):
        append_round(folder, history[:number])
    return folder / ROUNDS


def test_a_round_is_there_as_soon_as_it_is_over(tmp_path: Path) -> None:
    append_round(tmp_path, [])
    assert not (tmp_path / ROUNDS).exists()
    with written(tmp_path, 1).open() as followed:  # as `tail -f` does
        assert json.loads(followed.readline())["round"] == 1
        append_round(tmp_path, [round_record(1), round_record(2)])
        second = json.loads(followed.readline())
    assert (second["round"], second["best_round"], second["tokens"]) == (2, 2, 3000)
    assert second["central_perplexity"] == 20.25
    assert second["failures"] == ["client 7: UNAVAILABLE"]
    assert {client["client_id"]: client["bytes_up"] for client in second["clients"]} == {"0": 1500000, "1": 3000000}


def test_what_is_no_number_is_none_and_names_stay_one_line(tmp_path: Path) -> None:
    record = replace(round_record(1), train_loss=float("nan"), failures=("client \ud800\n\u2028: gone",))
    append_round(tmp_path, [record])
    (line,) = read_rounds(tmp_path)
    assert line["train_loss"] is None
    assert line["failures"] == list(record.failures)


def test_half_a_line_of_a_killed_process_is_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path)
    text = path.read_text()
    path.write_text(text[: len(text) - 40] + "\n[1]\n3\n{}\n")
    assert [line["round"] for line in read_rounds(tmp_path)] == [1, 2]


def test_a_resumed_run_forgets_what_it_plays_again(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = read_rounds(tmp_path)
    forget_rounds_after(tmp_path, 2)
    assert read_rounds(tmp_path) == before[:2]
    append_round(tmp_path, [round_record(number) for number in range(1, 4)])
    assert [json.loads(text)["round"] for text in path.read_text().splitlines()] == [1, 2, 3]


def test_a_run_under_way_is_told_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, 2)
    best = BestRound(2, 20.25, CENTRAL, "best/round-0002/adapter")
    replace(run_summary(2), status="running", config={"rounds": 5}, best=best).save(tmp_path / "summary.json")
    assert cli.main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}: running, 2 of 5 rounds, last written 0:0" in shown
    assert "best: round 2, perplexity 20.250 on the server's held-out data, in best/round-0002/adapter" in shown
    assert "round 2: client 7: UNAVAILABLE" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["0", "2", "2", "2-4", "2,000", "3.000", "3.0", "MB", "500.0", "kB"] in rows
    assert cli.main(["status", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [line["round"] for line in told["rounds"]] == [1, 2]
    assert told["summary"]["status"] == "running"


def test_a_run_that_failed_before_its_first_round_says_why(tmp_path: Path) -> None:
    replace(run_summary(0), status="failed", reason="ConfigError: no nodes").save(tmp_path / "summary.json")
    text = run_state(tmp_path).text()
    assert "failed, 0 rounds" in text
    assert "why: ConfigError: no nodes" in text
    assert "No round is over yet." in text


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"with rounds.jsonl or summary.json, found neither in"):
        run_state(tmp_path)
    assert cli.main(["status", str(tmp_path / "nowhere")]) == 2
    assert "found neither" in capsys.readouterr().err
