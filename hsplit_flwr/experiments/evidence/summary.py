"""Tables from a results store. A cell over seeds is ``mean (lowest - highest)``, and ``n of m`` if runs are missing.

Pure functions: `StoredRuns` in, text out.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from hsplit_flwr.common.tables import MISSING, format_bytes, format_number, format_seconds, format_table
from hsplit_flwr.experiments.evidence.stored_runs import StoredRun, StoredRuns, by_seed
from hsplit_flwr.experiments.records import Evaluation

Format = Callable[[float], str]
TEXT_SCORES = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
"""field of `TextScores` -> its name"""


def perplexity_table(runs: StoredRuns, *, markdown: bool = False) -> str:
    """Final perplexity: a row per method, a column per scenario."""
    scenarios = runs.scenarios()
    rows = []
    for variant in runs.variants():
        cells = [
            over_seeds(
                [run.final_perplexity for run in of_scenario if runs.variant(run) == variant], seeds(of_scenario)
            )
            for of_scenario in scenarios.values()
        ]
        rows.append([variant, *cells])
    return format_table(["method", *scenarios], rows, markdown, left_aligned=1)


def time_table(runs: StoredRuns, rivals: Collection[str], *, markdown: bool = False) -> str:
    """Virtual seconds until a run reaches the best rival's final perplexity (`targets`), where it ever does."""
    scenarios = runs.scenarios()
    goals = {label: targets(of_scenario, rivals) for label, of_scenario in scenarios.items()}
    rows = []
    for variant in runs.variants():
        cells = []
        for label, of_scenario in scenarios.items():
            mine = [run for run in of_scenario if runs.variant(run) == variant and run.spec.seed in goals[label]]
            reached = [run.seconds_to(goals[label][run.spec.seed].final_perplexity) for run in mine]
            cells.append(over_seeds([s for s in reached if s is not None], len(goals[label]), format_seconds))
        rows.append([variant, *cells])
    return format_table(["virtual s to target", *scenarios], rows, markdown, left_aligned=1)


def speed_up_table(runs: StoredRuns, ours: str, rivals: Collection[str], *, markdown: bool = False) -> str:
    """The method `ours` against the best rival of each scenario and seed: quality, time and their ratio.

    The speed-up of a seed is the best rival's virtual time to its own final perplexity over that of `ours` to the same.
    """
    header = ["setting", "ours", "best rival", "target", "final, ours", "rival's s", "our s", "speed-up"]
    rows = []
    for label, of_scenario in runs.scenarios().items():
        best = targets(of_scenario, rivals)
        contenders = [run for run in of_scenario if run.spec.method == ours and run.spec.seed in best]
        for variant, mine in runs.variants(contenders).items():
            times = _times(mine, best)
            beaten = [best[run.spec.seed] for run in mine]
            count = len(best)
            rows.append(
                [
                    label,
                    variant,
                    ", ".join(dict.fromkeys(runs.variant(rival) for rival in beaten)),
                    over_seeds([rival.final_perplexity for rival in beaten], count),
                    over_seeds([run.final_perplexity for run in mine], count),
                    over_seeds([theirs for theirs, _ in times], count, format_seconds),
                    over_seeds([own for _, own in times if own is not None], count, format_seconds),
                    _speed_up(speed_ups(mine, best), count),
                ]
            )
    return format_table(header, rows, markdown, left_aligned=3)


def speed_ups_table(runs: StoredRuns, ours: str, rivals: Collection[str], *, markdown: bool = False) -> str:
    """How much sooner the method `ours` is where each rival ends: a row per rival, a column per scenario.

    A seed's figure is the rival's virtual time to its final perplexity over that of `ours` to the same.
    """
    scenarios = runs.scenarios()
    rows = []
    for rival in rivals:
        cells = []
        for of_scenario in scenarios.values():
            goals = targets(of_scenario, [rival])
            mine = [run for run in of_scenario if run.spec.method == ours]
            cells.append(_speed_up(speed_ups(mine, goals), len(goals)))
        rows.append([rival, *cells])
    return format_table([f"{ours} against", *scenarios], rows, markdown, left_aligned=1)


def cost_table(runs: StoredRuns, *, markdown: bool = False) -> str:
    """What a method asks of its devices: bytes per client and round, virtual time, waiting, parts that do not fit."""
    header = ["setting", "method", "up", "down", "s per round", "idle", "too large"]
    rows = []
    for label, of_scenario in runs.scenarios().items():
        for variant, mine in runs.variants(of_scenario).items():
            client_rounds = [max(1, sum(e.clients for e in run.evaluations)) for run in mine]
            last = [run.evaluations[-1] for run in mine]
            too_large = [sum(e.too_large for e in run.evaluations) for run in mine]
            rows.append(
                [
                    label,
                    variant,
                    _bytes(mean([e.bytes_up / n for e, n in zip(last, client_rounds, strict=True)])),
                    _bytes(mean([e.bytes_down / n for e, n in zip(last, client_rounds, strict=True)])),
                    format_seconds(mean([e.virtual_s / max(1, e.round) for e in last])),
                    _percent(mean([e.idle_share for e in last])),
                    _percent(mean([large / n for large, n in zip(too_large, client_rounds, strict=True)])),
                ]
            )
    return format_table(header, rows, markdown, left_aligned=2)


def text_table(runs: StoredRuns, *, markdown: bool = False) -> str:
    """The text scores of the final models; empty if no run has any.

    In brackets, where runs have it, the interval over meaning representations: means over the runs of its ends.
    """
    rows = []
    for label, of_scenario in runs.scenarios().items():
        for variant, mine in runs.variants(of_scenario).items():
            last = [run.evaluations[-1] for run in mine if run.evaluations[-1].scores]
            if last:
                rows.append([label, variant, *(_score(last, name, seeds(of_scenario)) for name in TEXT_SCORES)])
    header = ["setting", "method", *TEXT_SCORES.values()]
    return format_table(header, rows, markdown, left_aligned=2) if rows else ""


def _score(last: Sequence[Evaluation], name: str, runs: int) -> str:
    found = over_seeds([getattr(evaluation.scores, name) for evaluation in last], runs)
    known = [evaluation.intervals for evaluation in last if evaluation.intervals]
    if len(known) < len(last):
        return found
    low, high = (mean([getattr(getattr(of_run, end), name) for of_run in known]) for end in ("low", "high"))
    return f"{found} [{format_number(low)}, {format_number(high)}]"


def search_table(runs: StoredRuns, *, markdown: bool = False) -> str:
    """Final perplexity of every method and learning rate, a row per method and scenario, and the best learning rate.

    ``(edge)``: the best one is the lowest or highest that was tried, so that a better one may lie beyond.
    """
    rates = sorted({run.spec.learning_rate for run in runs.runs})
    best = best_learning_rates(runs)
    rows = []
    for label, of_scenario in runs.scenarios().items():
        for method in dict.fromkeys(run.spec.method for run in of_scenario):
            mine = [run for run in of_scenario if run.spec.method == method]
            cells = [
                over_seeds([run.final_perplexity for run in mine if run.spec.learning_rate == rate], seeds(of_scenario))
                for rate in rates
            ]
            tried = {run.spec.learning_rate for run in runs.runs if run.spec.method == method}
            edge = " (edge)" if best[method] in (min(tried), max(tried)) else ""
            rows.append([label, method, *cells, f"{best[method]:g}{edge}"])
    return format_table(["setting", "method", *(f"{rate:g}" for rate in rates), "best"], rows, markdown, left_aligned=2)


def best_learning_rates(runs: StoredRuns) -> dict[str, float]:
    """Method -> the learning rate with the lowest final perplexity: geometric mean over its scenarios and seeds.

    Learning rates with fewer runs than others of the method are not compared: their mean is over other seeds.
    """
    losses: dict[str, dict[float, list[float]]] = {}
    for run in runs.runs:
        of_method = losses.setdefault(run.spec.method, {})
        of_method.setdefault(run.spec.learning_rate, []).append(math.log(run.final_perplexity))
    best = {}
    for method, by_rate in losses.items():
        most = max(len(found) for found in by_rate.values())
        best[method] = min((mean(found), rate) for rate, found in by_rate.items() if len(found) == most)[1]
    return best


def targets(of_scenario: Sequence[StoredRun], rivals: Collection[str]) -> dict[int, StoredRun]:
    """Seed -> the run of a rival with the lowest final perplexity; no entry where every rival diverged or none ran."""
    best = {}
    for seed, runs in by_seed([run for run in of_scenario if run.spec.method in rivals]).items():
        lowest = min(runs, key=lambda run: run.final_perplexity)
        if math.isfinite(lowest.final_perplexity):
            best[seed] = lowest
    return best


def over_seeds(values: Sequence[float], wanted: int, form: Format = format_number) -> str:
    """``mean (lowest - highest)``; one value stands alone, and fewer than `wanted` say so."""
    if not values:
        return MISSING
    spread = f" ({form(min(values))} - {form(max(values))})" if len(values) > 1 else ""
    return f"{form(mean(values))}{spread}" + (f", {len(values)} of {wanted}" if len(values) < wanted else "")


def seeds(runs: Sequence[StoredRun]) -> int:
    """How many seeds the runs have between them."""
    return len({run.spec.seed for run in runs})


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value."""
    return sum(values) / len(values)


def speed_ups(mine: Sequence[StoredRun], goals: Mapping[int, StoredRun]) -> list[float | None]:
    """How many times sooner each run of `mine` is where the rival of its seed in `goals` ends; None: it never is."""
    times = _times([run for run in mine if run.spec.seed in goals], goals)
    return [None if own is None else theirs / own if own else math.inf for theirs, own in times]


def _times(mine: Sequence[StoredRun], goals: Mapping[int, StoredRun]) -> list[tuple[float, float | None]]:
    """Virtual seconds of the rival and of ours to the rival's final perplexity, seed by seed."""
    return [(_own_time(goals[run.spec.seed]), _time_to(run, goals[run.spec.seed])) for run in mine]


def _speed_up(ratios: Sequence[float | None], wanted: int) -> str:
    return over_seeds([ratio for ratio in ratios if ratio is not None], wanted, lambda ratio: f"{ratio:.2f}x")


def _own_time(rival: StoredRun) -> float:
    seconds = _time_to(rival, rival)
    assert seconds is not None  # its last evaluation is its final perplexity
    return seconds


def _time_to(run: StoredRun, target: StoredRun) -> float | None:
    return run.seconds_to(target.final_perplexity)


def _bytes(count: float) -> str:
    return format_bytes(round(count))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
