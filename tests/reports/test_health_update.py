"""What is measured of a round's aggregation, against dense float64 NumPy."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hsplit_flwr.lora.aggregation import RULES, Contribution, Term, noise_free
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.reports.health import aggregation as aggregation_health
from hsplit_flwr.reports.health.aggregation import (
    MATRICES,
    adapter_coverage,
    chosen_matrices,
    measure_aggregation,
)
from hsplit_flwr.reports.health.records import AggregationHealth
from hsplit_flwr.reports.health.spectrum import KEPT_VALUES, difference_norm, singular_values, update_spectrum

EXACT = 1e-5
"""relative, float32 factors against float64"""
SHAPES = {"wide": (24, 300), "tall": (300, 24), "large": (200, 220)}
"""the first two make a dense product cheaper, the last one Gram matrices"""
RANKS = [8, 4, 4, 2, 1]
Array = NDArray[np.float64]


def random_factors(rank: int, seed: int, shape: tuple[int, int] = (24, 40), scaling: float = 2.0) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = shape
    A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    return LoraFactors(A, B, scaling)


def unequal_terms(shape: tuple[int, int]) -> list[Term]:
    weights = [0.1, 0.15, 0.2, 0.25, 0.3]
    return [
        Term(weight, random_factors(rank, seed, shape, scaling=[2.0, 0.5, 4.0, 2.0, 1.0][seed]))
        for seed, (weight, rank) in enumerate(zip(weights, RANKS, strict=True))
    ]


def dense(factors: LoraFactors) -> Array:
    product: Array = factors.scaling * (factors.B.double().numpy() @ factors.A.double().numpy())
    return product


def dense_sum(terms: list[Term]) -> Array:
    total: Array = np.sum([term.weight * dense(term.factors) for term in terms], axis=0)
    return total


def block_of(name: str) -> int:
    return int(name.split(".")[1])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", ["fedavg", "zero_pad", "svd"])
def test_the_difference_equals_the_dense_one(shape: tuple[int, int], rule: str) -> None:
    terms = unequal_terms(shape)
    found = difference_norm(RULES[rule](terms), noise_free(terms))
    expected = np.linalg.norm(dense(RULES[rule](terms)) - dense_sum(terms))
    assert expected > 0.01 * np.linalg.norm(dense_sum(terms))  # a lossy rule does lose
    assert found == pytest.approx(expected, rel=EXACT)


def test_both_ways_to_the_difference_are_tested() -> None:
    cheaper_dense = [d_out * d_in <= (d_out + d_in) * (sum(RANKS) + max(RANKS)) for d_out, d_in in SHAPES.values()]
    assert cheaper_dense == [True, True, False]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_spectrum_equals_the_dense_one(shape: tuple[int, int]) -> None:
    terms = unequal_terms(shape)
    spectrum = update_spectrum("m", terms, noise_free(terms))
    assert spectrum is not None
    values = np.linalg.svd(dense_sum(terms), compute_uv=False)[: sum(RANKS)]
    shares = values**2 / np.sum(values**2)
    assert spectrum.norm == pytest.approx(np.linalg.norm(dense_sum(terms)), rel=EXACT)
    np.testing.assert_allclose(spectrum.singular_values, values[:KEPT_VALUES], rtol=EXACT, atol=EXACT * values[0])
    assert spectrum.effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=EXACT)
    assert (spectrum.smallest_rank, spectrum.largest_rank, spectrum.stacked_rank) == (1, 8, 19)
    assert spectrum.energy_in_smallest == pytest.approx(shares[0], rel=EXACT)


def test_effective_rank_counts_equal_directions() -> None:
    orthogonal, _ = torch.linalg.qr(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)))
    terms = [Term(1.0, LoraFactors(orthogonal.T.contiguous(), orthogonal, 3.0))]
    spectrum = update_spectrum("m", terms, noise_free(terms))
    assert spectrum is not None
    assert spectrum.effective_rank == pytest.approx(5.0, rel=EXACT)
    assert spectrum.singular_values == pytest.approx([3.0] * 5, rel=EXACT)


def test_a_collapsed_update_is_seen() -> None:
    """A client of rank 8 whose further directions are a thousandth of those of the client of rank 2."""
    strong, weak = random_factors(2, 0), random_factors(8, 1)
    terms = [Term(0.5, strong), Term(0.5, LoraFactors(weak.A, 1e-3 * weak.B, 2.0))]
    spectrum = update_spectrum("m", terms, noise_free(terms))
    assert spectrum is not None
    assert spectrum.energy_in_smallest > 0.999
    assert spectrum.effective_rank < 2.01


def test_more_singular_values_than_kept_still_count() -> None:
    terms = [Term(0.5, random_factors(KEPT_VALUES, seed, (90, 100))) for seed in range(2)]
    spectrum = update_spectrum("m", terms, noise_free(terms))
    assert spectrum is not None
    assert len(spectrum.singular_values) == KEPT_VALUES
    values = np.linalg.svd(dense_sum(terms), compute_uv=False)[: 2 * KEPT_VALUES]
    shares = values**2 / np.sum(values**2)
    assert spectrum.effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=EXACT)


def test_an_update_of_nothing_has_no_spectrum() -> None:
    nothing = [Term(1.0, LoraFactors(torch.ones(2, 5), torch.zeros(4, 2), 1.0))]
    assert update_spectrum("m", nothing, noise_free(nothing)) is None
    assert singular_values(LoraFactors(torch.zeros(0, 5), torch.zeros(4, 0), 1.0)).tolist() == []


# --- a round ---

MODULES = [f"h.{block}.{leaf}" for block in range(4) for leaf in ("a", "b", "c")]


def a_round() -> tuple[list[Contribution], dict[str, LoraFactors]]:
    heads = [(0.25, 1, 2), (0.25, 2, 4), (0.5, 3, 8)]
    contributions = [
        Contribution(
            weight,
            cut,
            {name: random_factors(rank, 100 * cut + i) for i, name in enumerate(MODULES) if block_of(name) < cut},
        )
        for weight, cut, rank in heads
    ]
    tail = {name: random_factors(3, 1000 + i) for i, name in enumerate(MODULES) if block_of(name) >= 1}
    return contributions, tail


def exact_update(contributions: list[Contribution], tail: dict[str, LoraFactors], name: str) -> Array:
    update: Array = sum((c.weight * dense(c.factors[name]) for c in contributions if name in c.factors), np.zeros(1))
    left = sum(c.weight for c in contributions if c.cut <= block_of(name))
    return update + left * dense(tail[name]) if left else update


def test_a_round_over_its_most_important_matrices() -> None:
    contributions, tail = a_round()
    important = ["h.0.b", "h.1.c", "h.2.a", "h.2.b"]
    profile = {name: 1.0 if name in important else 0.1 for name in MODULES} | {"h.3.a": 9.0}  # the tail's alone
    health = measure_aggregation(contributions, tail, MODULES, block_of, profile)
    assert health is not None
    assert [matrix.name for matrix in health.matrices] == important
    exact = {name: exact_update(contributions, tail, name) for name in important}
    norms = {name: np.linalg.norm(update) for name, update in exact.items()}
    assert [matrix.norm for matrix in health.matrices] == pytest.approx(list(norms.values()), rel=EXACT)
    assert [matrix.smallest_rank for matrix in health.matrices] == [2, 3, 3, 3]
    assert health.losses.keys() == {"fedavg", "zero_pad", "svd"}
    # FlexLoRA's loss is what lies beyond the largest rank of each matrix, by Eckart and Young
    beyond = [np.linalg.svd(exact[m.name], compute_uv=False)[m.largest_rank :] for m in health.matrices]
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    assert health.losses["svd"] == pytest.approx(math.sqrt(sum(np.sum(v**2) for v in beyond)) / total, rel=EXACT)
    assert health.losses["svd"] < health.losses["fedavg"]


def test_equal_adapters_lose_nothing() -> None:
    same = random_factors(4, 0)
    contributions = [Contribution(0.5, 1, {"h.0.a": same}), Contribution(0.5, 1, {"h.0.a": same})]
    health = measure_aggregation(contributions, {}, ["h.0.a"], block_of, {})
    assert health is not None
    assert max(health.losses.values()) < EXACT


def test_the_cover_of_a_round_counts_matrices_without_adapter() -> None:
    contributions, tail = a_round()
    pruned = {name: factors for name, factors in contributions[2].factors.items() if name.endswith("a")}
    contributions[2] = Contribution(0.5, 3, pruned)
    del tail["h.3.c"]
    cover = adapter_coverage(contributions, tail, MODULES, block_of)
    assert cover.bare_share == pytest.approx(6 / 18)
    assert cover.head_rank == pytest.approx((3 * 2 + 6 * 4 + 3 * 8) / 18)
    assert cover.tail_rank == pytest.approx(8 * 3 / 9)  # blocks 1 to 3
    assert cover.largest_rank == 8


def test_matrices_of_one_adapter_are_measured_only_if_there_are_no_others() -> None:
    one, two = [Term(1.0, random_factors(2, 0))], [Term(0.5, random_factors(2, seed)) for seed in range(2)]
    assert chosen_matrices({"h.0.a": one, "h.0.b": two}, {"h.0.a": 1.0}) == ["h.0.b"]
    alone = dict.fromkeys(MODULES, one)
    assert chosen_matrices(alone, {name: float(i) for i, name in enumerate(MODULES)}) == MODULES[-MATRICES:]


def test_what_cannot_be_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    contributions, tail = a_round()
    zero = [Contribution(1.0, 1, {"h.0.a": LoraFactors(torch.ones(2, 5), torch.zeros(4, 2), 1.0)})]
    assert measure_aggregation(zero, {}, MODULES, block_of, {}) is None
    huge = random_factors(2, 0)
    bad = [Contribution(1.0, 1, {"h.0.a": LoraFactors(huge.A, math.nan * huge.B, 1.0)})]
    assert measure_aggregation(bad, {}, MODULES, block_of, {}) is None
    assert measure_aggregation([], {}, MODULES, block_of, {}) is None

    def fails(*arguments: object) -> AggregationHealth:
        raise RuntimeError("LAPACK")

    monkeypatch.setattr(aggregation_health, "update_spectrum", fails)
    assert measure_aggregation(contributions, tail, MODULES, block_of, {}) is None
