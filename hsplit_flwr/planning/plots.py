"""Two pictures of a plan: which weights matter and where the clients' cuts lie; how far each budget is used."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hsplit_flwr.common.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_figure, save_figure
from hsplit_flwr.common.tables import client_order, format_bytes, format_seconds
from hsplit_flwr.models.block_layout import block_of
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.round_plan import RoundPlan

MEMORY_COLOURS = {
    "weights": BLUE,
    "adapters": ORANGE,
    "gradients": VERMILION,
    "optimizer": PURPLE,
    "activations": SKY,
    "workspace": GREEN,
    "planner's margin": "0.8",
}
TIME_COLOURS = {"client's compute": BLUE, "transfer": ORANGE, "server's compute": GREY}
LOG_RATIO = 10.0
"""From this ratio of largest to smallest importance the colours are logarithmic."""
COLOUR_TICKS = [step * 10.0**decade for decade in range(-6, 4) for step in (1, 2, 5)]
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
    axes.set_xlabel("block")
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
    """The matplotlib figure of a plan: memory by use as a share of each budget, and where the time of a step goes.

    Args:
        plan: for the planned clients.
        costs: the model that the plan was made for.
        clients: the budgets it was made for.
    """
    ids = _picked(sorted(plan.clients, key=client_order))
    rows = len(ids) + 1
    figure = new_figure(width=11.0, height=1.9 + 0.34 * rows)
    left, right = figure.subplots(1, 2)
    _draw_memory(left, plan, costs, ids)
    _draw_times(right, plan, costs, clients, ids)
    of_all = "" if len(ids) == len(plan.clients) else f", {len(ids)} of {len(plan.clients):,} clients"
    left.set_title(f"Memory, share of the budget{of_all}", loc="left", fontsize=10, pad=36)
    right.set_title("Where the time of one step goes", loc="left", fontsize=10, pad=36)
    for axes in (left, right):
        axes.set_ylim(rows - 0.5, -0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.legend(frameon=False, ncols=4, fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderpad=0)
    return figure


def _picked(ids: list[str]) -> list[str]:
    places = np.linspace(0, len(ids) - 1, min(len(ids), MOST_CLIENTS)).astype(int)
    return [ids[place] for place in places]


def _draw_memory(axes: Any, plan: RoundPlan, costs: ModelCosts, ids: Sequence[str]) -> None:
    heads = [plan.clients[client] for client in ids]
    estimates = [costs.head_memory(head.cut, head.ranks) for head in heads]
    estimates.append(costs.tail_memory([head.cut for head in plan.clients.values()], plan.tail.ranks))
    planned = [*((head.memory_bytes, head.memory_budget_bytes) for head in heads)]
    planned.append((plan.tail.memory_bytes, plan.tail.memory_budget_bytes))
    shares: dict[str, list[float]] = {use: [] for use in MEMORY_COLOURS}
    for estimate, (needed, budget) in zip(estimates, planned, strict=True):
        # The planner counts on bounds that are simpler than the cost model, and never below it.
        parts = {**asdict(estimate), "planner's margin": max(0, needed - estimate.total_bytes)}
        for use in MEMORY_COLOURS:
            shares[use].append(parts[use] / budget)
    totals = [f"{format_bytes(needed)} of {format_bytes(budget)}" for needed, budget in planned]
    _draw_shares(axes, shares, MEMORY_COLOURS, totals)
    axes.set_xlabel("% of the budget")
    names = [*(f"client {head.client}, cut {head.cut}" for head in heads), "server, tail"]
    axes.set_yticks(range(len(names)), names, fontsize=8)


def _draw_times(
    axes: Any, plan: RoundPlan, costs: ModelCosts, clients: Mapping[str, Budget], ids: Sequence[str]
) -> None:
    shares: dict[str, list[float]] = {name: [] for name in TIME_COLOURS}
    totals = []
    for client in ids:
        budget, whole = clients[client], plan.clients[client].step_s
        up, down = costs.step_bytes_up / budget.uplink_bytes_per_s, costs.step_bytes_down / budget.downlink_bytes_per_s
        transfer = up + down + 2 * budget.latency_s
        parts = (whole - transfer - plan.tail.step_s, transfer, plan.tail.step_s)
        for name, part in zip(TIME_COLOURS, parts, strict=True):
            shares[name].append(part / whole)
        totals.append(f"{format_seconds(whole)} s")
    _draw_shares(axes, shares, TIME_COLOURS, totals)
    axes.set_xlabel("% of the step")
    axes.set_yticks([])


def _draw_shares(
    axes: Any, shares: Mapping[str, Sequence[float]], colours: Mapping[str, str], totals: Sequence[str]
) -> None:
    """A stacked bar per row, each row with its total to the right of 100 %."""
    ends = np.zeros(len(totals))
    for name, colour in colours.items():
        percent = 100 * np.array(shares[name])
        axes.barh(range(len(totals)), percent, left=ends, color=colour, label=name, height=0.7)
        ends += percent
    for row, total in enumerate(totals):
        axes.annotate(total, (102, row), va="center", fontsize=8, annotation_clip=False)
    axes.axvline(100, color="black", linewidth=1.5, clip_on=False)
    axes.set_xlim(0, 100)
    axes.tick_params(axis="x", labelsize=8)


def _kind_of(name: str) -> str:
    """A module's name inside its block: ``model.layers.7.mlp.up_proj`` -> ``mlp.up_proj``."""
    return name.split(f".{block_of(name)}.", 1)[1]
