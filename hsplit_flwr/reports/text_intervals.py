"""How far text scores could be others with other meaning representations: bootstrap intervals (Efron, 1979)."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from hsplit_flwr.reports.text_metrics import ScoredTexts, TextScores

RESAMPLES = 1000
COVERAGE = 0.95


@dataclass(frozen=True)
class TextIntervals:
    """Ends of a percentile interval of every score."""

    low: TextScores
    high: TextScores


def bootstrap(texts: ScoredTexts, *, resamples: int = RESAMPLES, seed: int = 0) -> TextIntervals:
    """95 % intervals of the scores of ``texts``: as many of them are drawn with replacement, ``resamples`` times.

    Equal seeds draw the same texts, so that intervals of two models on the same entries are comparable.
    """
    draws = np.random.default_rng(seed).integers(len(texts), size=(resamples, len(texts)))
    scores_RM = np.array([astuple(texts.scores(chosen)) for chosen in draws.tolist()])
    tail = (1 - COVERAGE) / 2
    low_M, high_M = np.quantile(scores_RM, [tail, 1 - tail], axis=0).tolist()
    return TextIntervals(TextScores(*low_M), TextScores(*high_M))


def score_with_intervals(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[TextScores, TextIntervals]:
    """`score_texts` with its arguments and errors, and an interval of each score."""
    scored = ScoredTexts(texts, references)
    return scored.scores(range(len(scored))), bootstrap(scored)
