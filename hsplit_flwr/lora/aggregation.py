"""From trained adapters to one weight update: the noise-free rule, and the rules it is compared with.

The update of the matrix W (d_out, d_in) of a module in block l is, exactly,

    dW = sum over heads i that hold l of  p_i c_i B_i A_i   +   p_tail(l) c_t B_t A_t

with p_i the share of client i in the round's trained tokens (sum 1), c = lora_alpha / r the scaling, and
p_tail(l) the sum of p_i over the clients whose head ends at or before l: the tail trained that block for
them. Ranks may differ at will (HSplitLoRA, arXiv:2505.02795, noise-free adapter aggregation).

A `Rule` turns the terms of one matrix into one pair of factors; `aggregate` applies it to every module.
Whatever the rule, the result is the weight update itself, with all weights and scalings folded in (an
`Increment`). Pure functions on tensors: no model, no PEFT, no Flower.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import TypeAlias, TypeVar

import torch

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.factors import LoraFactors, check_factors, largest_product_norm, product_norm

WEIGHT_TOLERANCE = 1e-6
CLIP_RATIO = 2.0
"""of `norm_clipped`: how far honest updates of one matrix lie apart"""
Client = TypeVar("Client")


@dataclass(frozen=True)
class Contribution:
    """What one client trained in a round: the adapters of its head."""

    weight: float
    """p_i, its share of the round's trained tokens"""
    cut: int
    """s_i: its head holds the blocks 0..cut-1"""
    factors: Mapping[str, LoraFactors]
    """module name -> its adapter; absent where the plan gave rank 0"""
    client: str = ""
    """whose it is, if that is to be found again (`stacked_parts`)"""


@dataclass(frozen=True)
class Term:
    """One summand ``weight * scaling * B @ A`` of a matrix's update."""

    weight: float
    factors: LoraFactors
    client: str = ""
    """who trained it; empty: the tail, or somebody"""


Rule: TypeAlias = Callable[[Sequence[Term]], LoraFactors]
"""Terms of one matrix (at least one, their weights sum to <= 1) -> factors of its update, scaling 1.0.

The weights sum to less than 1 where a client or the tail holds the block but has rank 0 there: its update is
zero, and it keeps its weight. Every rule raises `AggregationError` for terms that do not fit together."""


def aggregate(
    contributions: Sequence[Contribution],
    tail: Mapping[str, LoraFactors],
    block_of: Callable[[str], int],
    rule: Rule | None = None,
) -> dict[str, LoraFactors]:
    """The increment of a round: `rule` (default `noise_free`) on every module that anyone trained.

    Args:
        contributions: the clients that finished the round; their weights sum to 1.
        tail: the tail's adapters, module name -> factors.
        block_of: block index of a whole-model module name.
        rule: one of `RULES`.

    Raises:
        AggregationError: see `terms_by_module` and `Rule`; the message names the module.
    """
    chosen = noise_free if rule is None else rule
    increment = {}
    for name, terms in terms_by_module(contributions, tail, block_of).items():
        try:
            increment[name] = chosen(terms)
        except AggregationError as error:
            raise AggregationError(f"Module {name!r}: {error}") from error
    return increment


def terms_by_module(
    contributions: Sequence[Contribution], tail: Mapping[str, LoraFactors], block_of: Callable[[str], int]
) -> dict[str, list[Term]]:
    """Each trained module's terms: the heads that hold its block with p_i, the tail with p_tail(l).

    Terms of weight or rank 0 are left out: a client without trained tokens, the tail in a block that no
    finished client left to it.

    Raises:
        AggregationError: no contributions, weights that are negative or do not sum to 1 within 1e-6, or a
            client that reports a module beyond its cut.
    """
    _check_shares([c.weight for c in contributions])
    terms: dict[str, list[Term]] = {}
    for contribution in contributions:
        for name, factors in contribution.factors.items():
            if block_of(name) >= contribution.cut:
                raise AggregationError(
                    f"Expected adapters of blocks below the cut {contribution.cut} from a client, found "
                    f"{name!r} in block {block_of(name)}. Aggregate what was trained under the same plan."
                )
            if contribution.weight > 0 and factors.rank > 0:
                terms.setdefault(name, []).append(Term(contribution.weight, factors, contribution.client))
    cuts_and_weights = [(c.cut, c.weight) for c in contributions]
    for name, factors in tail.items():
        weight = tail_weight(cuts_and_weights, block_of(name))
        if weight > 0 and factors.rank > 0:
            terms.setdefault(name, []).append(Term(weight, factors))
    return terms


def tail_weight(cuts_and_weights: Iterable[tuple[int, float]], block: int) -> float:
    """p_tail(block): the summed weight of the clients (cut, weight) whose head ends at or before `block`."""
    return math.fsum(weight for cut, weight in cuts_and_weights if cut <= block)


def token_shares(trained_tokens: Mapping[Client, int]) -> dict[Client, float]:
    """p_i of each client that finished: its trained tokens over those of all that finished (sum 1).

    Raises:
        AggregationError: nobody finished, a negative count, or no tokens at all.
    """
    counts = list(trained_tokens.values())
    total = sum(counts)
    if min(counts, default=0) < 0 or total <= 0:
        raise AggregationError(
            f"Expected token counts >= 0 with a positive sum from the clients that finished, found "
            f"{dict(trained_tokens)}. Skip the aggregation of a round that nobody finished."
        )
    return {client: count / total for client, count in trained_tokens.items()}


def noise_free(terms: Sequence[Term]) -> LoraFactors:
    """The exact sum by stacking: ``B = [p_1 c_1 B_1 | p_2 c_2 B_2 | ...]``, ``A = [A_1; A_2; ...]``."""
    _check_terms(terms)
    first = terms[0].factors
    rank = sum(term.factors.rank for term in terms)
    A = first.A.new_empty(rank, first.A.shape[1])
    B = first.B.new_empty(first.B.shape[0], rank)
    start = 0
    for term in terms:
        stop = start + term.factors.rank
        A[start:stop] = term.factors.A
        # written scaled into its place: no scaled copy of a block, no concatenation
        torch.mul(term.factors.B, term.weight * term.factors.scaling, out=B[:, start:stop])
        start = stop
    return LoraFactors(A=A, B=B, scaling=1.0)


def fedavg(terms: Sequence[Term]) -> LoraFactors:
    """Averages the factors: ``B = sum p_i c_i B_i``, ``A = sum p_i A_i`` (FedIT, arXiv:2305.05644).

    FedIT asks for equal ranks. Here a smaller rank is extended with zero rows and columns, the only way
    unequal ranks average at all; nothing is ever broadcast. Scalings may differ, so each is folded into its
    B. Inexact even for equal ranks: the product of averages is not the average of products.
    """
    _check_terms(terms)
    return _average_factors(terms, [term.weight for term in terms])


def zero_pad(terms: Sequence[Term]) -> LoraFactors:
    """HetLoRA (arXiv:2401.06432): zero-padded factors averaged with sparsity weights.

    A term's weight is its share of the sum of all ``||c_i B_i A_i||_F``. As in the paper the norm *replaces*
    p_i; it is taken per matrix, since each matrix has its own rank. Scalings are folded into B as in
    `fedavg`.
    """
    _check_terms(terms)
    norms = [abs(term.factors.scaling) * product_norm(term.factors) for term in terms]
    total = math.fsum(norms)
    # adapters that did not move give zero, not 0/0
    return _average_factors(terms, [norm / total if total > 0 else 0.0 for norm in norms])


def svd(terms: Sequence[Term]) -> LoraFactors:
    """FlexLoRA (arXiv:2402.11505): the best approximation of the exact sum at the largest rank of the terms.

    The truncated SVD of the dense sum, taken without forming it: QR of both stacked factors, then the SVD of
    the small (R, R) core. The singular values go into B.
    """
    exact = noise_free(terms)
    rank = max(term.factors.rank for term in terms)
    Q_out, R_out = torch.linalg.qr(exact.B)
    Q_in, R_in = torch.linalg.qr(exact.A.T)
    U, S, Vh = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
    return LoraFactors(A=Vh[:rank] @ Q_in.T, B=Q_out @ (U[:, :rank] * S[:rank]), scaling=1.0)


def norm_clipped(terms: Sequence[Term]) -> LoraFactors:
    """The robust rule: `noise_free`, with no term larger than `CLIP_RATIO` times the median ``||c B A||_F``.

    A larger one is scaled down to that, so a minority of poisoned adapters moves a matrix by no more than honest ones
    do. The median is the lower one and does not ask for weights; the tail counts as a term. Ours, after norm clipping
    (Sun et al., arXiv:1911.07963). A trimmed mean or a median by coordinates needs the dense updates: its result is no
    sum of the terms, has no small factors, and could not travel as an increment.
    """
    return noise_free(_clipped(terms))


def _clipped(terms: Sequence[Term]) -> list[Term]:
    """The terms that `norm_clipped` sums."""
    _check_terms(terms)
    norms = [abs(term.factors.scaling) * largest_product_norm(term.factors) for term in terms]
    limit = CLIP_RATIO * median_low(norms)
    return [
        term
        if norm <= limit
        else replace(term, factors=replace(term.factors, scaling=term.factors.scaling * limit / norm))
        for term, norm in zip(terms, norms, strict=True)
    ]


EXACT_RULE = "noise_free"
RULES: Mapping[str, Rule] = {
    EXACT_RULE: noise_free,
    "fedavg": fedavg,
    "zero_pad": zero_pad,
    "svd": svd,
    "norm_clipped": norm_clipped,
}
"""The rules by the names that configurations and benchmarks use."""
STACKING: Mapping[str, Callable[[Sequence[Term]], Sequence[Term]]] = {
    EXACT_RULE: lambda terms: terms,
    "norm_clipped": _clipped,
}
"""rules that add up each adapter as a whole, with what they make of the terms before: these need not start alike"""


@dataclass(frozen=True)
class StackedPart:
    """Columns of a stacked update (rows of its A) that are one client's."""

    client: str
    round_number: int
    """in which it trained them"""
    start: int
    rank: int
    scale: float
    """p_i c_i: its B times this stands in the stack, its A as it is"""


def stacked_parts(
    contributions: Sequence[Contribution],
    tail: Mapping[str, LoraFactors],
    block_of: Callable[[str], int],
    rule: str,
    round_number: int,
) -> dict[str, list[StackedPart]]:
    """Whose is what in `aggregate` of the same arguments; empty for rules that do not stack."""
    if rule not in STACKING:
        return {}
    parts: dict[str, list[StackedPart]] = {}
    for name, terms in terms_by_module(contributions, tail, block_of).items():
        start = 0
        for term in STACKING[rule](terms):
            rank, scale = term.factors.rank, term.weight * term.factors.scaling
            if term.client:
                parts.setdefault(name, []).append(StackedPart(term.client, round_number, start, rank, scale))
            start += rank
    return parts


def _average_factors(terms: Sequence[Term], weights: Sequence[float]) -> LoraFactors:
    first = terms[0].factors
    rank = max(term.factors.rank for term in terms)
    A = first.A.new_zeros(rank, first.A.shape[1])
    B = first.B.new_zeros(first.B.shape[0], rank)
    for term, weight in zip(terms, weights, strict=True):
        A[: term.factors.rank].add_(term.factors.A, alpha=weight)
        B[:, : term.factors.rank].add_(term.factors.B, alpha=weight * term.factors.scaling)
    return LoraFactors(A=A, B=B, scaling=1.0)


def _check_shares(weights: Sequence[float]) -> None:
    if not weights:
        raise AggregationError(
            "Expected the contribution of at least one client, found none. "
            "Skip the aggregation of a round that nobody finished."
        )
    _check_weights(weights)
    total = math.fsum(weights)
    if abs(total - 1.0) > WEIGHT_TOLERANCE:
        raise AggregationError(
            f"Expected client weights that sum to 1 within {WEIGHT_TOLERANCE}, found {total!r}. "
            f"Use token_shares() over the clients that finished."
        )


def _check_weights(weights: Sequence[float]) -> None:
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise AggregationError(f"Expected finite weights >= 0, found {list(weights)}.")


def _check_terms(terms: Sequence[Term]) -> None:
    if not terms:
        raise AggregationError("Expected at least one adapter to aggregate, found none.")
    weights = [term.weight for term in terms]
    _check_weights(weights)
    if math.fsum(weights) > 1.0 + WEIGHT_TOLERANCE:
        raise AggregationError(f"Expected weights of one matrix that sum to at most 1, found {weights}.")
    shape = check_factors(terms[0].factors)
    for term in terms[1:]:
        if (found := check_factors(term.factors)) != shape:
            raise AggregationError(
                f"Expected every adapter of a matrix for the same (d_out, d_in) = {shape}, found {found}. "
                f"Check that all clients and the tail hold the same base model."
            )
