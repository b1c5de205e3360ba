"""Bootstrap intervals of text scores, held to draws that are scored one by one."""

from dataclasses import astuple, fields

import numpy as np
import pytest

from hsplit_flwr.reports.text_intervals import bootstrap, score_with_intervals
from hsplit_flwr.reports.text_metrics import ScoredTexts, TextScores, score_texts

pytest.importorskip("sacrebleu")

TEXTS = [
    "the pub is cheap",
    "an inn by the river",
    "no food at all",
    "the Eagle serves fish",
    "a family friendly place",
]
REFERENCES = [
    ["the pub is not cheap", "a cheap pub"],
    ["an inn near the river", "the inn is by the river"],
    ["there is no food"],
    ["the Eagle serves fine fish", "fish is served at the Eagle"],
    ["it is family friendly"],
]


def test_a_score_of_chosen_texts_is_that_of_these_alone() -> None:
    """All but CIDEr, whose document frequencies stay those of all entries: they would be of a few words by chance."""
    chosen = [3, 0, 3]
    alone = score_texts([TEXTS[i] for i in chosen], [REFERENCES[i] for i in chosen])
    found = ScoredTexts(TEXTS, REFERENCES).scores(chosen)
    for name in ("bleu", "nist", "meteor", "rouge_l"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=1e-12), name
    of_each = [ScoredTexts(TEXTS, REFERENCES).scores([i]).cider for i in chosen]
    assert found.cider == pytest.approx(sum(of_each) / 3, rel=1e-12)


def test_ends_are_percentiles_of_draws_with_replacement() -> None:
    scored = ScoredTexts(TEXTS, REFERENCES)
    found = bootstrap(scored, resamples=80, seed=7)
    draws = np.random.default_rng(7).integers(5, size=(80, 5))
    for place, field in enumerate(fields(TextScores)):
        ordered = sorted(astuple(scored.scores(draw.tolist()))[place] for draw in draws)
        between = ordered[1] + 0.975 * (ordered[2] - ordered[1])  # 0.025 of the way from the first to the 80th
        assert getattr(found.low, field.name) == pytest.approx(between, rel=1e-9), field.name
        assert getattr(found.low, field.name) < getattr(found.high, field.name), field.name


def test_an_interval_holds_its_score_and_repeats_itself() -> None:
    scores, intervals = score_with_intervals(TEXTS, REFERENCES)
    assert scores == score_texts(TEXTS, REFERENCES)
    for low, score, high in zip(astuple(intervals.low), astuple(scores), astuple(intervals.high), strict=True):
        assert low < score < high
    assert score_with_intervals(TEXTS, REFERENCES)[1] == intervals


def test_texts_that_are_alike_have_no_spread() -> None:
    _, intervals = score_with_intervals(["a cheap pub"] * 3, [["a cheap pub by the river"]] * 3)
    for field in ("bleu", "meteor", "rouge_l", "cider"):
        assert getattr(intervals.low, field) == pytest.approx(getattr(intervals.high, field), rel=1e-12)
