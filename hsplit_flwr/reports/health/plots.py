"""A picture of what rounds learnt: the singular spectrum of their aggregated updates, and how many ranks carry it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsplit_flwr.common.figures import BLUE, VERMILION, new_figure, save_figure
from hsplit_flwr.reports.health.aggregation import COLLAPSE, unequal_matrices
from hsplit_flwr.reports.health.records import AggregationHealth
from hsplit_flwr.reports.records import RoundRecord

FLOOR = 1e-4
"""Share of the largest singular value: below, values are float32's noise and are not drawn."""
MOST_COLUMNS = 5
MOST_LABELS = 8
"""Above this many rounds, only so many evenly spaced ones stand in the legend."""


def plot_spectrum(history: Sequence[RoundRecord], path: str | Path) -> None:
    """Write `spectrum_figure` as a PNG to `path`; nothing where no round's aggregation was measured."""
    if not any(record.aggregation for record in history):
        return
    save_figure(spectrum_figure(history), path)


def spectrum_figure(history: Sequence[RoundRecord]) -> Any:
    """The matplotlib figure: every round's singular values on the left, effective rank and energy on the right.

    Each is a mean over the round's measured matrices; singular values are relative to the matrix's largest.
    """
    measured = [(record.round, record.aggregation) for record in history if record.aggregation]
    figure = new_figure(11.0, 4.6)
    panels: dict[str, Any] = figure.subplot_mosaic([["spectra", "rank"], ["spectra", "energy"]], width_ratios=[1.3, 1])
    _draw_spectra(panels["spectra"], measured)
    ranks = {number: [m.effective_rank for m in health.matrices] for number, health in measured}
    _draw_course(panels["rank"], ranks, BLUE)
    panels["rank"].set_title("Effective rank", loc="left", fontsize=10)
    shares = {number: [100 * m.energy_in_smallest for m in unequal_matrices(health)] for number, health in measured}
    _draw_course(panels["energy"], {number: of_round for number, of_round in shares.items() if of_round}, VERMILION)
    _finish_energy(panels["energy"])
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    entries = [axes.get_legend_handles_labels() for axes in panels.values()]
    handles, labels = ([entry for part in parts for entry in part] for parts in zip(*entries, strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=MOST_COLUMNS, frameon=False, fontsize=8)
    return figure


def mean_spectrum(health: AggregationHealth) -> Any:
    """Mean over the matrices of sigma_k / sigma_1, (K,); a matrix with fewer values counts 0 beyond them."""
    longest = max(len(matrix.singular_values) for matrix in health.matrices)
    total = np.zeros(longest)
    for matrix in health.matrices:
        values = np.array(matrix.singular_values)
        total[: len(values)] += values / values[0]
    return total / len(health.matrices)


def _draw_spectra(axes: Any, measured: Sequence[tuple[int, AggregationHealth]]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    labelled = {measured[i][0] for i in np.linspace(0, len(measured) - 1, min(len(measured), MOST_LABELS)).astype(int)}
    for place, (number, health) in enumerate(measured):
        values = mean_spectrum(health)
        values = values[values >= FLOOR]
        # Light to dark with time, without the palest third, which a white page swallows.
        colour = colormaps["Blues"](0.35 + 0.65 * place / max(1, len(measured) - 1))
        label = f"round {number}" if number in labelled else None
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, color=colour, label=label)
    ranks = {matrix.smallest_rank for _, health in measured for matrix in health.matrices}
    for rank in sorted(ranks):
        axes.axvline(rank + 0.5, color="0.6", linewidth=1, linestyle=":")
    axes.plot([], [], color="0.6", linewidth=1, linestyle=":", label="smallest rank of a client")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("singular value, by size; mean of the measured matrices, each relative to its largest", fontsize=9)
    axes.set_title("Spectrum of each round's aggregated update", loc="left", fontsize=10)
    axes.yaxis.set_major_formatter("{x:g}")


def _draw_course(axes: Any, values: Mapping[int, Sequence[float]], colour: str) -> None:
    """The mean of each round's values, and their range over the matrices."""
    from matplotlib.ticker import MaxNLocator

    rounds = list(values)
    if not rounds:
        axes.text(0.5, 0.5, "no matrix of unequal ranks", ha="center", transform=axes.transAxes, fontsize=8)
        return
    axes.plot(rounds, [np.mean(of_round) for of_round in values.values()], marker="o", color=colour)
    axes.vlines(rounds, [min(v) for v in values.values()], [max(v) for v in values.values()], color=colour, alpha=0.4)
    axes.set_ylim(0, 1.1 * max(max(of_round) for of_round in values.values()))
    axes.set_xlim(min(rounds) - 0.5, max(rounds) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _finish_energy(axes: Any) -> None:
    axes.set_ylim(0, 105)
    axes.set_xlabel("round; line: mean of the measured matrices, bars: smallest to largest", fontsize=9)
    label = f"rank collapse: {100 * COLLAPSE:.0f} % and more"
    axes.axhline(100 * COLLAPSE, color="0.4", linewidth=1, linestyle="--", label=label)
    axes.set_title("% of energy in the smallest client's rank", loc="left", fontsize=10)
