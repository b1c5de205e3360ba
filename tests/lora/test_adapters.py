"""Adapters in and out of segments through PEFT, checked on delta-W against PEFT itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import Segment, linear_shape, segment_from_model
from tests.helpers.models import HIDDEN_SIZE, NUM_BLOCKS, tiny_model
from tests.helpers.states import through_disk

pytestmark = pytest.mark.timeout(30)

EXACT = 1e-6
"""absolute, float32: two ways to multiply the same factors"""
LORA = LoraSpec(4, 8.0, rank_pattern={r"1\..*": 2, r"2\..*(c_fc|up_proj)": 0}, alpha_pattern={r"3\..*": 2.0})
SEGMENTS = [(0, NUM_BLOCKS), (0, 2), (2, NUM_BLOCKS), (1, 3)]
everywhere = pytest.mark.parametrize(("name", "start", "stop"), [(n, *s) for n in ("gpt2", "llama") for s in SEGMENTS])


def make(name: str, start: int = 0, stop: int = NUM_BLOCKS, spec: LoraSpec = LORA) -> tuple[Segment, SegmentAdapters]:
    segment = segment_from_model(tiny_model(name), start, stop)
    return segment, SegmentAdapters(segment, spec)


def randomise(adapters: SegmentAdapters) -> None:
    """As after training: B is not zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.parameters():
        parameter.data.normal_(generator=generator)


def run(segment: Segment) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(2, 5, dtype=torch.int64)
    if segment.start == 0:
        return segment(torch.randint(3, 90, (2, 5), generator=generator), mask).detach()  # type: ignore[no-any-return]
    return segment(torch.randn(2, 5, HIDDEN_SIZE, generator=generator), mask).detach()  # type: ignore[no-any-return]


def lora_layers(segment: Segment) -> Iterator[tuple[str, nn.Module]]:
    for name, module in segment.model.named_modules():
        if hasattr(module, "lora_A"):
            yield segment.global_name(name), module


@everywhere
def test_every_linear_layer_of_the_segment_gets_its_rank(name: str, start: int, stop: int) -> None:
    segment, adapters = make(name, start, stop)
    plain = segment_from_model(tiny_model(name), start, stop).linear_modules()
    expected = {module: LORA.rank(module) for module in plain if LORA.rank(module) > 0}
    found = {module: layer.r["default"] for module, layer in lora_layers(segment)}  # type: ignore[index]
    assert found == expected
    assert adapters.module_names == list(expected)
    per_block = 4 if name == "gpt2" else 7
    assert len(plain) == per_block * (stop - start)
    assert len(expected) == len(plain) - (start <= 2 < stop)  # one module of rank 0
    for module, factors in adapters.factors().items():
        d_out, d_in = linear_shape(plain[module])
        assert (factors.A.shape, factors.B.shape) == ((expected[module], d_in), (d_out, expected[module]))
        assert factors.scaling == LORA.scaling(module)


@everywhere
def test_factors_are_peft_weights_and_their_delta_is_pefts(name: str, start: int, stop: int) -> None:
    segment, adapters = make(name, start, stop)
    randomise(adapters)
    layers = dict(lora_layers(segment))
    for module, factors in adapters.factors().items():
        layer = layers[module]
        assert torch.equal(factors.A, layer.lora_A["default"].weight)  # type: ignore[index, union-attr]
        assert torch.equal(factors.B, layer.lora_B["default"].weight)  # type: ignore[index, union-attr]
        theirs = layer.get_delta_weight("default")  # type: ignore[operator]
        base = layer.get_base_layer()  # type: ignore[operator]
        ours = factors.delta() if isinstance(base, nn.Linear) else factors.delta().T  # Conv1D keeps the transpose
        assert ours.shape == base.weight.shape
        torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=1e-5)


@everywhere
def test_the_segment_computes_with_base_weights_plus_delta(name: str, start: int, stop: int) -> None:
    segment, adapters = make(name, start, stop)
    randomise(adapters)
    for parameter in adapters.parameters():
        parameter.data *= 0.1
    merged = segment_from_model(tiny_model(name), start, stop)
    before = run(merged)
    for module, factors in adapters.factors().items():
        layer = merged.linear_modules()[module]
        delta = factors.delta() if isinstance(layer, nn.Linear) else factors.delta().T
        layer.weight = nn.Parameter(layer.weight.detach() + delta)  # type: ignore[operator]
    expected = run(merged)
    assert (expected - before).abs().max() > 1e-2  # the adapters matter
    torch.testing.assert_close(run(segment), expected, atol=1e-4, rtol=1e-4)


@everywhere
def test_only_adapters_train(name: str, start: int, stop: int) -> None:
    segment, adapters = make(name, start, stop)
    trainable = [p for p in segment.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in adapters.parameters()}
    assert len(adapters.parameters()) == 2 * len(adapters.module_names)
    assert all(p.dtype == torch.float32 for p in trainable)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_fresh_adapter_depends_on_seed_and_module_alone(name: str) -> None:
    """Not on the segment, the other modules' ranks, what was trained before, or the process' random numbers."""
    _, whole = make(name)
    whole.reset(5)
    expected = whole.factors()
    randomise(whole)
    torch.manual_seed(1)
    whole.reset(5)
    for start, stop in SEGMENTS[1:]:
        _, part = make(name, start, stop)
        randomise(part)
        part.reset(5)
        for module, factors in part.factors().items():
            assert torch.equal(factors.A, expected[module].A)
            assert torch.equal(factors.B, torch.zeros_like(expected[module].B))
            assert torch.equal(whole.factors()[module].A, factors.A)
    whole.reset(6)
    for module, factors in whole.factors().items():
        assert not torch.equal(factors.A, expected[module].A)
    assert len({float(f.A[0, 0]) for f in expected.values()}) == len(expected)  # no two modules start alike


def test_a_lower_rank_starts_with_rows_of_its_own_module() -> None:
    """A client of rank 2 and one of rank 4 start from nested subspaces where their seeds agree."""
    _, wide = make("llama", spec=LoraSpec(4, 8.0))
    _, narrow = make("llama", spec=LoraSpec(2, 4.0))
    wide.reset(5)
    narrow.reset(5)
    for module, factors in narrow.factors().items():
        assert torch.equal(factors.A, wide.factors()[module].A[:2])


def test_reset_forgets_gradients() -> None:
    segment, adapters = make("llama", 2)
    segment(torch.randn(1, 3, HIDDEN_SIZE), torch.ones(1, 3)).sum().backward()
    assert any(p.grad is not None for p in adapters.parameters())
    adapters.reset(1)
    assert all(p.grad is None for p in adapters.parameters())


@everywhere
def test_fresh_adapters_change_nothing_and_remove_restores(name: str, start: int, stop: int) -> None:
    plain = segment_from_model(tiny_model(name), start, stop)
    expected = run(plain)
    names = [module for module, _ in plain.model.named_modules()]
    segment, adapters = make(name, start, stop)
    adapters.reset(3)
    torch.testing.assert_close(run(segment), expected, atol=0, rtol=0)
    randomise(adapters)
    assert not torch.allclose(run(segment), expected)
    adapters.remove()
    assert torch.equal(run(segment), expected)
    assert [module for module, _ in segment.model.named_modules()] == names
    assert segment.model.state_dict().keys() == plain.model.state_dict().keys()
    assert adapters.module_names == []
    assert adapters.factors() == {}


def test_factors_are_copies() -> None:
    _, adapters = make("llama", 2)
    adapters.reset(1)
    before = adapters.factors()
    kept = {module: factors.A.clone() for module, factors in before.items()}
    randomise(adapters)
    assert all(torch.equal(before[module].A, A) for module, A in kept.items())


def test_a_subset_of_modules() -> None:
    segment = segment_from_model(tiny_model("llama"))
    names = [name for name in segment.linear_modules() if "layers.3" in name]
    adapters = SegmentAdapters(segment, LoraSpec(2, 4.0, ("q_proj", "down_proj")), names)
    assert adapters.module_names == ["model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj"]
    assert [module for module, _ in lora_layers(segment)] == adapters.module_names


def test_no_rank_at_all_leaves_the_segment_plain() -> None:
    segment, adapters = make("llama", 2, spec=LoraSpec(0))
    assert adapters.parameters() == []
    assert adapters.factors() == {}
    assert list(lora_layers(segment)) == []
    assert not any(p.requires_grad for p in segment.parameters())
    adapters.reset(1)
    adapters.remove()


def test_the_largest_rank_that_a_matrix_can_use() -> None:
    _, adapters = make("llama", spec=LoraSpec(0, 8.0, rank_pattern={r"0\.self_attn\.k_proj": 16, "up_proj": 32}))
    ranks: dict[str, int] = {module: f.rank for module, f in adapters.factors().items()}
    assert ranks["model.layers.0.self_attn.k_proj"] == 16  # 16 x 32: two key heads of eight
    assert set(ranks.values()) == {16, 32}


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        (
            "llama",
            LoraSpec(0, rank_pattern={r"0\.self_attn\.k_proj": 17}),
            "at most 16 for .*k_proj, found 17",
        ),
        ("llama", LoraSpec(33), "at most 32 for model.layers.0.self_attn.q_proj, found 33"),
        ("gpt2", LoraSpec(33), "at most 32 for transformer.h.0.attn.c_attn, found 33"),
    ],
    ids=["grouped keys", "linear", "conv1d"],
)
def test_a_rank_above_the_matrix_is_refused(name: str, spec: LoraSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=f"Expected a rank of {message}.*Lower r or rank_pattern"):
        make(name, spec=spec)


def test_a_target_of_another_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers \['c_attn', 'c_fc', 'c_proj'\], found \['q_proj'\]"):
        make("gpt2", spec=LoraSpec(target_modules=("q_proj",)))


@pytest.mark.parametrize(("layer", "expected"), [(nn.Linear(3, 5), (5, 3))], ids=["linear"])
def test_linear_shape_is_out_by_in(layer: nn.Module, expected: tuple[int, int]) -> None:
    from transformers.pytorch_utils import Conv1D

    assert linear_shape(layer) == expected
    assert linear_shape(Conv1D(5, 3)) == expected  # Conv1D(d_out, d_in) stores (d_in, d_out)


def test_adapters_of_bf16_weights_are_float32() -> None:
    segment = segment_from_model(tiny_model("llama").bfloat16(), 2)
    adapters = SegmentAdapters(segment, LoraSpec(2, 4.0))
    adapters.reset(1)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    hidden = torch.randn(1, 3, HIDDEN_SIZE, dtype=torch.bfloat16)
    segment(hidden, torch.ones(1, 3)).float().sum().backward()
    gradients = [p.grad for p in adapters.parameters() if p.grad is not None]
    assert gradients
    assert all(g.dtype == torch.float32 for g in gradients)
    factors: dict[str, LoraFactors] = adapters.factors()
    assert all(f.A.dtype == f.B.dtype == torch.float32 for f in factors.values())


@everywhere
def test_adapters_go_on_from_their_state_bit_for_bit(name: str, start: int, stop: int, tmp_path: Path) -> None:
    (segment, adapters), (other, restored) = make(name, start, stop), make(name, start, stop)
    randomise(adapters)
    state = through_disk(adapters.state(), tmp_path)
    adapters.reset(3)  # the state is a copy
    randomise(adapters)
    restored.load_state(state)
    assert torch.equal(run(other), run(segment))
    for module, pair in adapters.factors().items():
        found = restored.factors()[module]
        assert torch.equal(found.A, pair.A)
        assert torch.equal(found.B, pair.B)
        assert found.scaling == pair.scaling
