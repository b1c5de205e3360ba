"""One picture of a run: perplexity over rounds, and the bytes every client exchanged in each round."""

import math
from pathlib import Path
from typing import Any

from hsplit_flwr.common.figures import BLUE, ORANGE, VERMILION, new_figure, save_figure
from hsplit_flwr.common.tables import client_order
from hsplit_flwr.reports.records import RoundRecord, RunSummary

DOWN_STYLE = {"facecolor": ORANGE, "hatch": "//", "edgecolor": "white"}
LOG_SCALE_RATIO = 20.0
"""From this ratio of highest to lowest perplexity the axis is logarithmic."""
MOST_BARS = 60
"""Above this many bars, the clients of a round are one bar."""
LONGEST_LABEL = 3
"""Characters of a client id that fit above its bar; longer ids (Flower's node ids) are numbered instead."""
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def plot_run(summary: RunSummary, path: str | Path) -> None:
    """Write the picture of a run (`run_figure`) as a PNG to `path`."""
    save_figure(run_figure(summary), path)


def run_figure(summary: RunSummary) -> Any:
    """The matplotlib figure of a run: perplexity above, bytes below, over the same axis of rounds."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8.0, 7.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _plot_perplexity(upper, summary)
    _plot_bytes(lower, summary.history)
    lower.set_xlabel("round")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lower.set_xlim(-0.5, max((record.round for record in summary.history), default=0) + 0.5)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    return figure


def _plot_perplexity(axes: Any, summary: RunSummary) -> None:
    central = [(record.round, record.central_perplexity) for record in summary.history]
    federated = [(record.round, record.federated_perplexity) for record in summary.history]
    start = [(0, summary.initial_perplexity)]
    if any(value is not None for _, value in central) or all(value is None for _, value in federated):
        central = start + central
    else:
        federated = start + federated
    drawn: list[float] = []
    for label, points, colour, marker in (
        ("central, server's data", central, BLUE, "o"),
        ("federated, clients' data", federated, VERMILION, "s"),
    ):
        known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        if known:
            xs, ys = zip(*known, strict=True)
            # Values stand in the legend: beside the points, those of two close curves cover each other.
            axes.plot(xs, ys, marker=marker, color=colour, label=f"{label}: {ys[0]:.4g} \u2192 {ys[-1]:.4g}")
            drawn += ys
    if drawn:
        axes.legend(frameon=False)
        if max(drawn) > LOG_SCALE_RATIO * min(drawn):
            _log_scale(axes)
    axes.set_ylabel("perplexity")
    axes.set_title("Perplexity after each round (round 0: before training)", loc="left", fontsize=10)


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
    for x, (up, down, label) in bars.items():
        axes.bar(x, up / scale, width, color=BLUE)
        axes.bar(x, down / scale, width, bottom=up / scale, **DOWN_STYLE)
        top = (x, (up + down) / scale)
        axes.annotate(label, top, xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.bar(0, 0, color=BLUE, label="up, client to server")
    axes.bar(0, 0, label="down, server to client", **DOWN_STYLE)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98), fontsize=9)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"exchanged per round ({unit})")
