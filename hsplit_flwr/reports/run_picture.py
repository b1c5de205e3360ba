"""One picture of a run: perplexity after each round, and below, small, the bytes every client exchanged in it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsplit_flwr.common.figures import BLUE, ORANGE, VERMILION, new_figure, save_figure
from hsplit_flwr.common.tables import client_order, format_number
from hsplit_flwr.reports.records import RoundRecord, RunSummary

DOWN_STYLE = {"facecolor": ORANGE, "hatch": "//", "edgecolor": "white"}
LOG_SCALE_RATIO = 20.0
"""From this ratio of highest to lowest perplexity, round 0 apart, the axis is logarithmic."""
MOST_MARKERS = 40
"""Above this many rounds a curve has no markers."""
MOST_BARS = 60
"""Above this many bars, the clients of a round are one bar."""
LONGEST_LABEL = 3
"""Characters of a client id that fit above its bar; longer ids (Flower's node ids) are numbered instead."""
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


@dataclass(frozen=True)
class _Curve:
    """Perplexity after each evaluated round, and how it is drawn: told apart by colour, line and marker."""

    name: str
    points: Sequence[tuple[int, float]]
    style: dict[str, Any]

    @property
    def finite(self) -> list[tuple[int, float]]:
        return [(number, value) for number, value in self.points if math.isfinite(value)]

    @property
    def label(self) -> str:
        """Its name, first and last value."""
        ends = [format_number(value) for _, value in (self.finite[:1] + self.finite[-1:])]
        return f"{self.name}: " + " \u2192 ".join(dict.fromkeys(ends)) if ends else self.name

    @property
    def lost(self) -> list[int]:
        """Rounds whose perplexity is not a finite number."""
        return [number for number, value in self.points if not math.isfinite(value)]


def plot_run(summary: RunSummary, path: str | Path) -> None:
    """Write the picture of a run (`run_figure`) as a PNG to `path`."""
    save_figure(run_figure(summary), path)


def run_figure(summary: RunSummary) -> Any:
    """The matplotlib figure of a run: perplexity above, bytes below, over the same axis of rounds.

    Round 0 stands in the title: training often falls a thousandfold in round 1, beside which no later round shows.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8.0, 7.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    _plot_perplexity(upper, summary)
    _plot_bytes(lower, summary.history)
    lower.set_xlabel("round")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lower.set_xlim(0.5, max((record.round for record in summary.history), default=1) + 0.5)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    return figure


def _plot_perplexity(axes: Any, summary: RunSummary) -> None:
    curves = _curves(summary.history)
    few = len(summary.history) <= MOST_MARKERS
    for curve in curves:
        xs, ys = zip(*curve.finite, strict=True) if curve.finite else ((), ())
        axes.plot(xs, ys, label=curve.label, **{**curve.style, **({} if few else {"marker": ""})})
        _mark_lost(axes, curve)
    finite = [value for curve in curves for _, value in curve.finite]
    if not finite:
        axes.text(0.5, 0.5, "no perplexity measured", transform=axes.transAxes, ha="center", color="0.4")
        axes.set_yticks([])
    elif max(finite) > LOG_SCALE_RATIO * min(finite):
        _log_scale(axes)
    if finite:
        _label_ends(axes, curves)
        axes.legend(frameon=False)
    axes.set_ylabel("perplexity")
    axes.set_title(_title(summary, curves), loc="left", fontsize=10)


def _curves(history: Sequence[RoundRecord]) -> list[_Curve]:
    """Those with at least one evaluated round."""
    central = [(r.round, r.central_perplexity) for r in history if r.central_perplexity is not None]
    federated = [(r.round, r.federated_perplexity) for r in history if r.federated_perplexity is not None]
    open_square = {"marker": "s", "markersize": 9, "markerfacecolor": "none", "linestyle": "--"}
    curves = [
        _Curve("central, server's data", central, {"color": BLUE, "marker": "o", "markersize": 5}),
        _Curve("federated, clients' data", federated, {"color": VERMILION, **open_square}),
    ]
    return [curve for curve in curves if curve.points]


def _title(summary: RunSummary, curves: Sequence[_Curve]) -> str:
    title = "Perplexity after each round"
    if summary.initial_perplexity is not None:
        whose = f", {curves[0].name}" if curves else ""
        title += f" (before training, not drawn: {format_number(summary.initial_perplexity)}{whose})"
    return f"{title}\n\u00d7: not a finite number" if any(curve.lost for curve in curves) else title


def _label_ends(axes: Any, curves: Sequence[_Curve]) -> None:
    """The last value to the right of each curve: that of the higher one lifted, so that close ones stay readable."""
    drawn = sorted((curve for curve in curves if curve.finite), key=lambda curve: -curve.finite[-1][1])
    for place, curve in enumerate(drawn):
        lift = 0 if len(drawn) == 1 else 1 - 2 * place
        style = {"color": curve.style["color"], "textcoords": "offset points", "fontsize": 9}
        axes.annotate(format_number(curve.finite[-1][1]), curve.finite[-1], xytext=(8, 5 * lift), va="center", **style)


def _mark_lost(axes: Any, curve: _Curve) -> None:
    """A cross at the upper edge for every round whose perplexity is not finite."""
    edge = axes.get_xaxis_transform()
    for number in curve.lost:
        axes.text(
            number, 0.98, "\u00d7", transform=edge, color=curve.style["color"], ha="center", va="top", fontsize=13
        )


def _log_scale(axes: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _plot_bytes(axes: Any, history: tuple[RoundRecord, ...]) -> None:
    """A stack (up, then down) per client and round, in the order of the client ids."""
    ids = sorted({c.client_id for record in history for c in record.clients}, key=client_order)
    merged = len(ids) * len(history) > MOST_BARS
    short = all(len(client_id) <= LONGEST_LABEL for client_id in ids)
    groups = 1 if merged else max(1, len(ids))
    width = 0.8 / groups
    bars: dict[float, tuple[int, int, str]] = {}
    for record in history:
        for client in record.clients:
            place = 0 if merged else ids.index(client.client_id)
            x = record.round + (place - (groups - 1) / 2) * width
            up, down, _ = bars.get(x, (0, 0, ""))
            label = client.client_id if short else str(place + 1)
            bars[x] = (up + client.bytes_up, down + client.bytes_down, "" if merged else label)
    _draw_stacks(axes, bars, 0.9 * width)
    what = "all clients" if merged else "number: client id" if short else "number: client, by id"
    axes.set_title(f"Bytes in each round ({what})", loc="left", fontsize=10)


def _draw_stacks(axes: Any, bars: dict[float, tuple[int, int, str]], width: float) -> None:
    """`bars` by place on the axis: bytes up, bytes down, label."""
    most = max((up + down for up, down, _ in bars.values()), default=0)
    scale, unit = next((entry for entry in UNITS if most >= entry[0]), UNITS[-1])
    bare = {"edgecolor": "none"} if len(bars) > MOST_BARS else {}  # white edges would cover narrow bars
    for x, (up, down, label) in bars.items():
        axes.bar(x, up / scale, width, color=BLUE)
        axes.bar(x, down / scale, width, bottom=up / scale, **{**DOWN_STYLE, **bare})
        top = (x, (up + down) / scale)
        axes.annotate(label, top, xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.bar(1, 0, color=BLUE, label="up, client to server")
    axes.bar(1, 0, label="down, server to client", **DOWN_STYLE)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98), fontsize=9)
    axes.set_ylim(0, 1.15 * most / scale or 1)
    axes.set_ylabel(f"exchanged ({unit})")
