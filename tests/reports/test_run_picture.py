import math
from dataclasses import replace
from pathlib import Path

import pytest

from hsplit_flwr.reports.records import RoundRecord
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


def test_plot_has_round_0_in_the_title_and_stacks_up_and_down() -> None:
    """A fall from 812 in round 1 flattened all rounds after it."""
    upper, lower = run_figure(run_summary()).axes
    central, federated = upper.get_lines()
    assert list(central.get_xdata()) == list(federated.get_xdata()) == [1, 2, 3]
    assert list(central.get_ydata()) == list(CENTRAL)
    assert list(federated.get_ydata()) == list(FEDERATED)
    assert upper.get_yscale() == "linear"
    assert "(before training, not drawn: 812.5, central, server's data)" in upper.get_title(loc="left")
    tops = sorted(bar.get_y() + bar.get_height() for bar in lower.patches if bar.get_y() > 0)
    assert tops == pytest.approx(3 * [1.75] + 3 * [3.25])  # MB, up plus down
    assert "MB" in lower.get_ylabel()
    assert [text.get_text() for text in lower.texts] == 3 * ["1", "0"]
    assert lower.get_xlabel() == "round"
    assert lower.get_position().height < upper.get_position().height / 2


def test_plot_tells_close_curves_apart() -> None:
    close = tuple(replace(record, federated_perplexity=record.central_perplexity) for record in run_summary().history)
    upper, _ = run_figure(replace(run_summary(), history=close)).axes
    central, federated = upper.get_lines()
    assert central.get_color() != federated.get_color()
    assert (central.get_linestyle(), federated.get_linestyle()) == ("-", "--")
    assert (central.get_marker(), federated.get_marker()) == ("o", "s")
    assert federated.get_markerfacecolor() == "none"
    first, second = upper.texts  # the last values, one above the other
    assert first.get_text() == second.get_text() == "10.125"
    assert first.xyann[1] > second.xyann[1]
    assert [text.get_text() for text in upper.get_legend().get_texts()] == [
        "central, server's data: 41.500 \u2192 10.125",
        "federated, clients' data: 41.500 \u2192 10.125",
    ]


def test_plot_of_a_run_evaluated_by_its_clients_alone_has_one_curve() -> None:
    history = tuple(replace(record, central_perplexity=None) for record in run_summary().history)
    upper = run_figure(replace(run_summary(), history=history, initial_perplexity=50.0)).axes[0]
    (federated,) = upper.get_lines()
    assert list(federated.get_ydata()) == list(FEDERATED)
    assert "50.000, federated, clients' data" in upper.get_title(loc="left")


def test_plot_of_a_run_that_diverges_is_logarithmic_and_marks_what_is_no_number() -> None:
    values = ((3.0, 3.5), (900.0, math.nan), (math.inf, math.nan))
    history = tuple(
        replace(round_record(number), central_perplexity=central, federated_perplexity=federated)
        for number, (central, federated) in enumerate(values, start=1)
    )
    figure = run_figure(replace(run_summary(), history=history))
    upper = figure.axes[0]
    assert upper.get_yscale() == "log"
    assert [list(line.get_ydata()) for line in upper.get_lines()] == [[3.0, 900.0], [3.5]]
    crosses = [text.get_position()[0] for text in upper.texts if text.get_text() == "\u00d7"]
    assert sorted(crosses) == [2, 3, 3]
    assert "not a finite number" in upper.get_title(loc="left")
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("central", "federated"), [(None, None), (math.nan, None), (math.nan, math.inf), (5.0, None), (5.0, 5.0)]
)
@pytest.mark.parametrize("rounds", [0, 1, 200])
def test_plot_of_whatever_was_measured_is_drawn(rounds: int, central: float | None, federated: float | None) -> None:
    history = tuple(
        RoundRecord(number, central_perplexity=central, federated_perplexity=federated)
        for number in range(1, rounds + 1)
    )
    figure = run_figure(replace(run_summary(), history=history))
    figure.canvas.draw()
    finite = [value for value in (central, federated) if value is not None and math.isfinite(value) and rounds]
    notes = [text.get_text() for text in figure.axes[0].texts]
    assert ("no perplexity measured" in notes) == (not finite)
    assert figure.axes[0].get_xlim() == (0.5, max(1, rounds) + 0.5)


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
