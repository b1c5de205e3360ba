import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.aggregation import (
    CLIP_RATIO,
    RULES,
    Contribution,
    Rule,
    Term,
    aggregate,
    fedavg,
    noise_free,
    norm_clipped,
    svd,
    tail_weight,
    terms_by_module,
    token_shares,
    zero_pad,
)
from hsplit_flwr.lora.factors import LoraFactors

EXACT = 1e-6  # relative, float32 factors against a float64 sum
D_OUT, D_IN = 24, 40
RANKS = [8, 4, 4, 2, 1]

Array = NDArray[np.float64]


def random_factors(rank: int, seed: int, scaling: float = 2.0, d_out: int = D_OUT, d_in: int = D_IN) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(
        A=torch.randn(rank, d_in, generator=generator),
        B=torch.randn(d_out, rank, generator=generator),
        scaling=scaling,
    )


def as_float64(factors: LoraFactors) -> tuple[Array, Array]:
    return factors.A.numpy().astype(np.float64), factors.B.numpy().astype(np.float64)


def product(factors: LoraFactors) -> Array:
    A, B = as_float64(factors)
    return np.asarray(factors.scaling * (B @ A))


def relative_error(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def unequal_terms() -> list[Term]:
    shares = token_shares({rank_index: 10 + 7 * rank_index for rank_index in range(len(RANKS))})
    return [
        Term(shares[i], random_factors(rank, seed=i, scaling=[2.0, 0.5, 16.0, 2.0, 1.0][i]))
        for i, rank in enumerate(RANKS)
    ]


def block_of(name: str) -> int:
    return int(name.split(".")[1])


# --- the exact sum over heads of different cuts and the tail ---


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[Contribution], dict[str, LoraFactors], int]:
    """A random round: clients with their own cuts, ranks (0 too), scalings and token counts, and a tail."""
    depth = draw(st.integers(2, 5))
    seed = draw(st.integers(0, 2**20))
    rank, scaling = st.sampled_from([0, 1, 2, 3, 8]), st.sampled_from([0.25, 1.0, 2.0, 16.0])
    cuts = draw(st.lists(st.integers(1, depth - 1), min_size=1, max_size=5))
    tokens = draw(st.lists(st.integers(1, 10**6), min_size=len(cuts), max_size=len(cuts)))
    shares = token_shares(dict(enumerate(tokens)))

    def adapters(start: int, stop: int, salt: int) -> dict[str, LoraFactors]:
        chosen = {}
        for block in range(start, stop):
            for matrix, (d_out, d_in) in {"q": (12, 12), "up": (20, 12)}.items():
                r, c = draw(rank), draw(scaling)
                factors = random_factors(r, seed + 1000 * salt + block, c, d_out, d_in)
                if r > 0 or draw(st.booleans()):  # rank 0: absent, or present with no rows
                    chosen[f"h.{block}.{matrix}"] = factors
        return chosen

    clients = [Contribution(shares[i], cut, adapters(0, cut, salt=i + 1)) for i, cut in enumerate(cuts)]
    return clients, adapters(min(cuts), depth, salt=0), depth


def summands(
    clients: list[Contribution], tail: dict[str, LoraFactors], name: str
) -> list[tuple[Contribution, LoraFactors]]:
    """What is summed, so that the tolerance is relative to it and not to what cancellation leaves."""
    sources = [(c, c.factors if block_of(name) < c.cut else tail) for c in clients]
    return [(c, source[name]) for c, source in sources if name in source]


def dense_sum(clients: list[Contribution], tail: dict[str, LoraFactors], name: str) -> Array:
    """The definition in float64, client by client: its update is its head's or, beyond that, the tail's."""
    total = np.zeros((20, 12) if name.endswith("up") else (12, 12))
    for client, factors in summands(clients, tail, name):
        total += client.weight * product(factors)
    return total


@settings(max_examples=150, deadline=None)
@given(rounds())
def test_noise_free_is_the_dense_weighted_sum(
    drawn: tuple[list[Contribution], dict[str, LoraFactors], int],
) -> None:
    clients, tail, depth = drawn
    increment = aggregate(clients, tail, block_of)
    for name in (f"h.{block}.{matrix}" for block in range(depth) for matrix in ("q", "up")):
        expected = dense_sum(clients, tail, name)
        if name not in increment:
            assert not expected.any()
            continue
        assert increment[name].scaling == 1.0
        scale = sum(c.weight * np.linalg.norm(product(f)) for c, f in summands(clients, tail, name))
        assert np.linalg.norm(product(increment[name]) - expected) <= EXACT * scale


def test_heads_and_tail_share_a_block_by_their_weights() -> None:
    # block 1 is held by the client with cut 2 (weight 0.25) and left to the tail by the other (0.75)
    deep, shallow = (
        Contribution(0.25, 2, {"h.1.q": random_factors(4, 1)}),
        Contribution(0.75, 1, {"h.0.q": random_factors(2, 2)}),
    )
    tail = {"h.1.q": random_factors(8, 3), "h.2.q": random_factors(8, 4)}
    terms = terms_by_module([deep, shallow], tail, block_of)
    assert [(term.weight, term.factors.rank) for term in terms["h.1.q"]] == [(0.25, 4), (0.75, 8)]
    assert [(term.weight, term.factors.rank) for term in terms["h.2.q"]] == [(1.0, 8)]
    assert [(term.weight, term.factors.rank) for term in terms["h.0.q"]] == [(0.75, 2)]  # the other: rank 0 there


def test_tail_weight_counts_the_heads_that_end_at_or_before_a_block() -> None:
    cuts_and_weights = [(1, 0.1), (2, 0.2), (4, 0.7)]
    assert [tail_weight(cuts_and_weights, block) for block in range(5)] == pytest.approx([0, 0.1, 0.3, 0.3, 1.0])


def test_a_block_that_no_finished_client_left_to_the_tail_takes_nothing_from_it() -> None:
    client = Contribution(1.0, 2, {"h.1.q": random_factors(4, 1)})
    increment = aggregate([client], {"h.1.q": random_factors(8, 2)}, block_of)
    assert relative_error(product(increment["h.1.q"]), product(client.factors["h.1.q"])) < EXACT


def test_noise_free_equals_pefts_concatenated_adapters() -> None:
    """An independent oracle: PEFT's own ``add_weighted_adapter(combination_type="cat")``."""
    from peft import LoraConfig, get_peft_model

    terms = unequal_terms()
    names = [f"client{i}" for i in range(len(terms))]
    configs = [
        LoraConfig(r=t.factors.rank, lora_alpha=t.factors.scaling * t.factors.rank, target_modules=["q"]) for t in terms
    ]
    base = torch.nn.Linear(D_IN, D_OUT, bias=False)
    W_0 = base.weight.detach().clone()
    lora: Any = get_peft_model(torch.nn.ModuleDict({"q": base}), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        lora.add_adapter(name, config)
    layer = lora.get_submodule("base_model.model.q")
    for name, term in zip(names, terms, strict=True):
        layer.lora_A[name].weight.data = term.factors.A.clone()
        layer.lora_B[name].weight.data = term.factors.B.clone()
    lora.add_weighted_adapter(names, [term.weight for term in terms], "sum", combination_type="cat")
    layer.set_adapter("sum")
    with torch.no_grad():
        delta = layer(torch.eye(D_IN)).T - W_0

    assert relative_error(product(noise_free(terms)), delta.numpy().astype(np.float64)) < 2 * EXACT


def test_the_stack_has_the_sum_of_the_ranks_and_leaves_its_inputs_alone() -> None:
    terms = unequal_terms()
    before = [(term.factors.A.clone(), term.factors.B.clone()) for term in terms]
    stacked = noise_free(terms)
    assert stacked.A.shape == (sum(RANKS), D_IN)
    assert stacked.B.shape == (D_OUT, sum(RANKS))
    stacked.A.zero_()
    stacked.B.zero_()
    for term, (A, B) in zip(terms, before, strict=True):
        assert torch.equal(term.factors.A, A)
        assert torch.equal(term.factors.B, B)


# --- the rules it is compared with, stated again in numpy ---


def padded(terms: list[Term]) -> tuple[Array, Array]:
    """(clients, r_max, d_in) and (clients, d_out, r_max), scalings folded into B."""
    rank = max(term.factors.rank for term in terms)
    As, Bs = [], []
    for term in terms:
        A, B = as_float64(term.factors)
        extra = rank - term.factors.rank
        As.append(np.pad(A, ((0, extra), (0, 0))))
        Bs.append(np.pad(term.factors.scaling * B, ((0, 0), (0, extra))))
    return np.stack(As), np.stack(Bs)


def test_fedavg_averages_zero_padded_factors_with_the_token_shares() -> None:
    terms = unequal_terms()
    As, Bs = padded(terms)
    p = np.array([term.weight for term in terms])
    expected = np.einsum("i,ior->or", p, Bs) @ np.einsum("i,ird->rd", p, As)
    assert relative_error(product(fedavg(terms)), expected) < EXACT


def test_zero_pad_averages_with_the_norms_of_the_updates() -> None:
    terms = unequal_terms()
    As, Bs = padded(terms)
    norms = np.array([np.linalg.norm(product(term.factors), "fro") for term in terms])
    s = norms / norms.sum()
    expected = np.einsum("i,ior->or", s, Bs) @ np.einsum("i,ird->rd", s, As)
    assert relative_error(product(zero_pad(terms)), expected) < EXACT


def test_svd_is_the_truncated_svd_of_the_dense_sum() -> None:
    terms = unequal_terms()
    dense = np.sum([term.weight * product(term.factors) for term in terms], axis=0)
    U, S, Vt = np.linalg.svd(dense)
    rank = max(RANKS)
    found = svd(terms)
    assert found.rank == rank
    assert relative_error(product(found), (U[:, :rank] * S[:rank]) @ Vt[:rank]) < 1e-5
    # Eckart-Young: what is lost is the rest of the spectrum, and something is lost
    lost = float(np.linalg.norm(dense - product(found)))
    assert lost == pytest.approx(float(np.linalg.norm(S[rank:])), rel=1e-4)
    assert lost > 0.05 * np.linalg.norm(dense)


def test_svd_where_the_stacked_rank_exceeds_the_matrix() -> None:
    terms = [Term(0.25, random_factors(16, seed, d_out=12, d_in=20)) for seed in range(4)]
    dense = np.sum([0.25 * product(term.factors) for term in terms], axis=0)
    assert relative_error(product(svd(terms)), dense) < 1e-5  # rank 16 holds any 12 x 20 matrix


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_exact_for_a_single_contribution(name: str) -> None:
    factors = random_factors(4, 0)
    assert relative_error(product(RULES[name]([Term(1.0, factors)])), product(factors)) < 1e-5


def test_only_the_noise_free_rule_is_exact_for_unequal_ranks() -> None:
    terms = unequal_terms()
    dense = np.sum([term.weight * product(term.factors) for term in terms], axis=0)
    errors = {name: relative_error(product(rule(terms)), dense) for name, rule in RULES.items()}
    assert errors["noise_free"] < EXACT
    assert min(error for name, error in errors.items() if name != "noise_free") > 0.01


def test_the_clipped_rule_is_the_dense_sum_of_clipped_updates() -> None:
    """Written out: dense updates in float64, none larger than twice the third of five norms."""
    terms = unequal_terms()
    updates = [product(term.factors) for term in terms]
    norms = [float(np.linalg.norm(update)) for update in updates]
    limit = CLIP_RATIO * sorted(norms)[2]
    assert sum(norm > limit for norm in norms) == 2
    clipped = [update * min(1.0, limit / norm) for update, norm in zip(updates, norms, strict=True)]
    expected = np.sum([term.weight * update for term, update in zip(terms, clipped, strict=True)], axis=0)
    assert relative_error(product(norm_clipped(terms)), expected) < 1e-5


def test_the_clipped_rule_is_the_exact_one_where_nothing_stands_out() -> None:
    terms = [Term(0.25, random_factors(4, seed)) for seed in range(4)]
    clipped, exact = norm_clipped(terms), noise_free(terms)
    assert torch.equal(clipped.A, exact.A)
    assert torch.equal(clipped.B, exact.B)


@pytest.mark.parametrize("factor", [-1e3, 1e15])
def test_a_poisoned_adapter_moves_a_matrix_no_further_than_the_honest_ones(factor: float) -> None:
    honest = [random_factors(4, seed) for seed in range(3)]
    poisoned = LoraFactors(honest[2].A, honest[2].B * factor, honest[2].scaling)
    update = product(norm_clipped([Term(1 / 3, factors) for factors in [*honest[:2], poisoned]]))
    median = sorted(float(np.linalg.norm(product(factors))) for factors in [*honest[:2], poisoned])[1]
    rest = sum(product(factors) / 3 for factors in honest[:2])
    assert np.linalg.norm(update - rest) == pytest.approx(CLIP_RATIO * median / 3, rel=1e-3)


@pytest.mark.parametrize("rule", [fedavg, zero_pad])
def test_a_rank_one_client_is_padded_and_never_broadcast(rule: Rule) -> None:
    """Stock array averaging broadcasts a (1, d_in) factor over every row of the others."""
    big, one = random_factors(4, 0, scaling=1.0), random_factors(1, 1, scaling=1.0)
    averaged = rule([Term(0.5, big), Term(0.5, one)])
    ratio = averaged.A[1:] / big.A[1:]  # rows the small client has nothing to say about: scaled, not shifted
    assert float(ratio.max() - ratio.min()) < 1e-5


@pytest.mark.parametrize("name", RULES)
def test_untrained_adapters_change_nothing(name: str) -> None:
    fresh = [LoraFactors(random_factors(r, r).A, torch.zeros(D_OUT, r), 2.0) for r in (4, 2)]
    assert not RULES[name]([Term(0.5, factors) for factors in fresh]).delta().any()


def test_rank_zero_keeps_its_weight_in_the_average() -> None:
    present = random_factors(4, 0)
    clients = [Contribution(0.5, 1, {"h.0.q": present}), Contribution(0.5, 1, {})]
    increment = aggregate(clients, {}, block_of, fedavg)["h.0.q"]
    assert relative_error(product(increment), 0.25 * product(present)) < EXACT  # 0.5 B times 0.5 A


# --- token shares ---


@given(st.dictionaries(st.integers(), st.integers(0, 10**12), min_size=1).filter(lambda d: sum(d.values()) > 0))
def test_token_shares_are_proportional_and_sum_to_one(tokens: dict[int, int]) -> None:
    shares = token_shares(tokens)
    assert math.fsum(shares.values()) == pytest.approx(1.0, abs=1e-12)
    for client, count in tokens.items():
        assert shares[client] == pytest.approx(count / sum(tokens.values()))


@pytest.mark.parametrize("tokens", [{}, {"a": 0, "b": 0}, {"a": -1, "b": 5}])
def test_token_shares_refuse_a_round_nobody_finished(tokens: dict[str, int]) -> None:
    with pytest.raises(AggregationError, match=r"positive sum.*Skip the aggregation"):
        token_shares(tokens)


# --- bad input ---


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["A", "B", "scaling"])
def test_nan_and_inf_are_refused(name: str, poison: float, where: str) -> None:
    good = random_factors(4, 0)
    A, B = good.A.clone(), good.B.clone()
    if where != "scaling":
        {"A": A, "B": B}[where][0, 0] = poison
    bad = LoraFactors(A, B, poison if where == "scaling" else 2.0)
    with pytest.raises(AggregationError, match="NaN or Inf"):
        RULES[name]([Term(0.5, good), Term(0.5, bad)])


@pytest.mark.parametrize("name", RULES)
def test_shapes_that_disagree_are_refused(name: str) -> None:
    with pytest.raises(AggregationError, match=r"\(24, 40\), found \(24, 39\).*same base model"):
        RULES[name]([Term(0.5, random_factors(4, 0)), Term(0.5, random_factors(4, 1, d_in=39))])
    # equal numbers of elements, factors swapped: must not be reshaped into place either
    swapped = LoraFactors(random_factors(4, 0).B, random_factors(4, 0).A, 1.0)
    with pytest.raises(AggregationError, match=r"of one rank, found A \(24, 4\) and B \(4, 40\)"):
        RULES[name]([Term(1.0, swapped)])


def test_half_precision_factors_are_refused() -> None:
    good = random_factors(4, 0)
    with pytest.raises(AggregationError, match=r"float32 factors, found A torch.bfloat16"):
        noise_free([Term(1.0, LoraFactors(good.A.bfloat16(), good.B, 1.0))])


@pytest.mark.parametrize("weights", [[0.6, 0.6], [0.5, 0.4], [1.0, 2e-6]])
def test_client_weights_must_sum_to_one(weights: list[float]) -> None:
    clients = [Contribution(weight, 1, {"h.0.q": random_factors(2, 0)}) for weight in weights]
    with pytest.raises(AggregationError, match=r"sum to 1 within 1e-06.*token_shares"):
        aggregate(clients, {}, block_of)


@pytest.mark.parametrize("weights", [[-0.5, 1.5], [math.nan, 1.0], [math.inf, 0.0]])
def test_weights_must_be_finite_and_not_negative(weights: list[float]) -> None:
    clients = [Contribution(weight, 1, {"h.0.q": random_factors(2, 0)}) for weight in weights]
    with pytest.raises(AggregationError, match="finite weights >= 0"):
        aggregate(clients, {}, block_of)
    with pytest.raises(AggregationError, match="finite weights >= 0"):
        noise_free([Term(weight, random_factors(2, 0)) for weight in weights])


def test_weights_of_one_matrix_must_not_exceed_one() -> None:
    with pytest.raises(AggregationError, match="sum to at most 1"):
        noise_free([Term(0.7, random_factors(2, 0)), Term(0.7, random_factors(2, 1))])


def test_nothing_to_aggregate_is_refused() -> None:
    with pytest.raises(AggregationError, match=r"at least one client, found none.*Skip"):
        aggregate([], {"h.1.q": random_factors(2, 0)}, block_of)
    with pytest.raises(AggregationError, match="at least one adapter"):
        noise_free([])


def test_an_adapter_beyond_the_clients_cut_is_refused() -> None:
    with pytest.raises(AggregationError, match=r"below the cut 1 .*'h\.1\.q' in block 1.*same plan"):
        aggregate([Contribution(1.0, 1, {"h.1.q": random_factors(2, 0)})], {}, block_of)


def test_the_error_names_the_module() -> None:
    client = Contribution(1.0, 1, {"h.0.q": LoraFactors(torch.full((2, D_IN), math.nan), torch.ones(D_OUT, 2), 1.0)})
    with pytest.raises(AggregationError, match=r"Module 'h\.0\.q': .*NaN or Inf"):
        aggregate([client], {}, block_of)
