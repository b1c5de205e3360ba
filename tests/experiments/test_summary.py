import math
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from hsplit_flwr.experiments.evidence.curves import COLOURS, curve, curves_figure, draw_curves
from hsplit_flwr.experiments.evidence.store import Origin, Store, StoredEvaluation
from hsplit_flwr.experiments.evidence.stored_runs import StoredRun, StoredRuns
from hsplit_flwr.experiments.evidence.summary import (
    best_learning_rates,
    cost_table,
    over_seeds,
    perplexity_table,
    search_table,
    speed_up_table,
    speed_ups_table,
    targets,
    text_table,
    time_table,
)
from hsplit_flwr.experiments.main import main
from hsplit_flwr.experiments.records import Evaluation, RunSpec
from hsplit_flwr.reports.text_intervals import TextIntervals
from hsplit_flwr.reports.text_metrics import TextScores

ORIGIN = Origin("abc", False, {}, "python")
RIVALS = ("splitlora", "hetlora")


def run(
    method: str, perplexities: Sequence[float], *, seed: int = 0, step_s: float = 10.0, **changes: object
) -> StoredRun:
    """A run whose rounds take `step_s` and 3 clients, which send 2 kB and get 1 kB each; one is too large."""
    spec = replace(RunSpec(method, "alike", "iid", seed, 0.003), **changes)  # type: ignore[arg-type]
    evaluations = [
        Evaluation(
            round=number,
            perplexity=perplexity,
            train_loss=None,
            tokens=100 * number,
            virtual_s=step_s * number,
            idle_share=0.25 if number else 0.0,
            bytes_up=6000 * number,
            bytes_down=3000 * number,
            clients=3 if number else 0,
            too_large=1 if number else 0,
            wall_s=0.0,
        )
        for number, perplexity in enumerate(perplexities)
    ]
    return StoredRun(spec, tuple(evaluations))


def rows_of(*runs: StoredRun) -> list[StoredEvaluation]:
    return [StoredEvaluation(run.spec, evaluation, ORIGIN) for run in runs for evaluation in run.evaluations]


def runs_of(*runs: StoredRun) -> StoredRuns:
    return StoredRuns.of(rows_of(*runs), order=("hsplitlora", "splitlora", "hetlora"))


def cells(table: str) -> list[list[str]]:
    """The rows of a Markdown table without its rule."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


# --- runs


def test_rows_in_any_order_make_runs_in_the_given_order() -> None:
    expected = [run("hsplitlora", [9, 3]), run("splitlora", [9, 4]), run("splitlora", [9, 5], seed=1)]
    rows = rows_of(*expected)[::-1]
    assert StoredRuns.of(rows, order=("hsplitlora", "splitlora")).runs == tuple(expected)
    by_method = [found.spec.method for found in StoredRuns.of(rows, order=("splitlora",)).runs]
    assert by_method == ["splitlora", "splitlora", "hsplitlora"]


def test_labels_name_what_varies_within_a_method_and_over_the_store() -> None:
    sweep = runs_of(
        run("splitlora", [9, 4], cut=1, learning_rate=0.01),
        run("splitlora", [9, 4], cut=2, learning_rate=0.01),
        run("hsplitlora", [9, 4], learning_rate=0.003),  # varies between methods: no news
        run("hsplitlora", [9, 4], learning_rate=0.003, rounds=9),
    )
    assert list(sweep.variants()) == ["hsplitlora", "splitlora, cut 1", "splitlora, cut 2"]
    assert list(sweep.scenarios()) == ["alike, iid, rounds 5", "alike, iid, rounds 9"]
    rates = runs_of(run("splitlora", [9], learning_rate=0.01), run("splitlora", [9], learning_rate=0.1))
    assert list(rates.variants()) == ["splitlora, lr 0.01", "splitlora, lr 0.1"]


# --- time to a perplexity


@pytest.mark.parametrize(
    ("perplexity", "seconds"),
    [
        (1000.0, 0.0),  # as it was before training
        (2000.0, 0.0),
        (math.sqrt(1000.0 * 10.0), 5.0),  # half the loss of the first round, in half of its time
        (10.0, 10.0),
        (10 ** (2 / 3), 10.0 + 10.0 / 3),
        (1.0, 20.0),
        (0.99, None),
    ],
)
def test_time_to_a_perplexity_is_linear_in_the_loss(perplexity: float, seconds: float | None) -> None:
    found = run("ours", [1000.0, 10.0, 1.0]).seconds_to(perplexity)
    assert found == (None if seconds is None else pytest.approx(seconds, abs=1e-9))


def test_the_first_crossing_counts_though_the_perplexity_rises_again() -> None:
    assert run("ours", [100.0, 10.0, 50.0, 5.0]).seconds_to(10.0) == pytest.approx(10.0)


def test_after_a_divergence_the_evaluation_itself_counts() -> None:
    assert run("ours", [100.0, math.inf, 10.0]).seconds_to(20.0) == 20.0
    assert run("ours", [100.0, math.nan, 10.0]).seconds_to(20.0) == 20.0
    assert run("ours", [100.0, math.nan]).seconds_to(20.0) is None
    assert run("ours", [100.0, math.nan]).final_perplexity == math.inf


# --- tables


def test_a_cell_is_mean_and_spread_and_says_what_is_missing() -> None:
    assert over_seeds([], 3) == "-"
    assert over_seeds([2.0], 1) == "2.000"
    assert over_seeds([2.0, 4.0, 3.0], 3) == "3.000 (2.000 - 4.000)"
    assert over_seeds([2.0, 4.0], 3) == "3.000 (2.000 - 4.000), 2 of 3"


def test_perplexities_by_method_and_scenario() -> None:
    table = perplexity_table(
        runs_of(
            run("splitlora", [100, 8], seed=0),
            run("splitlora", [100, 6], seed=1),
            run("hsplitlora", [100, 5], seed=0),
            run("hsplitlora", [100, 4], seed=0, partition="dirichlet"),
            run("hetlora", [100, math.nan], seed=0, partition="dirichlet"),
        ),
        markdown=True,
    )
    assert cells(table) == [
        ["method", "alike, dirichlet", "alike, iid"],
        ["hsplitlora", "4.000", "5.000, 1 of 2"],
        ["hetlora", "inf", "-"],
        ["splitlora", "-", "7.000 (6.000 - 8.000)"],
    ]


def test_the_target_is_the_best_rival_of_every_seed() -> None:
    split, het, diverged = run("splitlora", [100, 8]), run("hetlora", [100, 7]), run("hetlora", [100, math.nan], seed=1)
    others = [run("splitlora", [100, 6], seed=2), run("hetlora", [100, math.inf], seed=2)]
    found = targets([split, het, diverged, *others, run("hsplitlora", [100, 1])], RIVALS)
    assert found == {0: het, 2: others[0]}


def speeds() -> StoredRuns:
    return runs_of(
        # The best rival: hetlora at 10 after 20 s and splitlora at 10 after 40 s.
        run("hetlora", [1000, 100, 10], step_s=10.0),
        run("splitlora", [1000, 1000, 20], step_s=20.0),
        run("hetlora", [1000, 100, 30], step_s=10.0, seed=1),
        run("splitlora", [1000, 100, 10], step_s=20.0, seed=1),
        # Reaches 10 after 5 s and after 10 s.
        run("hsplitlora", [1000, 10, 5], step_s=5.0),
        run("hsplitlora", [1000, 10, 7], step_s=10.0, seed=1),
        # Reaches it in one of the two.
        run("without_naa", [1000, 10, 10], step_s=50.0),
        run("without_naa", [1000, 100, 10.5], step_s=50.0, seed=1),
    )


def test_time_to_the_best_rivals_perplexity() -> None:
    assert cells(time_table(speeds(), RIVALS, markdown=True)) == [
        ["virtual s to target", "alike, iid"],
        ["hsplitlora", "7.5 (5.0 - 10.0)"],
        ["splitlora", "40.0, 1 of 2"],
        ["hetlora", "20.0, 1 of 2"],
        ["without_naa", "50.0, 1 of 2"],
    ]
    nobody = time_table(runs_of(run("hsplitlora", [9, 3])), RIVALS, markdown=True)
    assert cells(nobody)[1:] == [["hsplitlora", "-"]]


def test_speed_up_against_the_best_rival_of_each_seed() -> None:
    (header, row) = cells(speed_up_table(speeds(), "hsplitlora", RIVALS, markdown=True))
    assert dict(zip(header, row, strict=True)) == {
        "setting": "alike, iid",
        "ours": "hsplitlora",
        "best rival": "hetlora, splitlora",
        "target": "10.000 (10.000 - 10.000)",
        "final, ours": "6.000 (5.000 - 7.000)",
        "rival's s": "30.0 (20.0 - 40.0)",
        "our s": "7.5 (5.0 - 10.0)",
        "speed-up": "4.00x (4.00x - 4.00x)",
    }
    (header, row) = cells(speed_up_table(speeds(), "without_naa", RIVALS, markdown=True))
    assert row[-2:] == ["50.0, 1 of 2", "0.40x, 1 of 2"]
    never = runs_of(run("hsplitlora", [9, 3]), run("hetlora", [9, 2]))
    assert cells(speed_up_table(never, "hsplitlora", RIVALS, markdown=True))[1][-2:] == ["-", "-"]


def test_speed_up_against_every_rival() -> None:
    """HetLoRA ends at 10 and 30, SplitLoRA at 20 and 10; in between, the loss is linear in time."""
    hetlora = 20 / (10 * math.log(1000 / 30) / math.log(1000 / 10))
    splitlora = 40 / (5 * math.log(1000 / 20) / math.log(1000 / 10))
    table = speed_ups_table(speeds(), "hsplitlora", ["hetlora", "splitlora", "ft"], markdown=True)
    assert cells(table) == [
        ["hsplitlora against", "alike, iid"],
        ["hetlora", f"{(4 + hetlora) / 2:.2f}x ({hetlora:.2f}x - 4.00x)"],
        ["splitlora", f"{(splitlora + 4) / 2:.2f}x (4.00x - {splitlora:.2f}x)"],
        ["ft", "-"],
    ]


def test_costs_are_per_client_and_round() -> None:
    table = cost_table(runs_of(run("hsplitlora", [9, 8, 7]), run("hsplitlora", [9, 8, 7], seed=1)), markdown=True)
    assert cells(table) == [
        ["setting", "method", "up", "down", "s per round", "idle", "too large"],
        ["alike, iid", "hsplitlora", "2.0 kB", "1.0 kB", "10.0", "25 %", "33 %"],
    ]


def test_costs_of_training_without_clients() -> None:
    central = run("cenlora", [9, 8])
    last = replace(central.evaluations[-1], clients=0, bytes_up=0, bytes_down=0, too_large=0)
    table = cost_table(runs_of(StoredRun(central.spec, (central.evaluations[0], last))), markdown=True)
    assert cells(table)[1][2:4] == ["0 B", "0 B"]


def test_text_scores_of_the_runs_that_have_some() -> None:
    scored = run("hsplitlora", [9, 8], seed=0)
    last = replace(scored.evaluations[-1], scores=TextScores(61.5, 7.25, 0.4, 0.6, 2.0))
    runs = runs_of(StoredRun(scored.spec, (scored.evaluations[0], last)), run("splitlora", [9, 8]))
    assert cells(text_table(runs, markdown=True)) == [
        ["setting", "method", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"],
        ["alike, iid", "hsplitlora", "61.500", "7.250", "0.400", "0.600", "2.000"],
    ]
    assert text_table(runs_of(run("splitlora", [9, 8]))) == ""


def test_text_scores_have_the_means_of_their_intervals() -> None:
    runs = []
    for seed, bleu in enumerate((60.0, 62.0)):
        scored = run("hsplitlora", [9, 8], seed=seed)
        scores = TextScores(bleu, 7.25, 0.4, 0.6, 2.0)
        intervals = TextIntervals(replace(scores, bleu=bleu - 10), replace(scores, bleu=bleu + 4))
        last = replace(scored.evaluations[-1], scores=scores, intervals=intervals)
        runs.append(StoredRun(scored.spec, (scored.evaluations[0], last)))
    assert cells(text_table(runs_of(*runs), markdown=True))[1][2] == "61.000 (60.000 - 62.000) [51.000, 65.000]"


def searched() -> StoredRuns:
    found = {0.001: (8.0, 9.0), 0.01: (6.0, 5.0), 0.1: (math.nan, 4.0), 1.0: (3.0,)}
    ours = [
        run("hsplitlora", [100, value], seed=seed, learning_rate=rate)
        for rate, values in found.items()
        for seed, value in enumerate(values)
    ]
    return runs_of(*ours, run("hetlora", [100, 7], learning_rate=0.001), run("hetlora", [100, 8], learning_rate=0.01))


def test_the_best_learning_rate_has_the_lowest_perplexity_over_equal_seeds() -> None:
    # 0.1 diverged for a seed, 1.0 has run for one seed only.
    assert best_learning_rates(searched()) == {"hsplitlora": 0.01, "hetlora": 0.001}


def test_the_search_shows_all_and_warns_at_the_edge() -> None:
    assert cells(search_table(searched(), markdown=True)) == [
        ["setting", "method", "0.001", "0.01", "0.1", "1", "best"],
        [
            "alike, iid",
            "hsplitlora",
            "8.500 (8.000 - 9.000)",
            "5.500 (5.000 - 6.000)",
            "inf (4.000 - inf)",
            "3.000, 1 of 2",
            "0.01",
        ],
        ["alike, iid", "hetlora", "7.000, 1 of 2", "8.000, 1 of 2", "-", "-", "0.001 (edge)"],
    ]


def test_tables_of_an_empty_store_are_headers() -> None:
    empty = StoredRuns.of([])
    tables = [perplexity_table(empty), time_table(empty, RIVALS), cost_table(empty), search_table(empty)]
    assert all(len(table.splitlines()) == 2 for table in tables)


# --- curves


def test_curves_are_means_and_bands_over_seeds() -> None:
    found = curve([run("a", [100, 10, 4]), run("a", [300, 30, 8], seed=1)], "round")
    assert found is not None
    x, mean, low, high = found
    np.testing.assert_allclose(x, [0, 1, 2])
    np.testing.assert_allclose(mean, [200, 20, 6])
    np.testing.assert_allclose(low, [100, 10, 4])
    np.testing.assert_allclose(high, [300, 30, 8])
    later = curve([run("a", [100, 10, 4])], "tokens", first_round=1)
    assert later is not None
    np.testing.assert_allclose(later[0], [100, 200])


def test_seeds_of_unequal_times_are_compared_where_both_have_been() -> None:
    found = curve([run("a", [100, 10], step_s=10.0), run("a", [100, 1], step_s=20.0, seed=1)], "virtual_s")
    assert found is not None
    x, _, low, high = found
    np.testing.assert_allclose(x, [0, 10])
    np.testing.assert_allclose(low, [100, 10])  # 10 s are half of the way from 100 to 1
    np.testing.assert_allclose(high, [100, 10])


def test_a_curve_without_numbers_is_none() -> None:
    assert curve([run("a", [math.nan, math.inf])], "round") is None
    assert curve([], "round") is None


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.axison]


def test_a_panel_per_scenario_a_colour_per_method_and_one_legend() -> None:
    runs = runs_of(
        *(
            run(method, [100, 10 + place, 4], partition=partition, setting=setting)
            for partition in ("iid", "dirichlet")
            for setting in ("alike", "unlike")
            for place, method in enumerate(("hsplitlora", "splitlora"))
        )
    )
    figure = curves_figure(runs, "round")
    titles = [axes.get_title(loc="left") for axes in panels(figure)]
    assert titles == ["alike, dirichlet", "alike, iid", "unlike, dirichlet", "unlike, iid"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hsplitlora", "splitlora"]
    for axes in panels(figure):
        assert [line.get_color() for line in axes.get_lines()] == list(COLOURS[:2])
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel() == "round"


def test_round_0_is_left_out_where_it_would_crush_the_rest() -> None:
    (crushed,) = panels(curves_figure(runs_of(run("a", [1000, 12, 11, 10])), "round"))
    assert list(crushed.get_lines()[0].get_xdata()) == [1, 2, 3]
    (roomy,) = panels(curves_figure(runs_of(run("a", [100, 40, 11, 10])), "round"))
    assert list(roomy.get_lines()[0].get_xdata()) == [0, 1, 2, 3]
    assert roomy.get_ylim()[0] < 10 < 100 < roomy.get_ylim()[1]


def test_a_diverged_run_does_not_crush_the_others() -> None:
    runs = runs_of(run("a", [100, 20, 10]), run("b", [100, 1e6, 1e30]), run("c", [100, 50, math.nan]))
    (axes,) = panels(curves_figure(runs, "round"))
    assert axes.get_ylim()[1] < 150
    assert len(axes.get_lines()) == 3


def test_times_far_apart_are_logarithmic() -> None:
    (near,) = panels(curves_figure(runs_of(run("a", [100, 20]), run("b", [100, 20], step_s=30.0)), "virtual_s"))
    (far,) = panels(curves_figure(runs_of(run("a", [100, 20]), run("b", [100, 20], step_s=300.0)), "virtual_s"))
    assert (near.get_xscale(), far.get_xscale()) == ("linear", "log")


def test_pictures_are_written(tmp_path: Path) -> None:
    rows = rows_of(run("hsplitlora", [100, 20, 10]), run("ft", [100, 30, 12]))
    draw_curves(rows, tmp_path / "new" / "curves.png", x="virtual_s")
    picture = matplotlib.image.imread(tmp_path / "new" / "curves.png")
    assert picture.shape[0] > 300
    assert np.ptp(picture[..., :3]) == 1.0
    draw_curves([], tmp_path / "empty.png", x="round")


# --- the command


@pytest.fixture
def store(tmp_path: Path) -> str:
    store = Store(tmp_path / "results.csv")
    for found in [*speeds().runs, run("hsplitlora", [1000, 10, 9], learning_rate=0.1, seed=0)]:
        store.append(found.spec, found.evaluations)
    return str(store.path)


def test_the_command_prints_the_tables(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", store, "--markdown"]) == 0
    output = capsys.readouterr().out
    headings = [line for line in output.splitlines() if line.startswith("###")]
    assert headings == [
        "### Final perplexity",
        "### hsplitlora against the best rival",
        "### hsplitlora against every rival: how much sooner it is where the rival ends",
        "### hsplitlora against every rival: by how much it ends above (below: -), 95 % interval",
        "### Virtual seconds to the best rival's final perplexity",
        "### Costs",
    ]
    assert main(["table", store, "--ours", "without_naa", "--rivals", "hetlora"]) == 0
    assert "without_naa against the best rival\nsetting " in capsys.readouterr().out


def test_the_command_prints_the_best_learning_rates_as_toml(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", store]) == 0
    toml = capsys.readouterr().out.split("\n\n")[1]
    assert tomllib.loads(toml)["learning_rates"] == {
        "hsplitlora": 0.003,
        "without_naa": 0.003,
        "splitlora": 0.003,
        "hetlora": 0.003,
    }


def test_the_command_draws_the_pictures(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", store, "--output", str(tmp_path / "pictures")]) == 0
    names = ["perplexity_round.png", "perplexity_virtual_s.png", "perplexity_tokens.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "pictures" / name) for name in names]
    assert all((tmp_path / "pictures" / name).stat().st_size > 10_000 for name in names)
    assert main(["plot", store, "--output", store]) == 2
    assert "Expected a folder to write into" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["table", "search"])
def test_a_missing_store_costs_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path / "none.csv")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
