"""How wrong a codec may make a value: bounds as they are documented, over dtypes, shapes and the edges of numbers."""

import math

import pytest
import torch
from torch import Tensor

from hsplit_flwr.errors import ConfigError, ExchangeError
from hsplit_flwr.exchange.codecs import BLOCK, CODECS, Part, Shape, codec_named
from hsplit_flwr.exchange.frames import Header, rounding_seed

pytestmark = pytest.mark.timeout(30)

ROUNDING = 1 + 2**-15
"""what float32 adds to a bound: a value of 127 levels is divided to within 127 x 2^-24 of one"""
LARGEST = torch.finfo(torch.float32).max
TINY = torch.finfo(torch.float32).tiny
LIMITS = {"fp16": 6.4e4, "bf16": 3.38e38}
"""what a cast takes without becoming infinite"""
SHAPES: list[Shape] = [(1, 1), (3, 31), (4, 32), (2, 33), (5, 96), (7, 100), (2, 3, 40), (0, 32), (0, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def blocks_of(values: Tensor, size: int) -> Tensor:
    """The largest absolute value of each value's block, in the values' place."""
    parts = torch.split(values.abs(), size, -1)
    return torch.cat([part.amax(-1, keepdim=True).expand_as(part) for part in parts], -1)


def bound(name: str, values: Tensor) -> Tensor:
    """The worst error of each value, as documented."""
    size = values.abs()
    if name == "fp32":
        return torch.zeros_like(size)
    if name == "bf16":
        return size * 2.0**-8 + 2.0**-134
    if name == "fp16":
        return size * 2.0**-11 + 2.0**-25
    if name == "int8":
        return (blocks_of(values, values.shape[-1]) / 254).clamp_min(TINY / 2) * ROUNDING
    if name == "int4":
        return (blocks_of(values, BLOCK) / 13.8).clamp_min(TINY / 2) * ROUNDING
    return (blocks_of(values, BLOCK) / 6.9).clamp_min(TINY) * ROUNDING


def there_and_back(name: str, values: Tensor, seed: int = 0) -> Tensor:
    codec, shape = CODECS[name], tuple(values.shape)
    parts = codec.encode("x", values, seed)
    assert {key: Part(tuple(part.shape), part.dtype) for key, part in parts.items()} == codec.layout("x", shape)
    found = codec.decode("x", parts, shape)
    assert found.shape == values.shape
    return found


def edge(name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    if values.numel() == 0:
        return values
    if name == "zeros":
        return torch.zeros_like(values)
    if name == "constant":
        return torch.full_like(values, -0.3)
    if name == "outlier":
        values[..., -1] = 6e4
    if name == "huge":
        values[..., 0] = torch.finfo(dtype).max if dtype != torch.float64 else LARGEST
    if name == "largest everywhere":
        return torch.full_like(values, min(torch.finfo(dtype).max, LARGEST))
    if name == "denormal":
        return values * (1e-7 if dtype == torch.float16 else 1e-40)
    if name == "a zero row":
        values[0] = 0
    return values


EDGES = ["normal", "zeros", "constant", "outlier", "huge", "largest everywhere", "denormal", "a zero row"]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("which", EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_value_is_more_wrong_than_documented(name: str, which: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        values = edge(which, shape, dtype)
        if name in LIMITS:
            values = values.double().clamp(-LIMITS[name], LIMITS[name]).to(dtype)
        exact = values.float()  # float64 goes by float32
        found = there_and_back(name, values)
        assert torch.isfinite(found).all()
        assert ((found.double() - exact.double()).abs() <= bound(name, exact.double())).all(), shape


@pytest.mark.parametrize("name", ["int8", "int4", "int4_stochastic"])
def test_zeros_come_back_as_zeros_and_the_largest_keeps_its_sign(name: str) -> None:
    values = torch.zeros(2, 40)
    values[1, 3] = -5.0
    found = there_and_back(name, values)
    assert found.count_nonzero() == 1
    assert found[1, 3] == pytest.approx(-5.0, rel=0.01)


def test_the_bounds_are_met_and_not_merely_kept() -> None:
    """A bound that nothing comes near says nothing."""
    values = torch.rand(200, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    values[:, 0] = 1.0
    for name in ("int8", "int4", "int4_stochastic"):
        error = (there_and_back(name, values) - values).abs()
        assert (error / bound(name, values)).max() > 0.9


def test_chance_is_right_on_average_and_rounding_is_not() -> None:
    """A value of 0.3 levels: rounded it is 0 every time; by chance it is 1 in three of ten."""
    draws = 4000
    values = torch.tensor([[7.0, 0.3, -0.3, 2.5, -6.9, 0.0, 1.0]])
    mean = torch.stack([there_and_back("int4_stochastic", values, seed) for seed in range(draws)]).mean(0)
    standard_error = 0.5 / math.sqrt(draws)
    assert (mean - values).abs().max() < 4 * standard_error
    assert there_and_back("int4", values)[0, 1] == 0.0


def test_chance_goes_by_its_seed() -> None:
    values = torch.randn(8, 64)
    one, again, other = (there_and_back("int4_stochastic", values, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(there_and_back("int4", values, 1), there_and_back("int4", values, 2))


def test_every_frame_of_a_run_has_a_seed_of_its_own() -> None:
    headers = [
        Header(kind, "run", number, client, 1, step=step)
        for kind in ("train", "gradient", "evaluate")
        for number in (1, 2)
        for client in ("a", "b")
        for step in (0, 1)
    ]
    assert len({rounding_seed(header) for header in headers}) == len(headers)


@pytest.mark.parametrize(("name", "expected"), [("int8", 1 + 4 / 576), ("int4", 9 / 16), ("int4_stochastic", 9 / 16)])
def test_bytes_per_value(name: str, expected: float) -> None:
    layout = CODECS[name].layout("x", (10, 576))
    assert sum(part.nbytes for part in layout.values()) / 5760 == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["int8", "int4", "int4_stochastic"])
def test_what_is_not_finite_is_refused_at_the_other_end(name: str, bad: float) -> None:
    values = torch.randn(3, 40)
    values[1, 2] = bad
    with pytest.raises(ExchangeError, match=r"Expected finite x, found .*Lower the learning rate") as error:
        there_and_back(name, values)
    assert error.value.code == "non_finite"


@pytest.mark.parametrize(
    ("scale", "code"),
    [(math.nan, "non_finite"), (math.inf, "non_finite"), (-math.inf, "non_finite"), (0.0, "wrong_scale"),
     (-0.0, "wrong_scale"), (-1.0, "wrong_scale")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["int8", "int4", "int4_stochastic"])
def test_a_peers_scale_is_checked(name: str, scale: float, code: str) -> None:
    codec = CODECS[name]
    parts = codec.encode("x", torch.randn(3, 40))
    parts["x.scale"][2, 0] = scale
    with pytest.raises(ExchangeError, match=r"Expected .* x.* found") as error:
        codec.decode("x", parts, (3, 40))
    assert error.value.code == code


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_any_bytes_of_a_peer_are_finite_numbers(name: str) -> None:
    """-128 and the nibble 0 are never sent, and the largest scale is."""
    codec = CODECS[name]
    parts = codec.encode("x", torch.zeros(1, 32))
    parts["x"] = torch.full_like(parts["x"], -128 if name == "int8" else 0)
    parts["x.scale"].fill_(torch.finfo(parts["x.scale"].dtype).max)
    assert torch.isfinite(codec.decode("x", parts, (1, 32))).all()


def test_a_codec_that_this_side_lacks_is_named() -> None:
    with pytest.raises(
        ConfigError,
        match=r"one of fp32, bf16, fp16, int8, int4, int4_stochastic, found 'int3'.*same hsplit_flwr version",
    ):
        codec_named("int3")
