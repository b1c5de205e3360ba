"""Which round was the best so far, and whether a run has waited long enough for a better one.

All of it follows from the records of the rounds, so a run that is resumed knows it, too.
"""

from collections.abc import Sequence
from math import isfinite

from hsplit_flwr.common.tables import format_number
from hsplit_flwr.reports.records import BestRound, RoundRecord

CENTRAL, FEDERATED = "the server's held-out data", "the clients' held-out data"
"""what a perplexity of the global model is measured on"""


def best_round(history: Sequence[RoundRecord]) -> BestRound | None:
    """The best of the rounds so far in which somebody trained; None where none of them was scored.

    Central perplexities count where there are any, else federated ones; those that are not finite never do. The model
    before training is no round: where all rounds are worse, the best of them is, too.
    """
    measured_on, scores = _scores(history)
    best: BestRound | None = None
    for record, perplexity in scores:
        if record.clients and isfinite(perplexity) and (best is None or perplexity < best.perplexity):
            best = BestRound(record.round, perplexity, measured_on)
    return best


def why_enough(history: Sequence[RoundRecord], patience: int) -> str:
    """Why no more rounds are played, for people; empty: there is no reason to stop.

    Args:
        history: the rounds so far.
        patience: how many scored rounds in a row may bring no lower perplexity; 0: any number.
    """
    _, scores = _scores(history)
    best = best_round(history)
    since = sum(1 for record, _ in scores if best is None or record.round > best.round)
    if not patience or since < patience:
        return ""
    rounds = "1 round" if since == 1 else f"{since} rounds"
    if best is None:
        return f"patience = {patience}: nothing was learnt that has a finite perplexity in {rounds}"
    return (
        f"patience = {patience}: no lower perplexity on {best.measured_on} in {rounds} than "
        f"{format_number(best.perplexity)} of round {best.round}"
    )


def _scores(history: Sequence[RoundRecord]) -> tuple[str, list[tuple[RoundRecord, float]]]:
    """What the scored rounds were scored on, and their perplexities."""
    central = [(one, one.central_perplexity) for one in history if one.central_perplexity is not None]
    if central:
        return CENTRAL, central
    return FEDERATED, [(one, one.federated_perplexity) for one in history if one.federated_perplexity is not None]
