"""What rivals add to averaged factors: FedEx-LoRA, FFA-LoRA and LoRA-FAIR.

All three hand out averages of A and B (`aggregation.fedavg`), which everybody goes on from, and each mends otherwise
that the product of averages is not the average of products. `methods` says how their texts were read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.experiments.rivals import fair
from hsplit_flwr.lora.aggregation import Term, noise_free
from hsplit_flwr.lora.factors import LoraFactors, product_norm
from hsplit_flwr.lora.segment_adapters import SegmentAdapters


@dataclass(frozen=True)
class Corrected:
    """What becomes of a matrix at the end of a round."""

    start: LoraFactors
    """the adapter that all go on from, scaling 1"""
    residual: LoraFactors | None = None
    """what goes into the frozen weights, scaling 1"""


Correction = Callable[[Sequence[Term], LoraFactors], Corrected]
"""(terms of one matrix, their averaged factors) -> what becomes of it"""


def fedex(terms: Sequence[Term], average: LoraFactors) -> Corrected:
    """FedEx-LoRA: the weights get what the product of the averages lacks of the exact sum, whatever the ranks.

    ``sum p_i c_i B_i A_i - B A = sum p_i (c_i B_i - B) A_i``, since A is ``sum p_i A_i``: of the rank of all clients
    together, as its authors send it, and with nothing to cancel.
    """
    lacking = [
        Term(
            term.weight,
            LoraFactors(pair.A, pair.scaling * pair.B - average.B[:, : pair.rank], 1.0),
        )
        for term in terms
        for pair in [term.factors]
    ]
    return Corrected(average, noise_free(lacking))


def ffa(terms: Sequence[Term], average: LoraFactors) -> Corrected:
    """FFA-LoRA: A is everybody's, and stays, bit for bit; so the mean of B is exact, whatever the ranks.

    Raises:
        AggregationError: the terms have different A, as nobody has who trains B alone.
    """
    A = max((term.factors.A for term in terms), key=len)
    if not all(torch.equal(term.factors.A, A[: term.factors.rank]) for term in terms):
        raise AggregationError(
            "Expected adapters with one frozen A (of a smaller rank: its first rows), found different ones. "
            "Freeze A from a common start."
        )
    return Corrected(LoraFactors(A, average.B, 1.0))


def lora_fair(terms: Sequence[Term], average: LoraFactors) -> Corrected:
    """LoRA-FAIR: with the averaged A, a B whose product points where the exact sum does (`fair`).

    Its authors have B without its scaling c: the penalty is on what the correction is there, ``D / c``, with c the mean
    of the terms' where they differ.
    """
    exact = noise_free(terms)
    cross = exact.B.double() @ (exact.A.double() @ average.A.double().T)
    scaling = sum(t.weight * t.factors.scaling for t in terms) / sum(t.weight for t in terms)
    B = fair.corrected(average.B, average.A, cross, product_norm(exact), fair.STRENGTH / scaling**2)
    return Corrected(LoraFactors(average.A, B.float(), 1.0))


CORRECTIONS: Mapping[str, Correction] = {
    "": lambda terms, average: Corrected(average),
    "fedex": fedex,
    "ffa": ffa,
    "lora_fair": lora_fair,
}
"""by `Method.correction`"""


def correct(
    averages: Mapping[str, LoraFactors], terms: Mapping[str, Sequence[Term]], correction: str
) -> tuple[dict[str, LoraFactors], dict[str, LoraFactors]]:
    """What all go on from, and what the weights get, by module.

    Args:
        averages: of `aggregate`.
        terms: of `terms_by_module`, for the same contributions.
        correction: one of `CORRECTIONS`.

    Raises:
        AggregationError: see `ffa`; the message names the module.
    """
    starts, residuals = {}, {}
    for name, average in averages.items():
        try:
            done = CORRECTIONS[correction](terms[name], average)
        except AggregationError as error:
            raise AggregationError(f"Module {name!r}: {error}") from error
        starts[name] = done.start
        if done.residual:
            residuals[name] = done.residual
    return starts, residuals


def freeze_A(adapters: SegmentAdapters, frozen: bool = True, names: Sequence[str] | None = None) -> None:
    """Train B alone in the modules `names` (default: all), or A again where it is not to be `frozen`."""
    for A in adapters.parameters(names)[::2]:
        A.requires_grad_(not frozen)
