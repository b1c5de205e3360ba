"""A picture of one round in virtual time: who computes, sends and waits when (a Gantt chart)."""

from pathlib import Path
from typing import Any

from hsplit_flwr.common.figures import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW, new_figure, save_figure
from hsplit_flwr.planning.clock import SERVER, Interval, RoundTimeline, What

COLOURS: dict[What, str] = {
    "download": PURPLE,
    "forward": SKY,
    "send": ORANGE,
    "tail": GREEN,
    "receive": YELLOW,
    "backward": BLUE,
    "upload": VERMILION,
    "aggregate": "black",
    "wait": "0.9",
}
"""colours by kind of interval, in the order of the legend: blues compute on a client, warm ones are transfers"""
LABELS: dict[What, str] = {"tail": "tail (server)", "aggregate": "aggregate (server)"}
BAR_HEIGHT = 0.7
SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def draw_timeline(timeline: RoundTimeline, path: str | Path) -> None:
    """Write `timeline_figure` as a PNG to `path`."""
    save_figure(timeline_figure(timeline), path)


def timeline_figure(timeline: RoundTimeline) -> Any:
    """The matplotlib figure of a round: a row per client, the server's below, and the share of the round each waits."""
    from matplotlib.patches import Patch

    rows = len(timeline.parties)
    figure = new_figure(11.0, 1.7 + 0.42 * rows)
    axes = figure.subplots()
    scale, unit = next((entry for entry in SCALES if timeline.duration_s >= entry[0]), SCALES[-1])
    for row, who in enumerate(timeline.parties):
        _draw_row(axes, row, timeline.of(who), scale)
        if timeline.duration_s:
            waits = f"{timeline.wait_s(who) / timeline.duration_s:.0%}"
            axes.annotate(waits, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.annotate("waits", (1.01, 1.0), xycoords="axes fraction", va="bottom", fontsize=8, color="0.4")
    axes.set_yticks(range(rows), ["server" if who == SERVER else f"client {who}" for who in timeline.parties])
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(timeline.start_s / scale, timeline.end_s / scale or 1.0)
    axes.set_xlabel(f"virtual time ({unit})")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    found = {interval.what for interval in timeline.intervals}
    handles = [Patch(color=colour, label=LABELS.get(what, what)) for what, colour in COLOURS.items() if what in found]
    figure.legend(handles=handles, frameon=False, ncols=len(COLOURS), fontsize=9, loc="outside lower center")
    length = f"{timeline.duration_s / scale:,.4g} {unit}"
    title = f"One round: {length} of virtual time; a client waits {timeline.idle_share:.0%} of it on average"
    axes.set_title(title, loc="left", fontsize=10, pad=10)
    return figure


def _draw_row(axes: Any, row: int, intervals: tuple[Interval, ...], scale: float) -> None:
    for what, colour in COLOURS.items():
        spans = [(i.start_s / scale, i.seconds / scale) for i in intervals if i.what == what]
        axes.broken_barh(spans, (row - BAR_HEIGHT / 2, BAR_HEIGHT), facecolors=colour)
