"""Pictures from a results store: perplexity over rounds, virtual time or tokens, a panel per scenario."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hsplit_flwr.common.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_figure, save_figure
from hsplit_flwr.experiments.evidence.store import StoredEvaluation
from hsplit_flwr.experiments.evidence.stored_runs import StoredRun, StoredRuns
from hsplit_flwr.experiments.records import Evaluation

Axis = Literal["round", "virtual_s", "tokens"]
LABELS: dict[Axis, str] = {"round": "round", "virtual_s": "virtual time (s)", "tokens": "target tokens trained on"}
COLOURS = (VERMILION, BLUE, GREEN, ORANGE, PURPLE, SKY, "black", GREY)
STYLES = ("-", "--", ":", "-.")
"""after the last colour, the colours come again in the next style"""
CRUSHED = 2.0
"""Round 0 is left out if it makes the logarithmic axis this many times as long."""
LOG_TIME_RATIO = 8.0
"""From this ratio of the longest to the shortest curve, x is logarithmic."""
TICKS = ((20.0, (1, 2, 5)), (2.0, (1, 1.5, 2, 3, 4, 5, 7)))
"""From this ratio of highest to lowest perplexity, ticks at these multiples of the powers of ten."""
LONG_TIME_RATIO = 200.0
"""From this ratio of the latest to the first time on, there is room for two ticks a power of ten."""
MOST_COLUMNS = 3
MOST_MARKERS = 12
"""A curve with more points is a plain line."""
Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""x, mean, lowest, highest"""


def draw_curves(rows: Sequence[StoredEvaluation], path: str | Path, *, x: Axis, order: Sequence[str] = ()) -> None:
    """Write `curves_figure` as a PNG to `path`."""
    save_figure(curves_figure(StoredRuns.of(rows, order), x), path)


def curves_figure(runs: StoredRuns, x: Axis) -> Any:
    """The matplotlib figure: per scenario a panel with the mean over seeds and a band from lowest to highest."""
    scenarios = runs.scenarios()
    partitions = len({run.spec.partition for run in runs.runs})
    columns = partitions if partitions > 1 else min(MOST_COLUMNS, max(1, len(scenarios)))
    lines = max(1, math.ceil(len(scenarios) / columns))
    figure = new_figure(2.2 + 4.2 * columns, 0.6 + 3.4 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    looks = {
        label: {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place // len(COLOURS) % len(STYLES)]}
        for place, label in enumerate(runs.variants())
    }
    handles: dict[str, Any] = {}
    for place, (label, of_scenario) in enumerate(scenarios.items()):
        handles |= _draw_panel(panels[place], runs.variants(of_scenario), looks, x)
        panels[place].set_title(label, loc="left", fontsize=10)
        panels[place].set_ylabel("" if place % columns else "perplexity")
    for axes in panels[len(scenarios) :]:
        axes.set_axis_off()
    shown = [label for label in looks if label in handles]
    if shown:
        figure.legend([handles[s] for s in shown], shown, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def curve(runs: Sequence[StoredRun], x: Axis, first_round: int = 0) -> Curve | None:
    """Mean, lowest and highest perplexity of `runs` wherever all of them have one; None if they never do.

    Between evaluations the logarithm of the perplexity is taken to be linear in `x`, as in `StoredRun.seconds_to`.
    """
    points = [[_point(e, x) for e in run.evaluations if e.round >= first_round] for run in runs]
    finite = [np.array([(a, b) for a, b in of_run if math.isfinite(b)]) for of_run in points]
    if not finite or any(len(of_run) == 0 for of_run in finite):
        return None
    start, end = max(of_run[0, 0] for of_run in finite), min(of_run[-1, 0] for of_run in finite)
    grid = np.unique(np.concatenate([of_run[:, 0] for of_run in finite]))
    grid = grid[(grid >= start) & (grid <= end)]
    if len(grid) == 0:
        return None
    perplexity_SX = np.exp([np.interp(grid, of_run[:, 0], of_run[:, 1]) for of_run in finite])
    return grid, perplexity_SX.mean(axis=0), perplexity_SX.min(axis=0), perplexity_SX.max(axis=0)


def _point(evaluation: Evaluation, x: Axis) -> tuple[float, float]:
    """Place on the axis and loss."""
    perplexity = evaluation.perplexity
    return float(getattr(evaluation, x)), math.log(perplexity) if math.isfinite(perplexity) else math.inf


def _draw_panel(axes: Any, variants: dict[str, list[StoredRun]], looks: dict[str, Any], x: Axis) -> dict[str, Any]:
    everything = [run for mine in variants.values() for run in mine]
    ends = [float(getattr(run.evaluations[-1], x)) for run in everything]
    logarithmic = min(ends) > 0 and max(ends) > LOG_TIME_RATIO * min(ends)
    limits = _limits(everything, first_round=1 if logarithmic else 0)
    handles = {}
    for label, mine in variants.items():
        found = curve(mine, x, limits.first_round)
        if found is not None:
            grid, mean, low, high = found
            marker = {"marker": "o", "markersize": 3} if len(grid) <= MOST_MARKERS else {}
            (handles[label],) = axes.plot(grid, mean, linewidth=1.6, **marker, **looks[label])
            axes.fill_between(grid, low, high, color=looks[label]["color"], alpha=0.15, linewidth=0)
    _scale_perplexity(axes, limits)
    _scale_x(axes, x, logarithmic)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    return handles


@dataclass(frozen=True)
class _Limits:
    """What a panel shows."""

    first_round: int
    low: float
    high: float


def _limits(runs: Sequence[StoredRun], first_round: int) -> _Limits:
    """Round 0 if it does not crush the rest; what is worse than untrained leaves the picture."""
    evaluations = [e for run in runs for e in run.evaluations if math.isfinite(e.perplexity)]
    untrained = max((e.perplexity for e in evaluations if e.round == 0), default=math.inf)
    later = [e.perplexity for e in evaluations if e.round > 0 and e.perplexity < untrained]
    if not later:
        return _Limits(first_round, 1.0, untrained if math.isfinite(untrained) else 10.0)
    low, high = min(later), max(later)
    if first_round == 0 and math.isfinite(untrained):
        if math.log(untrained / low) > CRUSHED * math.log(high / low) > 0:
            first_round = 1
        else:
            high = untrained
    return _Limits(first_round, low, high)


def _scale_perplexity(axes: Any, limits: _Limits) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    ratio = max(limits.high / limits.low, 1.01)
    axes.set_yscale("log")
    axes.set_ylim(limits.low / ratio**0.05, limits.high * ratio**0.05)
    steps = next((steps for least, steps in TICKS if ratio > least), None)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20) if steps else MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _scale_x(axes: Any, x: Axis, logarithmic: bool) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if logarithmic:
        axes.set_xscale("log")
        first, last = axes.get_xlim()
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1, 3) if last > LONG_TIME_RATIO * first else (1, 2, 5), numticks=20)
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    elif x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel(LABELS[x])
