from dataclasses import replace
from pathlib import Path

import pytest

from hsplit_flwr.reports.run_picture import MOST_BARS, plot_run, run_figure
from tests.reports.examples import CENTRAL, FEDERATED, client, round_record, run_summary


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
