"""The signs of trouble on hand-made runs: each cause fires where it should, and nowhere else."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hsplit_flwr.data.slots import score_slots
from hsplit_flwr.reports.health import aggregation as aggregation_sign
from hsplit_flwr.reports.health import communication as communication_sign
from hsplit_flwr.reports.health import convergence as convergence_sign
from hsplit_flwr.reports.health.causes import early_rise
from hsplit_flwr.reports.health.diagnosis import SIGNS, RunSettings, diagnose
from hsplit_flwr.reports.health.facts import RunFacts
from hsplit_flwr.reports.health.links import link_use
from hsplit_flwr.reports.health.plots import mean_spectrum, plot_spectrum, spectrum_figure
from hsplit_flwr.reports.health.records import AdapterCoverage, AggregationHealth, Finding, MatrixSpectrum, TailSteps
from hsplit_flwr.reports.health.steps import StepNotes
from hsplit_flwr.reports.records import ClientRecord, RoundRecord, RunSummary
from hsplit_flwr.reports.run_tables import health_section, run_report
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.step import StepReport

CLOSE = 1e-9
SETTINGS = RunSettings(TrainingConfig(rounds=6, local_steps=8, schedule="constant", warmup_steps=2), "noise_free", 8)
FLAT = (2.0,) * 8
COVERAGE = AdapterCoverage(bare_share=0.1, head_rank=8.0, tail_rank=8.0, largest_rank=16)
MATRIX = MatrixSpectrum("m", 2.0, (2.0, 1.0, 0.5), 2.4, 12, 2, 8, 0.7)
LOSSES = {"fedavg": 0.9, "zero_pad": 0.8, "svd": 0.1}
HEALTHY = AggregationHealth((MATRIX,), LOSSES, COVERAGE)


def client(
    name: str, compute: float, exchange: float, held: float | None = 0.0, *, up: int = 8_000_000, cut: int = 4
) -> ClientRecord:
    seconds = {"compute": compute, "exchange": exchange}
    return ClientRecord(name, cut, "8", 8.0, 1000, 8, 2.0, up, 2_000_000, seconds, held)


def run(perplexities: Sequence[float | None], **changes: Any) -> list[RoundRecord]:
    """A round per perplexity, healthy but for `changes`."""
    values: dict[str, Any] = {"train_loss": 2.0, "steps": TailSteps(FLAT), "aggregation": HEALTHY}
    values |= {"clients": (client("0", 6.0, 3.0),), **changes}
    return [RoundRecord(i + 1, central_perplexity=value, **values) for i, value in enumerate(perplexities)]


def convergence(history: list[RoundRecord], initial: float | None, settings: RunSettings) -> Finding:
    return convergence_sign.find(RunFacts(history, initial, settings))


def communication(history: list[RoundRecord], training: TrainingConfig) -> Finding:
    return communication_sign.find(RunFacts(history, None, replace(SETTINGS, training=training)))


def aggregation(history: list[RoundRecord], rule: str) -> Finding:
    return aggregation_sign.find(RunFacts(history, None, replace(SETTINGS, rule=rule)))


STALLED = (6.0, 4.0, 4.0, 3.99, 3.98)


def causes(history: list[RoundRecord], settings: RunSettings = SETTINGS) -> str:
    finding = convergence(history, 10.0, settings)
    assert finding.status == "warning"
    assert finding.remedy
    return finding.cause


# --- convergence ---


def test_a_run_that_learns_is_well() -> None:
    finding = convergence(run([6.0, 4.0, 3.0, 2.5]), 10.0, SETTINGS)
    assert (finding.sign, finding.status, finding.cause, finding.remedy) == ("convergence", "ok", "", "")
    assert finding.value == pytest.approx(100 * (1 - 2.5 / 3.0), rel=CLOSE)
    assert finding.measured == "perplexity 10.000 -> 2.500, 17 % lower in the last round"


def test_perplexity_above_its_best_is_a_warning() -> None:
    finding = convergence(run([6.0, 4.0, 4.4]), 10.0, SETTINGS)
    assert finding.status == "warning"
    assert finding.value == pytest.approx(10.0, rel=1e-6)
    assert finding.unit == "% above its best"
    assert convergence(run([6.0, 4.0, 4.07]), 10.0, SETTINGS).status == "ok"
    assert convergence(run([11.0]), 10.0, SETTINGS).status == "warning"


def test_a_stall_takes_three_rounds() -> None:
    assert convergence(run(STALLED), 10.0, SETTINGS).value == pytest.approx(0.5, rel=1e-6)
    assert "over rounds 3-5" in convergence(run(STALLED), 10.0, SETTINGS).measured
    assert convergence(run(STALLED[:4]), 10.0, SETTINGS).status == "ok"
    assert convergence(run([6.0, 4.0, 4.0, 3.99, 3.95]), 10.0, SETTINGS).status == "ok"


def test_the_end_of_a_schedule_is_no_stall() -> None:
    training = TrainingConfig(rounds=40, local_steps=8, schedule="linear", warmup_steps=2)
    curve = [10 - 0.15 * number for number in range(37)] + [4.6, 4.6, 4.6]
    assert convergence(run(curve), 12.0, replace(SETTINGS, training=training)).status == "ok"
    assert convergence(run(curve), 12.0, SETTINGS).status == "warning"


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -1.0])
def test_perplexities_that_are_no_numbers_are_not_measured(bad: float | None) -> None:
    finding = convergence(run([bad, bad]), 10.0, SETTINGS)
    assert (finding.status, finding.value) == ("not measured", None)
    assert convergence(run([6.0, bad, 4.0]), bad, SETTINGS).status == "ok"


FAILED = RoundRecord(1, 10.0, failures=("client 0: prompt of 901 tokens", "client 1: UNAVAILABLE"), steps=TailSteps(()))


def test_a_run_in_which_nobody_trained_is_a_warning_with_the_first_reason() -> None:
    """Every round failed; central evaluation found the same perplexity again and again: that was reported as ok."""
    history = [replace(FAILED, round=number) for number in (1, 2)]
    for initial, after in ((10.0, 10.0), (None, 10.0), (10.0, None), (math.nan, math.nan)):
        finding = convergence([replace(record, central_perplexity=after) for record in history], initial, SETTINGS)
        assert (finding.status, finding.value) == ("warning", 2)
        assert finding.measured == "no client finished in 2 of 2 rounds"
        assert finding.cause == "no client finished in 2 of 2 rounds, the first: client 0: prompt of 901 tokens"
        assert "start again" in finding.remedy


def test_a_round_in_which_nobody_trained_is_a_warning_beside_others_that_gain() -> None:
    history = [
        *run([6.0]),
        replace(FAILED, round=2, central_perplexity=6.0, failures=()),
        replace(run([4.0])[0], round=3),
    ]
    finding = convergence(history, 10.0, SETTINGS)
    assert finding.status == "warning"
    assert finding.measured.startswith("perplexity 10.000 -> 4.000, 33 % lower")
    assert finding.cause == "no client finished in 1 of 3 rounds, the first: no client says why"


def test_a_client_without_a_token_has_not_trained() -> None:
    idle = replace(client("0", 1.0, 1.0), tokens=0, steps=0, loss=None)
    assert convergence(run([10.0], clients=(idle,)), 10.0, SETTINGS).status == "warning"


def test_a_round_under_way_is_not_one_in_which_nobody_trained() -> None:
    finding = convergence([*run([6.0]), RoundRecord(2, drift=0.1, plan_reasons=("first plan",))], 10.0, SETTINGS)
    assert (finding.status, finding.cause) == ("ok", "")
    assert convergence([RoundRecord(1)], 10.0, SETTINGS).status == "not measured"


def test_rounds_without_any_perplexity_are_not_measured() -> None:
    finding = convergence(run([None, None, None]), None, SETTINGS)
    assert (finding.status, finding.value) == ("not measured", None)
    assert "held-out perplexity" in finding.measured


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_diverged_after_it_had_learnt_is_a_warning(bad: float) -> None:
    finding = convergence(run([6.0, 4.0, bad]), 10.0, SETTINGS)
    assert (finding.status, finding.value) == ("warning", 2)
    assert finding.measured == "perplexity 10.000 -> 4.000, not a finite number after round 3"
    assert finding.cause == "the model diverged: loss or perplexity is not a finite number from round 3 on"
    assert "learning-rate" in finding.remedy


def test_a_stall_without_measured_cause_says_so() -> None:
    assert causes(run(STALLED)).startswith("none of those measured")
    assert causes(run(STALLED, steps=None, aggregation=None, train_loss=None)).startswith("none of those measured")


def test_overfitting() -> None:
    history = [replace(r, train_loss=2.0 - 0.1 * r.round) for r in run([6.0, 4.0, 4.2, 4.5])]
    assert causes(history) == "train loss fell from 1.800 to 1.600 meanwhile, held-out loss did not: overfitting"


@pytest.mark.parametrize(
    ("coverage", "why"),
    [
        (replace(COVERAGE, bare_share=0.6), "60 % of the matrices in the heads have no adapter"),
        (replace(COVERAGE, head_rank=3.0), "small ranks (mean of heads 3.0; the largest given is 16)"),
        (replace(COVERAGE, tail_rank=3.5), "small ranks (mean of tail 3.5; the largest given is 16)"),
    ],
)
def test_small_adapters(coverage: AdapterCoverage, why: str) -> None:
    assert causes(run(STALLED, aggregation=replace(HEALTHY, coverage=coverage))) == why


def test_small_cuts_count_where_the_tail_has_small_ranks() -> None:
    small = (client("0", 6.0, 3.0, cut=1), client("1", 6.0, 3.0, cut=2))
    weak_tail = replace(HEALTHY, coverage=replace(COVERAGE, tail_rank=4.0))
    why = causes(run(STALLED, clients=small, aggregation=weak_tail))
    assert why.startswith("cuts are small (mean 1.5 of 8 blocks), so most of the model has the tail's rank 4.0")
    assert causes(run(STALLED, clients=small)).startswith("none")
    assert causes(run(STALLED, aggregation=weak_tail)).startswith("none")


def test_a_round_under_way_takes_no_cause_away() -> None:
    weak_tail = replace(HEALTHY, coverage=replace(COVERAGE, bare_share=0.6, tail_rank=4.0))
    small = (client("0", 6.0, 3.0, cut=1), client("1", 6.0, 3.0, cut=2))
    history = run(STALLED, clients=small, aggregation=weak_tail)
    assert causes([*history, RoundRecord(6)]) == causes(history)
    assert "cuts are small" in causes(history)


def test_the_learning_rate_after_re_initialisation() -> None:
    history = run(STALLED, steps=TailSteps((2.0, 2.3, 2.3, 2.0, 1.9, 1.9, 1.9, 1.9)))
    history[0] = replace(history[0], steps=TailSteps(FLAT))
    why = causes(history)
    assert why.startswith("the learning rate is too high for fresh adapters: train loss rises by 15 %")
    assert "median of 4 rounds" in why
    one_of_four = run(STALLED)
    one_of_four[2] = history[2]
    assert causes(one_of_four).startswith("none")


def test_too_few_steps_of_warm_up() -> None:
    history = run(STALLED)
    history[0] = replace(history[0], steps=TailSteps((4.0, 5.0, 5.0, 4.0, 3.0, 3.0, 3.0, 3.0)))
    assert causes(history) == "train loss rises by 25 % in the first steps of the run, with 2 steps of warm-up"


def test_several_causes_are_all_named() -> None:
    coverage = replace(COVERAGE, bare_share=0.6, tail_rank=1.0)
    finding = convergence(run(STALLED, aggregation=replace(HEALTHY, coverage=coverage)), 10.0, SETTINGS)
    assert finding.cause.count("; ") == 2  # one of them inside of "small ranks (...; ...)"
    assert "tail-rank" in finding.remedy
    assert "deadline-s" in finding.remedy


@pytest.mark.parametrize("losses", [(), (2.0, 3.0, 3.0), (0.0, 1.0, 1.0, 1.0), (2.0, math.nan, 2.0, 2.0)])
def test_an_early_rise_needs_steps_and_numbers(losses: tuple[float, ...]) -> None:
    assert early_rise(RoundRecord(1, steps=TailSteps(losses))) is None
    assert early_rise(RoundRecord(1)) is None


# --- communication ---


def test_waiting_for_the_tail_and_for_others_is_not_the_link() -> None:
    """A computes 1 s and waits 12 s for answers; for 10 of these the tail had its batch, most of them for B's turn."""
    a, b = link_use(run([4.0], clients=(client("A", 1.0, 12.0, 10.0), client("B", 8.0, 5.0, 3.0))))
    assert (a.link_s, b.link_s) == pytest.approx((2.0, 2.0), rel=CLOSE)
    assert a.share == pytest.approx(2 / 13, rel=CLOSE)
    assert a.tail_known
    history = run([4.0], clients=(client("A", 1.0, 12.0, 10.0), client("B", 8.0, 5.0, 3.0)))
    assert communication(history, SETTINGS.training).status == "ok"


def test_parts_that_the_tail_has_while_the_client_computes_are_no_negative_link() -> None:
    (a,) = link_use(run([4.0], clients=(client("A", 9.0, 1.0, 6.0),)))
    assert a.link_s == 0.0


def test_a_slow_link_is_a_warning() -> None:
    history = run([4.0, 3.0], clients=(client("A", 1.0, 9.0, 2.0), client("B", 2.0, 3.0, 1.0)))
    finding = communication(history, SETTINGS.training)
    assert finding.status == "warning"
    assert finding.value == pytest.approx(70.0, rel=CLOSE)
    assert finding.measured == "client A: 70 % of its time on the link (14.0 s for 20.0 MB, compute 2.0 s)"
    assert finding.cause == (
        "1 of 2 clients spend at least half of their time on the link; client A takes 1.2 MB and 0.875 s per step, "
        "10.0 MB per second of compute"
    )
    assert "bf16" in finding.remedy
    half = replace(SETTINGS.training, activation_codec="bf16", gradient_codec="bf16")
    assert "bf16" not in communication(history, half).remedy
    assert "tail-passes" in communication(history, half).remedy


def test_an_unknown_tail_is_said_to_be_in_the_figure() -> None:
    finding = communication(run([4.0], clients=(client("A", 1.0, 9.0, None),)), SETTINGS.training)
    assert finding.measured.startswith("client A: 90 % of its time on the link and waiting for the tail (9.0 s")


def test_seconds_that_are_no_numbers_are_not_measured() -> None:
    bad = (client("A", math.nan, 1.0), client("B", 1.0, math.inf), client("C", 0.0, 0.0), client("D", -1.0, 3.0))
    assert communication(run([4.0], clients=bad), SETTINGS.training).status == "not measured"
    assert communication([], SETTINGS.training).status == "not measured"


# --- aggregation ---


def test_noise_free_says_what_others_would_have_lost() -> None:
    other = replace(HEALTHY, losses={"fedavg": 0.7, "zero_pad": 0.6, "svd": 0.004})
    history = run([6.0, 4.0])
    history[1] = replace(history[1], aggregation=other)
    assert aggregation(history, "norm_clipped").measured.startswith("norm_clipped loses what it clips; ")
    finding = aggregation(history, "noise_free")
    assert (finding.status, finding.value) == ("ok", 0.0)
    assert finding.measured == (
        "noise_free loses nothing; would have lost: fedavg 80 %, zero_pad 70 %, svd 5.2 %; "
        "the smallest rank holds 70 % of its energy"
    )


def test_a_lossy_rule_is_a_warning() -> None:
    finding = aggregation(run([6.0]), "zero_pad")
    assert finding.status == "warning"
    assert finding.value == pytest.approx(80.0, rel=CLOSE)
    assert finding.cause == "zero_pad changes the update of unequal adapters by 80 % of its norm"
    assert finding.remedy == "use aggregation='noise_free'"
    harmless = replace(HEALTHY, losses={**LOSSES, "svd": 0.009})
    assert aggregation(run([6.0], aggregation=harmless), "svd").status == "ok"


def test_rank_collapse_is_a_warning() -> None:
    collapsed = replace(MATRIX, energy_in_smallest=0.99, effective_rank=1.5)
    finding = aggregation(run([6.0], aggregation=replace(HEALTHY, matrices=(collapsed,))), "noise_free")
    assert finding.status == "warning"
    assert finding.value == pytest.approx(99.0, rel=CLOSE)
    assert "effective rank 1.5 of 12" in finding.cause
    equal = replace(collapsed, smallest_rank=8)
    of_equal_ranks = aggregation(run([6.0], aggregation=replace(HEALTHY, matrices=(equal,))), "noise_free")
    assert of_equal_ranks.status == "ok"
    assert "smallest" not in of_equal_ranks.measured


def test_aggregation_without_numbers_is_not_measured() -> None:
    broken = replace(HEALTHY, losses={**LOSSES, "svd": math.nan})
    for none in (None, broken, replace(HEALTHY, matrices=())):
        assert aggregation(run([6.0], aggregation=none), "noise_free").status == "not measured"


# --- the whole report ---


def test_a_run_without_rounds_has_a_finding_for_every_sign() -> None:
    found = diagnose([], None, SETTINGS)
    assert [(f.sign, f.status) for f in found] == [
        ("convergence", "not measured"),
        ("communication", "not measured"),
        ("aggregation", "not measured"),
        ("samples", "not measured"),
    ]


def test_of_a_run_whose_every_round_failed_nothing_is_ok() -> None:
    found = diagnose([replace(FAILED, round=number) for number in (1, 2, 3)], 10.0, SETTINGS)
    assert [f.status for f in found] == ["warning", "not measured", "not measured", "not measured"]


def test_every_sign_is_a_file_of_its_name_and_a_row() -> None:
    for sign, find in SIGNS.items():
        assert find.__module__ == f"hsplit_flwr.reports.health.{sign}"


# --- samples ---

POOR = score_slots(
    [("name[The Fox], food[Thai]", "The Otter serves Thai food."), ("name[The Otter], food[Thai]", "Hi")]
)


def test_texts_that_name_another_restaurant_are_a_warning() -> None:
    """Perplexity fell from 2,111 to 2.8, every sign was ok, and the samples named other restaurants."""
    assert POOR is not None
    found = diagnose(run([6.0, 4.0]), 10.0, SETTINGS, slots={"before": replace(POOR, right=0), "after": POOR})
    assert [f.status for f in found] == ["ok", "ok", "ok", "warning"]
    assert found[3].value == pytest.approx(25.0, rel=CLOSE)
    assert found[3].measured == "25 % of slots right (1 of 4, 2 held-out prompts), before training 0 %"
    assert "most often for name (0 % right)" in found[3].cause
    assert found[3].remedy


def test_true_texts_are_well_and_nothing_after_training_is_not_measured() -> None:
    true = score_slots([("name[The Fox], food[Thai] =>", "The Fox serves Thai food.")])
    assert true is not None
    (*_, found) = diagnose(run([6.0, 4.0]), 10.0, SETTINGS, slots={"after": true})
    assert (found.status, found.measured) == ("ok", "100 % of slots right (2 of 2, 1 held-out prompts)")
    (*_, found) = diagnose(run([6.0, 4.0]), 10.0, SETTINGS, slots={"before": true})
    assert found.status == "not measured"


def test_a_failure_in_the_report_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> Finding:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(communication_sign, "link_use", fails)
    found = diagnose(run([6.0]), 10.0, SETTINGS)
    assert [f.status for f in found] == ["ok", "not measured", "ok", "not measured"]
    assert found[1].measured == "not measured: ZeroDivisionError: division by zero"


def summary(history: list[RoundRecord]) -> RunSummary:
    found = diagnose(history, 10.0, SETTINGS)
    return RunSummary(10.0, tuple(history), 0, {}, None, "flwr run .", 1.0, health=found)


@pytest.mark.parametrize("markdown", [False, True])
def test_the_report_has_remedies_for_warnings_only(markdown: bool) -> None:
    assert "Health" in run_report(summary(run(STALLED)), markdown=markdown)
    section = health_section(summary(run(STALLED)).health, markdown=markdown)
    assert section.count("Remedy: ") == 1
    assert "- convergence: none of those measured" in section
    well = health_section(summary(run([6.0, 4.0])).health, markdown=markdown)
    assert len(well.splitlines()) == 2 + len(SIGNS)
    assert "Remedy" not in well


def test_the_summary_has_findings_and_measurements(tmp_path: Path) -> None:
    summary(run(STALLED)).save(tmp_path / "summary.json")
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [finding["status"] for finding in found["health"]] == ["warning", "ok", "ok", "not measured"]
    assert found["history"][0]["aggregation"] == json.loads(json.dumps(asdict(HEALTHY)))
    assert found["history"][0]["steps"]["losses"] == list(FLAT)


# --- notes and picture ---


def test_steps_are_noted_by_index() -> None:
    passed: list[StepReport] = []
    notes = StepNotes(passed.append)
    reports = [
        StepReport(20, ("a", "b"), 4.0, 30, (0.25, 0.5), 4),
        StepReport(21, ("a",), 3.0, 10, (0.25,), 4),
        StepReport(20, ("c", "d"), 2.0, 10, (1.0, 1.0), 4),
        StepReport(21, ("d",), 1.0, 0, (1.0,), 4),
        StepReport(21, ("b", "e"), 5.0, 30, (2.0, 2.0), 4),
    ]
    for report in reports:
        notes(report)
    assert passed == reports
    found = notes.take()
    assert found.losses == pytest.approx((3.5, 4.5), rel=CLOSE)
    assert notes.take() == TailSteps(())


def test_a_step_is_noted_though_whoever_else_listens_fails() -> None:
    """The tail goes on then, and the round's record must hold the step."""

    def broken(report: StepReport) -> None:
        raise OSError("No space left on device")

    notes = StepNotes(broken)
    with pytest.raises(OSError, match="No space"):
        notes(StepReport(20, ("a",), 4.0, 30, (0.25,), 1))
    assert notes.take().losses == (4.0,)


def test_the_picture_draws_what_was_measured(tmp_path: Path) -> None:
    figure = spectrum_figure(run([6.0, 4.0, 3.0]))
    left, rank, energy = figure.axes
    lines = [line for line in left.lines if len(line.get_xdata()) > 2]
    assert [list(line.get_ydata()) for line in lines] == [pytest.approx([1.0, 0.5, 0.25])] * 3
    assert list(rank.lines[0].get_ydata()) == pytest.approx([2.4] * 3)
    assert list(energy.lines[0].get_ydata()) == pytest.approx([70.0] * 3)
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    rounds = ["round 1", "round 2", "round 3"]
    assert labels == [*rounds, "smallest rank of a client", "rank collapse: 95 % and more"]
    assert not any(axes.get_legend() for axes in figure.axes)
    assert "singular value" in left.get_xlabel()
    assert energy.get_xlabel().startswith("round; line: mean")
    equal = replace(HEALTHY, matrices=(replace(MATRIX, smallest_rank=8),))
    (note,) = spectrum_figure(run([6.0], aggregation=equal)).axes[2].texts[:1]
    assert note.get_text() == "no matrix of unequal ranks"
    plot_spectrum(run([6.0], aggregation=None), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    plot_spectrum(run([6.0]), tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_spectrum_counts_missing_values_as_zero() -> None:
    short = replace(MATRIX, singular_values=(4.0,))
    found = mean_spectrum(replace(HEALTHY, matrices=(MATRIX, short)))
    assert list(found) == pytest.approx([1.0, 0.25, 0.125])
