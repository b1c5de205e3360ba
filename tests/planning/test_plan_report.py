import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage

from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts, Workload
from hsplit_flwr.planning.plots import (
    MEMORY_PARTS,
    MOST_CLIENTS,
    TIME_PARTS,
    budget_figure,
    importance_figure,
    plot_budgets,
    plot_importance,
)
from hsplit_flwr.planning.report import HEADER, plan_table
from hsplit_flwr.planning.round_plan import Exchange, PlannedClient, PlannedTail, RoundPlan
from tests.helpers.models import tiny_config

BUDGET = Budget(20_000_000, 1e9, 1e6, 2e6, 0.01)
TAIL_S = 0.25
MARGIN_BYTES = 10_000


def planned(client: str, cut: int, ranks: Mapping[str, int], **changes: Any) -> PlannedClient:
    values = {
        "memory_bytes": 1_500_000,
        "memory_budget_bytes": 2_000_000,
        "step_s": 0.5,
        "round_s": 12.25,
        "limited_by": "memory",
        "value": 1.0,
    }
    return PlannedClient(client=client, cut=cut, ranks=ranks, **{**values, **changes})


def round_plan(clients: list[PlannedClient], left_out: Mapping[str, str] | None = None) -> RoundPlan:
    tail = PlannedTail({"h.1.a": 8, "h.1.b": 8}, 30_000_000, 60_000_000, TAIL_S)
    return RoundPlan(
        clients={c.client: c for c in clients},
        left_out=left_out or {},
        tail=tail,
        value=3.14159,
        round_s=12.25,
        step_s=0.75,
        pace=2.8765,
        exchange=Exchange(activation_codec="int8", micro_batches=4, micro_batches_in_flight=4, tail_passes=2),
    )


PLAN = round_plan(
    [
        planned("10", 2, {"h.0.a": 4, "h.0.b": 4, "h.1.a": 4}, limited_by="deadline", step_s=2.0, round_s=40.0),
        planned("2", 1, {"h.0.a": 0, "h.0.b": 16}),
    ],
    {"7": "needs 2.1 MB for the smallest head, has 1.0 MB", "11": "needs 2.1 MB | has 1.1 MB"},
)


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def test_a_row_per_client_in_the_order_of_the_ids_then_the_tail() -> None:
    lines = plan_table(PLAN).splitlines()
    assert cells(lines[0]) == HEADER
    assert cells(lines[2]) == ["2", "1", "0-16", "1/2", "1.5 MB", "2.0 MB", "75.0", "0.500", "12.2", "memory"]
    assert cells(lines[3]) == ["10", "2", "4", "3/3", "1.5 MB", "2.0 MB", "75.0", "2.0", "40.0", "deadline"]
    assert cells(lines[4]) == ["tail", "-", "8", "2/2", "30.0 MB", "60.0 MB", "50.0", "0.250", "-", "-"]


def test_totals_and_left_out_clients_with_their_reasons() -> None:
    lines = plan_table(PLAN).splitlines()
    assert lines[6] == (
        "2 of 4 clients take part; a round takes 12.2 s, a step 0.750 s; int8 up and fp32 down, 4 parts, 4 in flight, "
        "2 tail passes; 2.88 steps' worth of progress a step"
    )
    assert lines[8:] == [
        "Left out:",
        "  client 7: needs 2.1 MB for the smallest head, has 1.0 MB",
        "  client 11: needs 2.1 MB | has 1.1 MB",
    ]


def test_nobody_left_out_and_nobody_planned() -> None:
    assert "Left out" not in plan_table(round_plan([planned("0", 1, {"h.0.a": 2})]))
    empty = plan_table(round_plan([], {"0": "too small"}))
    assert "0 of 1 clients take part" in empty
    assert "client 0: too small" in empty


def test_markdown_has_one_number_of_cells_and_a_list() -> None:
    text = plan_table(PLAN, markdown=True)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert {line.count("|") for line in table} == {len(HEADER) + 1}
    assert "\n- client 7: needs" in text


# Pictures

KINDS = ("attn.q", "attn.v", "mlp.up")
IMPORTANCE = {f"model.layers.{block}.{kind}": 1.0 + block + n for block in range(4) for n, kind in enumerate(KINDS)}


def image_of(figure: Any) -> AxesImage:
    (image,) = figure.axes[0].images
    assert isinstance(image, AxesImage)
    return image


def texts_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_map_has_a_cell_per_matrix_relative_to_the_mean() -> None:
    figure = importance_figure(IMPORTANCE, {}, "a test")
    axes = figure.axes[0]
    mean = sum(IMPORTANCE.values()) / len(IMPORTANCE)
    expected = [[(1.0 + block + n) / mean for block in range(4)] for n in range(3)]
    np.testing.assert_allclose(np.asarray(image_of(figure).get_array()), expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(KINDS)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert sorted(texts_of(axes)) == sorted(f"{value:.1f}" for row in expected for value in row)
    assert "a test" in axes.get_title(loc="left")


def test_cuts_are_lines_before_the_first_block_that_is_not_held() -> None:
    cuts = {"1": 2, "0": 2, "2": 3} | {str(number): 1 for number in range(10, 16)}
    axes = importance_figure(IMPORTANCE, cuts, "a test").axes[0]
    assert sorted(line.get_xdata()[0] for line in axes.lines) == [0.5, 1.5, 2.5]
    assert "a client holds all blocks to the left of its line" in axes.get_xlabel()
    assert importance_figure(IMPORTANCE, {}, "a test").axes[0].get_xlabel() == "block"
    labels = [text for text in texts_of(axes) if text.startswith("client")]
    assert labels == ["clients 10, 11, 12, ... (6)", "clients 0, 1", "client 2"]


def test_uniform_importance_zeros_and_absent_matrices_are_drawn() -> None:
    uniform = importance_figure(dict.fromkeys(IMPORTANCE, 1.0), {}, "uniform")
    assert set(texts_of(uniform.axes[0])) == {"1.0"}
    uneven = {**IMPORTANCE, "model.layers.0.attn.q": 0.0, "model.layers.3.mlp.up": 500.0}
    del uneven["model.layers.2.attn.v"]
    figure = importance_figure(uneven, {}, "uneven")
    assert isinstance(image_of(figure).norm, LogNorm)
    assert len(texts_of(figure.axes[0])) == len(uneven)
    figure.canvas.draw()
    importance_figure(dict.fromkeys(IMPORTANCE, 0.0), {}, "nothing").canvas.draw()


@pytest.fixture(scope="module")
def costs() -> ModelCosts:
    return ModelCosts(tiny_config("llama", tied=True), Workload(batch_size=2, sequence_length=16, local_steps=3))


def transfer_s(costs: ModelCosts) -> float:
    return costs.step_bytes_up / 1e6 + costs.step_bytes_down / 2e6 + 0.02


def costed_plan(costs: ModelCosts, clients: int) -> tuple[RoundPlan, dict[str, Budget]]:
    heads = []
    for number in range(clients):
        cut = 1 + number % 3
        ranks = {matrix.name: 4 for matrix in costs.matrices if matrix.block < cut}
        memory = costs.head_memory(cut, ranks).total_bytes + MARGIN_BYTES
        seconds = costs.head_flops(cut, ranks) / BUDGET.flops_per_s + transfer_s(costs) + TAIL_S
        parts = {"memory_bytes": memory, "memory_budget_bytes": 2 * memory, "step_s": seconds}
        heads.append(planned(str(number), cut, ranks, **parts))
    tail = {matrix.name: 8 for matrix in costs.matrices if matrix.block > 0}
    held = costs.tail_memory([head.cut for head in heads], tail).total_bytes
    plan = RoundPlan(
        clients={h.client: h for h in heads},
        left_out={},
        tail=PlannedTail(tail, held, 4 * held, TAIL_S),
        value=1.0,
        round_s=1.0,
        step_s=0.1,
        pace=1.0,
        exchange=Exchange(),
    )
    return plan, {head.client: BUDGET for head in heads}


def panels(plan: RoundPlan, costs: ModelCosts, budgets: Mapping[str, Budget]) -> list[Any]:
    """Clients' memory, their times, the server's memory; the legends of memory and time."""
    by_name = {axes.get_label(): axes for axes in budget_figure(plan, costs, budgets).axes}
    return [by_name[name] for name in ("memory", "times", "server", "memory parts", "time parts")]


def bars_by_row(axes: Any) -> list[list[float]]:
    """Widths of the stacked bars of each row, from the left."""
    return [list(row) for row in zip(*([bar.get_width() for bar in part] for part in axes.containers), strict=True)]


def legend_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_memory_bars_are_the_cost_models_parts_as_a_share_of_the_budget(costs: ModelCosts) -> None:
    plan, budgets = costed_plan(costs, 2)
    memory, _, _, parts_legend, _ = panels(plan, costs, budgets)
    estimate = costs.head_memory(2, plan.clients["1"].ranks)
    first, second = bars_by_row(memory)
    budget = plan.clients["1"].memory_budget_bytes
    parts = {**asdict(estimate), "planner's margin": MARGIN_BYTES}
    assert second == pytest.approx([100 * parts[part] / budget for part in MEMORY_PARTS])
    assert (sum(first), sum(second)) == pytest.approx((50, 50), abs=1e-3)
    labels = [label.get_text() for label in memory.get_yticklabels()]
    assert labels == ["client 0, cut 1", "client 1, cut 2"]
    assert all(" of " in text for text in texts_of(memory))
    assert legend_of(parts_legend) == [f"{name}: {part.meaning}" for name, part in MEMORY_PARTS.items()]


def test_the_servers_memory_is_in_bytes_on_a_scale_of_its_own(costs: ModelCosts) -> None:
    """In per cent of 22 GB its bar was a sliver."""
    plan, budgets = costed_plan(costs, 2)
    _, _, server, _, _ = panels(plan, costs, budgets)
    (row,) = bars_by_row(server)
    held = costs.tail_memory([1, 2], plan.tail.ranks)
    assert server.get_xlabel() == "kB"
    assert row == pytest.approx([getattr(held, part, 0) / 1e3 for part in MEMORY_PARTS])
    assert server.get_xlim() == pytest.approx((0, plan.tail.memory_bytes / 1e3))
    assert [label.get_text() for label in server.get_yticklabels()] == ["server, tail"]
    (total,) = texts_of(server)
    assert total.endswith("(25 %)")


def test_time_bars_are_seconds_of_compute_transfer_and_server(costs: ModelCosts) -> None:
    """As shares, a step of 0.275 s and one of 0.007 s looked alike."""
    plan, budgets = costed_plan(costs, 1)
    _, times, _, _, parts_legend = panels(plan, costs, budgets)
    compute = costs.head_flops(1, plan.clients["0"].ranks) / BUDGET.flops_per_s
    seconds = [compute, transfer_s(costs), TAIL_S]
    (row,) = bars_by_row(times)
    assert row == pytest.approx(seconds)
    assert legend_of(parts_legend) == [f"{name}: {part.meaning}" for name, part in TIME_PARTS.items()]
    assert times.get_xlabel() == "seconds"
    share = 100 * TAIL_S / sum(seconds)
    assert texts_of(times) == [f"{sum(seconds):.3f} s, {share:.0f} % server's compute"]


def test_of_many_clients_some_are_drawn_and_it_says_so(costs: ModelCosts) -> None:
    plan, budgets = costed_plan(costs, 100)
    memory = panels(plan, costs, budgets)[0]
    labels = [label.get_text().split(",")[0] for label in memory.get_yticklabels()]
    assert len(labels) == MOST_CLIENTS
    assert (labels[0], labels[-1]) == ("client 0", "client 99")
    assert f"{MOST_CLIENTS} of 100 clients" in memory.get_title(loc="left")


def test_a_plan_of_nobody_is_drawn(costs: ModelCosts) -> None:
    plan, _ = costed_plan(costs, 0)
    budget_figure(plan, costs, {}).canvas.draw()


def test_pictures_are_files(costs: ModelCosts, tmp_path: Path) -> None:
    plan, budgets = costed_plan(costs, 2)
    plot_importance(IMPORTANCE, {"0": 1}, tmp_path / "deep" / "map.png", "a test")
    plot_budgets(plan, costs, budgets, tmp_path / "use.png")
    for path in (tmp_path / "deep" / "map.png", tmp_path / "use.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
