"""Two pictures of a plan: which weights matter and where the clients' cuts lie; how far each budget is used."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hsplit_flwr.common.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    new_figure,
    save_figure,
)
from hsplit_flwr.common.tables import client_order, format_bytes, format_seconds
from hsplit_flwr.models.block_layout import block_of
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.memory import MemoryEstimate
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.round_plan import RoundPlan


class Part(NamedTuple):
    """A part of a stacked bar: its colour, and what it is in plain words."""

    colour: str
    meaning: str


MEMORY_PARTS = {
    "weights": Part(BLUE, "frozen weights: of a client's blocks, or of the whole model on the server"),
    "adapters": Part(ORANGE, "the trained LoRA factors A and B"),
    "gradients": Part(VERMILION, "of the adapters"),
    "optimizer": Part(PURPLE, "AdamW's two moments of every adapter weight"),
    "activations": Part(SKY, "kept from the forward pass for the backward pass"),
    "workspace": Part(GREEN, "alive for a moment of a step: temporaries, messages on their way, gaps in the heap"),
    "cache": Part(YELLOW, "activations that the server keeps from round to round, at most"),
    "planner's margin": Part("0.8", "what the planner reserves beyond these: its bound is coarser, never lower"),
}
MEMORY_COLOURS = {use: part.colour for use, part in MEMORY_PARTS.items()}
TIME_PARTS = {
    "client's compute": Part(BLUE, "forward and backward pass of its own blocks"),
    "transfer": Part(ORANGE, "activations up, their gradient down, latency both ways"),
    "server's compute": Part(GREY, "the other blocks, for all clients of the step"),
}
SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
LOG_RATIO = 10.0
"""From this ratio of largest to smallest importance the colours are logarithmic."""
COLOUR_TICKS = [step * 10.0**decade for decade in range(-6, 4) for step in (1, 2, 5)]
HELD = "   (a client holds all blocks to the left of its line, the server the others)"
MOST_CLIENTS = 30
"""More are not drawn: evenly picked ones stand for them."""


def plot_importance(importance: Mapping[str, float], cuts: Mapping[str, int], path: str | Path, source: str) -> None:
    """Write `importance_figure` as a PNG to `path`."""
    save_figure(importance_figure(importance, cuts, source), path)


def plot_budgets(plan: RoundPlan, costs: ModelCosts, clients: Mapping[str, Budget], path: str | Path) -> None:
    """Write `budget_figure` as a PNG to `path`."""
    save_figure(budget_figure(plan, costs, clients), path)


def importance_figure(importance: Mapping[str, float], cuts: Mapping[str, int], source: str) -> Any:
    """The matplotlib figure of an importance profile: blocks to the right, kinds of matrices downwards.

    Args:
        importance: whole-model module name -> importance (> 0 for the colours' sake; 0 is drawn as the smallest).
        cuts: client -> its cut, drawn as a line left of the first block that the client does not hold.
        source: where the profile comes from, for the title.
    """
    kinds = list(dict.fromkeys(_kind_of(name) for name in importance))
    blocks = 1 + max(block_of(name) for name in importance)
    relative_KL = np.full((len(kinds), blocks), np.nan)
    mean = sum(importance.values()) / len(importance) or 1.0
    for name, value in importance.items():
        relative_KL[kinds.index(_kind_of(name)), block_of(name)] = value / mean
    figure = new_figure(width=3.2 + max(4.0, 0.36 * blocks), height=2.4 + 0.36 * len(kinds))
    axes = figure.subplots()
    image = _draw_map(axes, relative_KL)
    ticks = [tick for tick in COLOUR_TICKS if image.norm.vmin <= tick <= image.norm.vmax]
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12, ticks=ticks, format="%g")
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.set_label("importance / mean", fontsize=8)
    axes.set_xticks(range(blocks))
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel("block" + (HELD if cuts else ""), fontsize=9)
    _draw_cuts(axes, cuts)
    axes.set_title(f"Importance of every matrix (1: the mean); {source}", loc="left", fontsize=10, pad=28)
    return figure


def _draw_map(axes: Any, relative_KL: Any) -> Any:
    """The coloured cells with their numbers."""
    from matplotlib.colors import LogNorm, Normalize

    known = relative_KL[np.isfinite(relative_KL)]
    positive = known[known > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (0.5, 1.0)
    if high == low:
        low, high = 0.5 * low, 1.5 * high
    scale = LogNorm(low, high, clip=True) if high > LOG_RATIO * low else Normalize(low, high, clip=True)
    axes.set_facecolor("0.75")  # a block without such a matrix
    image = axes.imshow(relative_KL, cmap="Blues", norm=scale, aspect="auto")
    for (row, column), value in np.ndenumerate(relative_KL):
        if np.isfinite(value):
            colour = "white" if scale(value) > 0.6 else "black"
            text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
            axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=7)
    return image


def _draw_cuts(axes: Any, cuts: Mapping[str, int]) -> None:
    clients_at: dict[int, list[str]] = {}
    for client in sorted(cuts, key=client_order):
        clients_at.setdefault(cuts[client], []).append(client)
    for level, cut in enumerate(sorted(clients_at)):
        axes.axvline(cut - 0.5, color=VERMILION, linewidth=2.5)
        place = {"xy": (cut - 0.5, 1), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        # Two heights: labels of neighbouring cuts would run into each other.
        style = {"xytext": (0, 3 + 11 * (level % 2)), "ha": "center", "fontsize": 8, "color": VERMILION}
        axes.annotate(_shortened(clients_at[cut]), **place, **style)


def _shortened(clients: Sequence[str]) -> str:
    names = ", ".join(clients) if len(clients) <= 4 else f"{', '.join(clients[:3])}, ... ({len(clients)})"
    return f"client{'s' if len(clients) > 1 else ''} {names}"


def budget_figure(plan: RoundPlan, costs: ModelCosts, clients: Mapping[str, Budget]) -> Any:
    """The matplotlib figure of a plan: each client's memory in its budget, the time of its steps, the server's memory.

    Memory is drawn as a share of each client's budget, time in seconds, and the server's memory, which is of another
    size, in bytes on a scale of its own. The legends say what every part is.

    Args:
        plan: for the planned clients.
        costs: the model that the plan was made for.
        clients: the budgets it was made for.
    """
    ids = _picked(sorted(plan.clients, key=client_order))
    figure = new_figure(width=12.0, height=3.6 + 0.34 * len(ids))
    layout = [["memory", "times"], ["server", "time parts"], ["memory parts", "time parts"]]
    panels: dict[str, Any] = figure.subplot_mosaic(layout, height_ratios=[0.5 + 0.34 * len(ids), 0.45, 1.5])
    _draw_memory(panels["memory"], plan, costs, ids)
    _draw_times(panels["times"], plan, costs, clients, ids)
    _draw_server(panels["server"], plan, costs)
    _explain(panels["memory parts"], MEMORY_PARTS)
    _explain(panels["time parts"], TIME_PARTS)
    of_all = "" if len(ids) == len(plan.clients) else f", {len(ids)} of {len(plan.clients):,} clients"
    panels["memory"].set_title(f"Clients' memory, share of each budget{of_all}", loc="left", fontsize=10)
    panels["times"].set_title("Seconds of one step, each client alone", loc="left", fontsize=10)
    panels["server"].set_title("Server's memory (own scale)", loc="left", fontsize=10)
    return figure


def _picked(ids: list[str]) -> list[str]:
    places = np.linspace(0, len(ids) - 1, min(len(ids), MOST_CLIENTS)).astype(int)
    return [ids[place] for place in places]


def _memory_parts(estimate: MemoryEstimate, needed: int) -> dict[str, int]:
    """Bytes by part, `needed` in all: the planner counts on bounds that are simpler than the cost model's figures."""
    return {**asdict(estimate), "planner's margin": max(0, needed - estimate.total_bytes)}


def _draw_memory(axes: Any, plan: RoundPlan, costs: ModelCosts, ids: Sequence[str]) -> None:
    rows, totals = [], []
    for head in (plan.clients[client] for client in ids):
        needed, budget = head.memory_bytes, head.memory_budget_bytes
        parts = _memory_parts(costs.head_memory(head.cut, head.ranks), needed)
        rows.append({use: 100 * size / budget for use, size in parts.items()})
        totals.append(f"{format_bytes(needed)} of {format_bytes(budget)}")
    _draw_stacks(axes, rows, MEMORY_PARTS, totals)
    axes.axvline(100, color="black", linewidth=1.5, clip_on=False)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the budget", fontsize=9)
    axes.set_yticks(range(len(ids)), [f"client {c}, cut {plan.clients[c].cut}" for c in ids], fontsize=8)


def _draw_times(
    axes: Any, plan: RoundPlan, costs: ModelCosts, clients: Mapping[str, Budget], ids: Sequence[str]
) -> None:
    rows, totals = [], []
    for client in ids:
        budget, whole = clients[client], plan.clients[client].step_s
        up, down = costs.step_bytes_up / budget.uplink_bytes_per_s, costs.step_bytes_down / budget.downlink_bytes_per_s
        transfer = up + down + 2 * budget.latency_s
        parts = (whole - transfer - plan.tail.step_s, transfer, plan.tail.step_s)
        row = dict(zip(TIME_PARTS, parts, strict=True))
        rows.append(row)
        most = max(row, key=lambda name: row[name])
        totals.append(f"{format_seconds(whole)} s, {100 * row[most] / whole:.0f} % {most}")
    _draw_stacks(axes, rows, TIME_PARTS, totals)
    axes.set_xlim(0, max((sum(row.values()) for row in rows), default=1.0))
    axes.set_xlabel("seconds", fontsize=9)
    axes.set_yticks([])


def _draw_server(axes: Any, plan: RoundPlan, costs: ModelCosts) -> None:
    tail = plan.tail
    estimate = costs.tail_memory([head.cut for head in plan.clients.values()], tail.ranks)
    parts = _memory_parts(estimate, tail.memory_bytes)
    size, unit = next(entry for entry in SIZES if tail.memory_bytes >= entry[0] or entry[0] == 1.0)
    share = f"{100 * tail.memory_bytes / tail.memory_budget_bytes:.2g} %"
    total = f"{format_bytes(tail.memory_bytes)} of {format_bytes(tail.memory_budget_bytes)} ({share})"
    _draw_stacks(axes, [{use: part / size for use, part in parts.items()}], MEMORY_PARTS, [total])
    axes.set_xlim(0, sum(parts.values()) / size)
    axes.set_xlabel(unit, fontsize=9)
    axes.set_yticks([0], ["server, tail"], fontsize=8)


def _draw_stacks(
    axes: Any, rows: Sequence[Mapping[str, float]], parts: Mapping[str, Part], totals: Sequence[str]
) -> None:
    """A stacked bar per row, each with its total in words to the right of the panel."""
    ends = np.zeros(len(rows))
    for name, part in parts.items():
        widths = np.array([row[name] for row in rows])
        axes.barh(range(len(rows)), widths, left=ends, color=part.colour, label=name, height=0.7)
        ends += widths
    right = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8, "annotation_clip": False}
    for row, total in enumerate(totals):
        axes.annotate(total, (1.02, row), **right)
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def _explain(axes: Any, parts: Mapping[str, Part]) -> None:
    """A legend with a line for every part."""
    from matplotlib.patches import Patch

    handles = [Patch(color=part.colour, label=f"{name}: {part.meaning}") for name, part in parts.items()]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", borderpad=0, borderaxespad=0)
    axes.set_axis_off()


def _kind_of(name: str) -> str:
    """A module's name inside its block: ``model.layers.7.mlp.up_proj`` -> ``mlp.up_proj``."""
    return name.split(f".{block_of(name)}.", 1)[1]
