"""Sign: untrue samples. Texts for held-out prompts say other things than their prompts ask for.

Perplexity hides it: most tokens of a sentence are wording, which is learnt first, and few are names and values.
"""

from hsplit_flwr.data.slots import SlotScore
from hsplit_flwr.reports.health.facts import RunFacts
from hsplit_flwr.reports.health.findings import Cause, judged, not_measured, percent
from hsplit_flwr.reports.health.records import Finding

SIGN = "samples"
RIGHT = 0.9
"""Share of slots from which texts are true: people's own sentences get 93 % in E2E NLG by `data.slots`."""


def find(facts: RunFacts) -> Finding:
    """Which share of the slots of held-out prompts the trained model's texts get right."""
    after, before = facts.slots.get("after"), facts.slots.get("before")
    if after is None:
        return not_measured(SIGN, "no texts for meaning representations")
    measured = (
        f"{percent(after.share)} of slots right ({after.right} of {after.total}, {after.prompts} held-out prompts)"
    )
    if before is not None:
        measured += f", before training {percent(before.share)}"
    causes = [] if after.share >= RIGHT else [_untrue(after)]
    return judged(SIGN, 100 * after.share, "% of the slots right", measured, causes)


def _untrue(score: SlotScore) -> Cause:
    slot, share = min(score.right_by_slot.items(), key=lambda entry: entry[1])
    return Cause(
        f"texts read well and say other things than their prompts, most often for {slot} ({percent(share)} right): "
        "wording is learnt before names and values",
        "train longer (rounds, local-steps), or raise ranks, or take a larger base model; take no text for a fact",
    )
