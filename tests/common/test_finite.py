"""NaN and Inf are found in every place and dtype, and finite values whose sum overflows are none."""

import pytest
import torch

from hsplit_flwr.common.finite import all_finite

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("place", [0, 1, 17, 8191, 8192, 10006])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, place: int, bad: float) -> None:
    values = torch.randn(10007, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(values)
    values[place] = bad
    assert not all_finite(values)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinities_do_not_cancel(dtype: torch.dtype) -> None:
    assert not all_finite(torch.tensor([float("inf"), -float("inf")], dtype=dtype))
    assert not all_finite(torch.tensor([[1.0, -float("inf")], [float("inf"), 2.0]], dtype=dtype).t())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_overflowing_sum_of_finite_values_is_no_infinity(dtype: torch.dtype, sign: int) -> None:
    values = torch.full((1000, 3), sign * torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(values)
    values[-1, -1] = float("nan")
    assert not all_finite(values)


@pytest.mark.parametrize("values", [torch.zeros(0), torch.tensor(3), torch.tensor([True]), torch.tensor(0.5)], ids=str)
def test_what_has_no_place_for_them_is_finite(values: torch.Tensor) -> None:
    assert all_finite(values)
