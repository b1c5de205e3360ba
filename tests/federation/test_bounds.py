"""How far one client can move a round, against independent statements of the bounds."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.federation.acceptance import Accepted
from hsplit_flwr.federation.bounds import balanced_importance, bound_updates, bounded_shares, update_size
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.trained_head import TrainedHead
from hsplit_flwr.lora.factors import LoraFactors

EXACT = 1e-9
"""relative, float64"""
SIZE = 1e-5
"""relative, of a size: float32 rounding counts into it"""


def pair(seed: int, rank: int = 3, factor: float = 1.0, scaling: float = 2.0) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    B = factor * torch.randn(12, rank, generator=generator)
    return LoraFactors(torch.randn(rank, 10, generator=generator), B, scaling)


def accepted(**factors: float) -> dict[str, Accepted]:
    """Clients whose updates have the size of one fixed update, times `factors`."""
    heads = {}
    for client, factor in factors.items():
        adapters = {"h.0.q": pair(0, factor=factor), "h.0.v": pair(1, rank=1, factor=factor)}
        trained = TrainedHead(client=client, factors=adapters, importance={}, tokens=1, loss=1.0)
        heads[client] = Accepted(trained, Ticket(client=client, round=1, mode="train", cut=1, first_step=0))
    return heads


def dense_size(head: Accepted) -> float:
    updates = [
        pair.scaling * pair.B.double().numpy() @ pair.A.double().numpy() for pair in head.trained.factors.values()
    ]
    return float(np.sqrt(np.mean([np.sum(update**2) for update in updates])))


# --- shares ---


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=12).filter(any), st.floats(0.01, 1.0))
def test_shares_are_filled_up_like_water(tokens: list[int], most: float) -> None:
    """The definition: min(limit, c p_i) with the c that gives 1, found by bisection."""
    shares = {str(i): count / sum(tokens) for i, count in enumerate(tokens)}
    found = bounded_shares(shares, most)
    limit = max(most, 1 / sum(count > 0 for count in tokens))
    low, high = 0.0, 1.0 / min(share for share in shares.values() if share)
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if math.fsum(min(limit, c * p) for p in shares.values()) < 1 else (low, c)
    assert list(found) == list(shares)
    for client, share in shares.items():
        assert found[client] == pytest.approx(min(limit, high * share), abs=EXACT)
    assert math.fsum(found.values()) == pytest.approx(1.0, abs=EXACT)


def test_shares_by_hand() -> None:
    """What 97 % of the tokens claim above a half goes to the others as 2 to 1."""
    assert bounded_shares({"a": 0.97, "b": 0.02, "c": 0.01}, 0.5) == pytest.approx({"a": 0.5, "b": 1 / 3, "c": 1 / 6})
    assert bounded_shares({"a": 0.97, "b": 0.02, "c": 0.01}, 0.4) == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2})
    assert bounded_shares({"a": 0.9, "b": 0.1, "c": 0.0}, 0.2) == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert bounded_shares({"a": 1.0}, 0.1) == {"a": 1.0}


@given(st.dictionaries(st.text(), st.integers(1, 10**9), min_size=1))
def test_shares_within_the_bound_stay_bit_for_bit(tokens: dict[str, int]) -> None:
    shares = {client: count / sum(tokens.values()) for client, count in tokens.items()}
    assert bounded_shares(shares, 1.0) == shares
    assert bounded_shares(shares, max(shares.values())) == shares


# --- sizes of updates ---


def test_the_size_is_the_dense_one() -> None:
    head = accepted(a=1.5)["a"]
    assert update_size(head.trained.factors.values()) == pytest.approx(dense_size(head), rel=SIZE)
    assert update_size([]) == 0.0


def test_factors_that_cancel_are_as_large_as_float32_makes_them() -> None:
    """In exact arithmetic the product is 0; the weights would get the rounding of figures of 1e20."""
    column = 1e20 * torch.ones(12, 1)
    cancelling = LoraFactors(torch.ones(2, 10), torch.cat([column, -column], 1), 1.0)
    assert update_size([cancelling]) > 1e12


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_update_norm": 5.0}, lambda unit: 5.0),
        ({"max_update_ratio": 2.0}, lambda unit: 2 * 2 * unit),
        ({"max_update_ratio": 1.0}, lambda unit: 2 * unit),
        ({"max_update_ratio": 3.0, "max_update_norm": 1e9}, lambda unit: 3 * 2 * unit),
    ],
    ids=["absolute", "relative", "median", "both"],
)
def test_a_larger_update_is_scaled_down_to_the_limit_and_named(config: dict[str, Any], limit: Any) -> None:
    heads = accepted(a=1.0, b=-1000.0, c=2.0)
    most = limit(dense_size(heads["a"]))
    bounded, lines = bound_updates(heads, StrategyConfig(**config))
    for client, head in heads.items():
        size = dense_size(head)
        assert dense_size(bounded[client]) == pytest.approx(min(size, most), rel=SIZE)
        for name, found in bounded[client].trained.factors.items():  # the direction stays
            expected = min(1.0, most / size) * head.trained.factors[name].delta()
            assert torch.allclose(found.delta(), expected, rtol=1e-4, atol=1e-4)
    beyond = [client for client, head in heads.items() if dense_size(head) > most * (1 + SIZE)]
    assert [line.split(":")[0] for line in lines] == [f"client {client}" for client in beyond]
    assert any(line.startswith("client b: Expected an update of size <= ") for line in lines)
    assert all(line.endswith("scaled down to it.") for line in lines)


def test_a_larger_update_is_refused_where_that_is_asked_for() -> None:
    heads = accepted(a=1.0, b=-1000.0, c=2.0)
    bounded, lines = bound_updates(heads, StrategyConfig(max_update_ratio=2.0, update_excess="refuse"))
    assert bounded == {"a": heads["a"], "c": heads["c"]}
    assert len(lines) == 1
    assert lines[0].startswith("client b: ")
    assert lines[0].endswith("left out.")


def test_of_two_clients_the_larger_update_is_not_its_own_measure() -> None:
    bounded, lines = bound_updates(accepted(a=1.0, b=1000.0), StrategyConfig(max_update_ratio=2.0))
    assert dense_size(bounded["b"]) == pytest.approx(2 * dense_size(bounded["a"]), rel=SIZE)
    assert len(lines) == 1


def test_what_is_within_the_bounds_is_not_touched() -> None:
    heads = accepted(a=1.0, b=-3.0, c=2.0)
    for config in (StrategyConfig(), StrategyConfig(max_update_ratio=10.0, max_update_norm=1e3)):
        bounded, lines = bound_updates(heads, config)
        assert not lines
        assert all(bounded[client] is heads[client] for client in heads)


def test_a_client_without_adapters_measures_nobody() -> None:
    heads = accepted(a=1.0, b=1.0, c=1.0, d=1.0)
    empty = heads["a"]._replace(trained=TrainedHead(client="e", factors={}, importance={}, tokens=1, loss=1.0))
    many = heads | dict.fromkeys("efghijk", empty)
    assert bound_updates(many, StrategyConfig(max_update_ratio=1.0)) == (many, [])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_share": 0.0}, "max_share > 0 and at most 1, found 0.0 .run config: max-share"),
        ({"max_share": 1.5}, "max_share > 0 and at most 1"),
        ({"max_share": math.nan}, "max_share > 0 and at most 1"),
        ({"max_update_norm": -1.0}, "max_update_norm >= 0"),
        ({"max_update_norm": math.nan}, "max_update_norm >= 0"),
        ({"max_update_ratio": 0.5}, "max_update_ratio >= 1, or 0"),
        ({"max_update_ratio": math.inf}, "max_update_ratio >= 1, or 0"),
        ({"update_excess": "ignore"}, "update_excess as one of .'clip', 'refuse'.*update-excess"),
        ({"round_limit_s": math.inf}, "round_limit_s > 0 s and at most 31622400 s"),
    ],
    ids=str,
)
def test_bounds_out_of_range_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StrategyConfig(**config)


# --- importance ---


def test_a_liar_about_importance_counts_for_its_share_only(caplog: pytest.LogCaptureFixture) -> None:
    heads = {"a": {"q": 1.0}, "b": {"q": 1e15}, "c": {"q": 3.0, "v": 1.0}}
    tail = {"a": {"v": 2.0}, "b": {"v": 2.0}, "stranger": {"v": 9.0}}
    found_heads, found_tail = balanced_importance(heads, tail)
    assert found_heads["a"] is heads["a"]
    assert found_heads["c"] is heads["c"]
    assert (found_tail["a"], found_tail["stranger"]) == (tail["a"], tail["stranger"])
    assert found_heads["b"]["q"] + found_tail["b"]["v"] == pytest.approx(4.0)  # the median of 3, 4 and 1e15
    assert found_heads["b"]["q"] / found_tail["b"]["v"] == pytest.approx(1e15 / 2)
    assert "client b: importance 1e+15 is scaled down to" in caplog.text


@pytest.mark.parametrize(
    "heads", [{}, {"a": {"q": 1e9}}, {"a": {"q": 1.0}, "b": {"q": 9.9}}, {"a": {}, "b": {"q": 1.0}}]
)
def test_importance_of_like_size_is_not_touched(heads: dict[str, dict[str, float]]) -> None:
    assert balanced_importance(heads, {}) == (heads, {})
