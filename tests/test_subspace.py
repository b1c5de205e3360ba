"""Where adapters start again: against numpy's SVD of the delta."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hsplit_flwr.adapters import SegmentAdapters
from hsplit_flwr.deltas import WeightDelta
from hsplit_flwr.lora import LoraFactors, LoraSpec, init_lora_A
from hsplit_flwr.plan import derive_seed
from hsplit_flwr.segments import segment_from_model
from hsplit_flwr.subspace import restart_lora_A
from tests.models import tiny_model

D_OUT, D_IN, RANK = 40, 30, 4
ROUNDING = 1e-5
"""largest absolute difference of rows of length 0.58, float32"""


def delta(rank: int, decay: float = 1.0, seed: int = 0) -> LoraFactors:
    """Singular values decay^0, decay^1, ... along random directions."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(D_OUT, rank, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(D_IN, rank, generator=generator))
    return LoraFactors(right.T.contiguous(), left * decay ** torch.arange(rank), 1.0)


def fresh(rank: int = RANK, seed: int = 1) -> Tensor:
    return init_lora_A(rank, D_IN, seed)


def share_seen(A: Tensor, learned: LoraFactors) -> float:
    """Of the delta's squared norm, how much lies in the row space of A."""
    basis, _ = np.linalg.qr(A.double().numpy().T)
    dense = learned.delta().double().numpy()
    return float(np.linalg.norm(dense @ basis) ** 2 / np.linalg.norm(dense) ** 2)


@pytest.mark.parametrize("rank", [1, RANK, 12])
def test_rows_are_orthogonal_and_as_long_as_fresh_ones(rank: int) -> None:
    A = restart_lora_A(fresh(rank), delta(8))
    assert torch.allclose(A @ A.T, torch.eye(rank) / 3, atol=ROUNDING)
    lengths = torch.stack([fresh(rank, seed).norm(dim=1).mean() for seed in range(200)])
    assert float(lengths.mean()) == pytest.approx(3**-0.5, rel=0.02)


@pytest.mark.parametrize("rank", [2, 8])
def test_both_forms_of_a_delta_give_the_same_start(rank: int) -> None:
    learned = delta(12, decay=0.7)
    assert torch.allclose(restart_lora_A(fresh(rank), learned), restart_lora_A(fresh(rank), learned.delta()), atol=1e-4)


def test_a_start_sees_nearly_what_the_best_one_would() -> None:
    """By the SVD of the delta; an A drawn at random sees r / d_in of it."""
    learned = delta(20, decay=0.7)
    singular = np.linalg.svd(learned.delta().double().numpy(), compute_uv=False)
    best = float((singular[:RANK] ** 2).sum() / (singular**2).sum())
    seen = [share_seen(restart_lora_A(fresh(seed=seed), learned), learned) for seed in range(20)]
    drawn = [share_seen(fresh(seed=seed), learned) for seed in range(20)]
    assert np.mean(seen) > 0.9 * best > 0.8
    assert np.mean(drawn) < 0.3


def test_directions_that_the_delta_lacks_are_those_of_the_fresh_start() -> None:
    """A delta of rank 1: one row sees it, the others start as if nothing were known, orthogonal to it."""
    learned = delta(1)
    A = restart_lora_A(fresh(), learned)
    assert share_seen(A[:1], learned) > 0.999
    assert torch.allclose(A[1:] @ learned.A[0], torch.zeros(RANK - 1), atol=1e-2)
    assert torch.linalg.matrix_rank(torch.cat([A, fresh()]), atol=1e-2) <= RANK + 1


def test_unequal_ranks_start_alike() -> None:
    learned = delta(8)
    assert torch.allclose(restart_lora_A(fresh(6), learned)[:2], restart_lora_A(fresh(6)[:2], learned), atol=ROUNDING)


@pytest.mark.parametrize("form", ["factors", "dense"])
def test_a_delta_of_zeros_changes_nothing(form: str) -> None:
    zeros = LoraFactors(torch.zeros(2, D_IN), torch.zeros(D_OUT, 2), 1.0)
    start = restart_lora_A(fresh(), zeros if form == "factors" else zeros.delta())
    assert torch.equal(start, fresh())


def test_adapters_restart_where_their_module_has_changed() -> None:
    segment = segment_from_model(tiny_model("llama"))
    adapters = SegmentAdapters(segment, LoraSpec(3))
    changed, *unchanged = adapters.module_names
    d_out, d_in = segment.linear_modules()[changed].weight.shape  # type: ignore[misc]
    pair = LoraFactors(torch.randn(2, d_in), torch.randn(d_out, 2), 1.0)
    learned = WeightDelta()
    learned.add({changed: pair})
    adapters.reset(5, learned)
    found = adapters.factors()
    starts = {name: init_lora_A(3, factors.A.shape[1], derive_seed(5, name)) for name, factors in found.items()}
    assert all(torch.equal(found[name].A, starts[name]) for name in unchanged)
    assert torch.equal(found[changed].A, restart_lora_A(starts[changed], pair))
    assert all(not factors.B.any() for factors in found.values())
