"""The best round, and when a run has waited long enough for a better one."""

from dataclasses import replace

import pytest

from hsplit_flwr.reports.best_round import CENTRAL, FEDERATED, best_round, why_enough
from hsplit_flwr.reports.records import BestRound, RoundRecord
from tests.reports.examples import client


def rounds(*perplexities: float | None, central: bool = True) -> list[RoundRecord]:
    trained = (client(0, 1),)
    if central:
        return [RoundRecord(i, central_perplexity=one, clients=trained) for i, one in enumerate(perplexities, 1)]
    return [RoundRecord(i, federated_perplexity=one, clients=trained) for i, one in enumerate(perplexities, 1)]


@pytest.mark.parametrize(
    ("perplexities", "best"),
    [
        ([], None),
        ([None, None], None),
        ([9.0], 1),
        ([9.0, 8.0, 8.0, 8.5], 2),
        ([9.0, None, 7.0], 3),
        ([float("nan"), 9.0, float("inf"), float("nan")], 2),
        ([float("nan")], None),
    ],
)
def test_the_best_round_is_the_first_with_the_lowest_perplexity(
    perplexities: list[float | None], best: int | None
) -> None:
    found = best_round(rounds(*perplexities))
    assert found == (BestRound(best, perplexities[best - 1] or 0, CENTRAL) if best else None)


def test_what_it_is_measured_on_is_the_same_in_all_rounds() -> None:
    assert best_round(rounds(5.0, 4.0, central=False)) == BestRound(2, 4.0, FEDERATED)
    mixed = [replace(one, federated_perplexity=1.0) for one in rounds(9.0, None, 8.0)]
    assert best_round(mixed) == BestRound(3, 8.0, CENTRAL)


def test_a_round_in_which_nobody_trained_is_no_result() -> None:
    idle = [replace(one, clients=()) for one in rounds(3.0)]
    assert best_round(idle) is None
    assert best_round([*idle, *rounds(None, 4.0)[1:]]) == BestRound(2, 4.0, CENTRAL)


@pytest.mark.parametrize(
    ("perplexities", "patience", "ends"),
    [
        ([9.0, 8.0, 8.0, 8.5], 0, False),
        ([9.0, 8.0, 8.0, 8.5], 3, False),
        ([9.0, 8.0, 8.0, 8.5], 2, True),
        ([9.0, 8.0, None, None, None], 1, False),
        ([9.0, 8.0, None, 8.1], 1, True),
        ([9.0, 8.0, 8.1, 7.9], 1, False),
        ([9.0, float("nan"), float("nan")], 2, True),
        ([float("nan"), float("nan")], 2, True),
        ([], 1, False),
    ],
)
def test_only_scored_rounds_use_patience_up(perplexities: list[float | None], patience: int, ends: bool) -> None:
    assert bool(why_enough(rounds(*perplexities), patience)) is ends


def test_the_reason_says_what_was_waited_for() -> None:
    assert why_enough(rounds(9.0, 8.0, 8.0, 8.5), 2) == (
        "patience = 2: no lower perplexity on the server's held-out data in 2 rounds than 8.000 of round 2"
    )
    assert why_enough(rounds(float("nan")), 1) == (
        "patience = 1: nothing was learnt that has a finite perplexity in 1 round"
    )
