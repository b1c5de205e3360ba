"""Sign: a communication bottleneck. Clients spend their time on the link, not on computing."""

from hsplit_flwr.common.tables import format_bytes
from hsplit_flwr.reports.health.facts import RunFacts
from hsplit_flwr.reports.health.findings import Cause, judged, not_measured, percent, seconds
from hsplit_flwr.reports.health.links import LinkUse, link_use
from hsplit_flwr.reports.health.records import Finding
from hsplit_flwr.training.config import TrainingConfig

SIGN = "communication"
LINK_SHARE = 0.5
"""From half of a client's time on the link, no faster device makes the round twice as fast; a faster link does."""


def find(facts: RunFacts) -> Finding:
    """Which share of its time the most link-bound client spent on the link."""
    uses = link_use(facts.history)
    if not uses:
        return not_measured(SIGN, "no client reported its seconds")
    worst = max(uses, key=lambda use: use.share)
    what = "on the link" if worst.tail_known else "on the link and waiting for the tail"
    measured = (
        f"client {worst.client}: {percent(worst.share)} of its time {what} ({seconds(worst.link_s)} for "
        f"{format_bytes(worst.bytes)}, compute {seconds(worst.compute_s)})"
    )
    slow = sum(use.share >= LINK_SHARE for use in uses)
    why = f"{slow} of {len(uses)} clients spend at least half of their time on the link; {_rate(worst)}"
    causes = [Cause(why, _link_remedy(facts.settings.training))] if slow else []
    return judged(SIGN, 100 * worst.share, "% of a client's time on the link", measured, causes)


def _rate(use: LinkUse) -> str:
    per_step = f"{format_bytes(round(use.bytes / max(1, use.steps)))} and {seconds(use.link_s / max(1, use.steps))}"
    compute = f", {format_bytes(round(use.bytes / use.compute_s))} per second of compute" if use.compute_s > 0 else ""
    return f"client {use.client} takes {per_step} per step{compute}"


def _link_remedy(training: TrainingConfig) -> str:
    wires = {"activation-codec": training.activation_codec, "gradient-codec": training.gradient_codec}
    whole = " and ".join(key for key, codec in wires.items() if codec == "fp32")
    halve = f"'bf16' as {whole} halves what fp32 sends; " if whole else ""
    return f"{halve}fewer, larger steps save round trips; tail-passes > 1 has the server train meanwhile"
