"""What rivals add to averaged factors, on dense matrices in NumPy and SciPy; unequal ranks, scalings and weights."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.experiments.rivals.corrections import CORRECTIONS, correct, fedex, ffa, lora_fair
from hsplit_flwr.experiments.rivals.fair import STRENGTH, corrected
from hsplit_flwr.lora.aggregation import Contribution, Term, aggregate, fedavg, terms_by_module
from hsplit_flwr.lora.factors import LoraFactors

EXACT = 1e-6
"""relative to the sum of what is summed: float32 factors against a float64 sum"""
SOLVED = 1e-5
"""relative difference of two solvers' B: what is left where both stop"""
D_OUT, D_IN = 12, 20
RANKS, SCALINGS = (8, 4, 4, 2), (2.0, 0.5, 2.0, 16.0)
Array = NDArray[np.float64]


def terms_of(weights: tuple[float, ...], *, ranks: tuple[int, ...] = RANKS, one_A: bool = False) -> list[Term]:
    """Adapters that started alike and moved apart: a common part, and a third of it of one's own."""
    generator = torch.Generator().manual_seed(3)
    common_A, common_B = torch.randn(8, D_IN, generator=generator), torch.randn(D_OUT, 8, generator=generator)
    terms = []
    for weight, rank, scaling in zip(weights, ranks, SCALINGS, strict=True):
        A = common_A[:rank] + (0 if one_A else 0.3) * torch.randn(rank, D_IN, generator=generator)
        B = (common_B[:, :rank] + 0.3 * torch.randn(D_OUT, rank, generator=generator)) / scaling
        terms.append(Term(weight, LoraFactors(A, B, scaling)))
    return terms


WEIGHTS = (0.4, 0.3, 0.2, 0.1)
SOME_LEFT_OUT = (0.4, 0.3, 0.1, 0.05)
"""others hold the block, too, with rank 0"""


def dense(factors: LoraFactors) -> Array:
    product: Array = factors.scaling * (factors.B.double().numpy() @ factors.A.double().numpy())
    return product


def exact_sum(terms: list[Term]) -> Array:
    return sum((term.weight * dense(term.factors) for term in terms), np.zeros((D_OUT, D_IN)))


def size(terms: list[Term]) -> float:
    return float(sum(term.weight * np.linalg.norm(dense(term.factors)) for term in terms))


@pytest.mark.parametrize("weights", [WEIGHTS, SOME_LEFT_OUT])
def test_fedex_average_and_residual_are_the_exact_sum(weights: tuple[float, ...]) -> None:
    terms = terms_of(weights)
    average = fedavg(terms)
    done = fedex(terms, average)
    assert done.start is average
    assert done.residual is not None
    assert done.residual.rank == sum(RANKS)
    assert np.linalg.norm(dense(done.start) + dense(done.residual) - exact_sum(terms)) <= EXACT * size(terms)
    assert np.linalg.norm(dense(done.residual)) > 0.1 * size(terms)


@pytest.mark.parametrize("weights", [WEIGHTS, SOME_LEFT_OUT])
def test_ffa_keeps_a_and_its_mean_of_b_is_exact(weights: tuple[float, ...]) -> None:
    terms = terms_of(weights, one_A=True)
    done = ffa(terms, fedavg(terms))
    assert done.residual is None
    assert torch.equal(done.start.A, terms[0].factors.A)  # the average of equal matrices is not, to the last bit
    assert np.linalg.norm(dense(done.start) - exact_sum(terms)) <= EXACT * size(terms)


def test_ffa_refuses_what_did_not_freeze_a() -> None:
    terms = terms_of(WEIGHTS, one_A=True)
    terms[2].factors.A[0, 0] += 1e-6
    with pytest.raises(AggregationError, match="one frozen A"):
        ffa(terms, fedavg(terms))
    contributions = [Contribution(term.weight, 1, {"h.0.q": term.factors}) for term in terms]
    shares = terms_by_module(contributions, {}, lambda _: 0)
    with pytest.raises(AggregationError, match=r"Module 'h\.0\.q': .*one frozen A"):
        correct(aggregate(contributions, {}, lambda _: 0, fedavg), shares, "ffa")


def fair_objective(B: Array, mean_B: Array, mean_A: Array, exact: Array, strength: float) -> float:
    """As it is written, on the dense product."""
    product = B.reshape(mean_B.shape) @ mean_A
    cosine = (product * exact).sum() / (np.linalg.norm(product) * np.linalg.norm(exact))
    return float(1 - cosine + strength * ((B.reshape(mean_B.shape) - mean_B) ** 2).sum())


def solved(mean_B: Array, mean_A: Array, exact: Array, strength: float) -> Array:
    """By SciPy's BFGS with the gradient of the dense objective, from a start of its own."""

    def gradient(flat: Array) -> Array:
        product = flat.reshape(mean_B.shape) @ mean_A
        length, exact_length = np.linalg.norm(product), np.linalg.norm(exact)
        cosine = (product * exact).sum() / (length * exact_length)
        by_product = cosine * product / length**2 - exact / (length * exact_length)
        whole: Array = (by_product @ mean_A.T + 2 * strength * (flat.reshape(mean_B.shape) - mean_B)).ravel()
        return whole

    start = mean_B + 0.05 * np.random.default_rng(0).standard_normal(mean_B.shape)
    arguments = mean_B, mean_A, exact, strength
    numeric = np.array(
        [
            (
                fair_objective(start.ravel() + step, *arguments) - fair_objective(start.ravel() - step, *arguments)
            ) / 2e-5
            for step in 1e-5 * np.eye(start.size)[:6]
        ]
    )  # fmt: skip
    assert gradient(start.ravel())[:6] == pytest.approx(numeric, abs=1e-8)
    found = minimize(fair_objective, start.ravel(), arguments, jac=lambda B, *_: gradient(B), options={"gtol": 1e-10})
    return np.asarray(found.x).reshape(mean_B.shape)


@pytest.mark.parametrize(("weights", "ranks"), [(WEIGHTS, RANKS), (SOME_LEFT_OUT, RANKS), (WEIGHTS, (8, 8, 8, 8))])
def test_lora_fair_finds_the_b_that_another_solver_finds(weights: tuple[float, ...], ranks: tuple[int, ...]) -> None:
    terms = terms_of(weights, ranks=ranks)
    average = fedavg(terms)
    done = lora_fair(terms, average)
    assert done.residual is None
    assert done.start.A is average.A
    mean_A, mean_B = average.A.double().numpy(), average.B.double().numpy()
    scaling = np.average(SCALINGS, weights=weights)
    expected = solved(mean_B, mean_A, exact_sum(terms), STRENGTH / scaling**2)
    found = done.start.B.double().numpy()
    assert np.linalg.norm(found - expected) <= SOLVED * np.linalg.norm(expected)
    assert np.linalg.norm(found - mean_B) > 0.01 * np.linalg.norm(mean_B)

    def cosine(B: Array) -> float:
        return 1 - fair_objective(B, B, mean_A, exact_sum(terms), 0.0)

    assert cosine(found) > cosine(mean_B)


def test_lora_fair_without_a_penalty_points_along_the_projection_and_with_a_large_one_stays() -> None:
    """The largest cosine is that of the exact sum's projection on the rows of A, which least squares gives."""
    terms = terms_of(WEIGHTS)
    average, exact = fedavg(terms), exact_sum(terms)
    mean_A = average.A.double().numpy()
    cross, length = torch.from_numpy(exact @ mean_A.T), float(np.linalg.norm(exact))
    free = corrected(average.B, average.A, cross, length, strength=0.0).numpy()
    projection = np.linalg.lstsq(mean_A.T, exact.T, rcond=None)[0].T
    direction = free * (np.linalg.norm(projection) / np.linalg.norm(free))
    assert np.linalg.norm(direction - projection) <= SOLVED * np.linalg.norm(projection)
    stays = corrected(average.B, average.A, cross, length, strength=1e6)
    assert float((stays - average.B).norm()) <= SOLVED * float(average.B.norm())


def test_lora_fair_leaves_adapters_that_did_not_move() -> None:
    terms = [Term(0.5, LoraFactors(torch.ones(2, 3), torch.zeros(4, 2), 2.0)) for _ in range(2)]
    start = lora_fair(terms, fedavg(terms)).start
    assert not start.B.any()
    opposite = [Term(0.5, LoraFactors(torch.ones(1, 3), sign * torch.ones(4, 1), 2.0)) for sign in (1.0, -1.0)]
    assert not lora_fair(opposite, fedavg(opposite)).start.B.any()


def test_without_a_correction_the_average_is_carried() -> None:
    terms = terms_of(WEIGHTS)
    average = fedavg(terms)
    assert correct({"m": average}, {"m": terms}, "") == ({"m": average}, {})
    assert set(CORRECTIONS) == {"", "fedex", "ffa", "lora_fair"}
