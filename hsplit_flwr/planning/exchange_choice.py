"""Which codec, how many parts, how many tail passes, which updates: what a plan chooses where people say ``auto``.

Every choice is planned and played on the virtual clock. Taken is the mildest one (codecs by their measured cost, then
few parts; exact updates before small ones) that is hardly slower than the fastest to the same progress: a coarser codec
or more parts must be worth it, as they are where a link decides.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.planning.round_plan import Exchange, RoundPlan, progress_per_s
from hsplit_flwr.training.workload import Workload

if TYPE_CHECKING:
    from hsplit_flwr.planning.costs.model_costs import ModelCosts

AUTO = "auto"
"""what people write for a key that the plan chooses"""
CHOICES = ("activation_codec", "gradient_codec", "micro_batches", "tail_passes")
"""fields of `Exchange` that can be chosen; parts in flight go with the parts"""
CODEC_COST: Mapping[str, float] = {"bf16": 0.0, "int8": 0.006}
"""codec -> relative increase of the final perplexity against fp32, mildest first: the largest mean over three seeds of
the six settings in `simulations/evidence/exchange.csv`. int4 is not among them: it cost 0.008 there, but that model's
activations have no outliers, as those of larger ones have"""
MOST_COST = 0.01
"""of a codec that may be chosen"""
PARTS = (1, 2, 4, 8)
PASSES = (4, 3, 2)
"""more than one; simulations/README.md has what four bring"""
WORTH = 0.05
"""by which a coarser codec, more parts, small updates or untrained heads must shorten a round of the same progress,
relative to it"""
IDLE = 0.02
"""by which further passes of the tail may lengthen a round of the same progress: they are for its idle time"""

Make = Callable[["ModelCosts"], RoundPlan]


def choose(costs: "ModelCosts", chosen: Sequence[str], make: Make) -> RoundPlan:
    """The plan of `make` with the best exchange; its `exchange` says which.

    Args:
        costs: under the workload that is stated; what is not `chosen` stays as it is there.
        chosen: some of `CHOICES`.
        make: costs -> the plan under them.

    Raises:
        ConfigError: parts are chosen where each takes an optimizer step; whatever `make` raises.
    """
    load = costs.workload
    if "micro_batches" in chosen and load.micro_steps:
        raise ConfigError(
            "Expected micro-batches as a number where micro-steps = true, found auto: there the number of parts "
            "decides what is trained, not only how long it takes. State it."
        )
    plans = [make(costs.under(candidate)) for candidate in _candidates(load, chosen)]
    if all(plan.left_out for plan in plans):  # one part at a time takes the least memory
        plans += [make(costs.under(candidate)) for candidate in _candidates(load, chosen, overlap=False)]
    best = mildest(plans, WORTH)
    if "tail_passes" not in chosen:
        return best
    within = best.exchange.of(load)
    more = [make(costs.under(replace(within, tail_passes=passes))) for passes in PASSES]
    return mildest([*more, best], IDLE)


def _candidates(load: Workload, chosen: Sequence[str], *, overlap: bool = True) -> Iterator[Workload]:
    """Workloads to plan under, the mildest first, a pass of the tail each; all parts in flight, or one at a time."""
    passes = 1 if "tail_passes" in chosen else load.tail_passes
    mild = [codec for codec, cost in CODEC_COST.items() if cost <= MOST_COST]
    up = mild if "activation_codec" in chosen else [load.activation_codec]
    down = mild if "gradient_codec" in chosen else [load.gradient_codec]
    parts = [(count, count if overlap else 1) for count in PARTS if count <= load.batch_size]
    if "micro_batches" not in chosen:
        parts = [(load.micro_batches, load.micro_batches_in_flight)]
    pairs = zip(mild, mild, strict=True) if up is down else itertools.product(up, down)
    for (activation, gradient), (count, in_flight) in itertools.product(pairs, parts):
        yield replace(
            load,
            activation_codec=activation,
            gradient_codec=gradient,
            micro_batches=count,
            micro_batches_in_flight=in_flight,
            tail_passes=passes,
        )


def choose_update(update: UpdateCoding, largest_rank: int, make: Callable[[UpdateCoding], RoundPlan]) -> RoundPlan:
    """The plan of `make` whose updates go out as `update` says, or small, where that is worth it.

    Small ones are in bf16, of the rank that one client's adapter has at most, and carry what they lack to the next
    round: final perplexities were within 0.1 % (``hsplitlora_all`` and ``hsplitlora_pipelined`` in
    `simulations/evidence/exchange.csv`, means over three seeds).
    """
    small = replace(update, codec="bf16", rank=largest_rank)
    return mildest([replace(make(coding), update=coding) for coding in (update, small)], WORTH)


def mildest(plans: Sequence[RoundPlan], tolerance: float) -> RoundPlan:
    """The first of the plans with most clients that is at most so much slower to the same progress than the fastest."""
    most = max(len(plan.clients) for plan in plans)
    serving = [plan for plan in plans if len(plan.clients) == most]
    fastest = max(map(progress_per_s, serving))
    return next(plan for plan in serving if progress_per_s(plan) * (1 + tolerance) >= fastest)


def describe_update(update: UpdateCoding) -> str:
    """How updates go out, in a few words; empty: as they are."""
    if update.exact:
        return ""
    return f"updates in {update.codec}" + (f" of rank {update.rank}" if update.rank else "")


def describe(exchange: Exchange) -> str:
    """The exchange in a few words."""
    up, down = exchange.activation_codec, exchange.gradient_codec
    words = [up if up == down else f"{up} up and {down} down"]
    if exchange.micro_batches > 1:
        words.append(f"{exchange.micro_batches} parts, {exchange.micro_batches_in_flight} in flight")
    if exchange.tail_passes > 1:
        words.append(f"{exchange.tail_passes} tail passes")
    return ", ".join(words)
