"""Which module gets which rank and scaling, as PEFT itself resolves the same patterns; and fresh factors."""

import json
import math
from typing import Any

import pytest
import torch

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.factors import LoraFactors, init_lora_A
from hsplit_flwr.lora.module_choice import ALL_LINEAR
from hsplit_flwr.lora.spec import LoraSpec, is_literal
from tests.helpers.models import tiny_model

pytestmark = pytest.mark.timeout(20)

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LEAVES = ATTENTION + MLP
NAMES = [
    f"model.layers.{block}.{part}.{leaf}"
    for block in range(12)
    for part, leaves in (("self_attn", ATTENTION), ("mlp", MLP))
    for leaf in leaves
]

PATTERNS: dict[str, tuple[dict[str, int], dict[str, float]]] = {
    "none": ({}, {}),
    "leaf": ({"q_proj": 2, "down_proj": 3}, {"q_proj": 5.0}),
    "part of a leaf is no match": ({"proj": 2, "_proj": 3}, {"roj": 5.0}),
    "block": ({r"layers\.1\..*": 2}, {r"layers\.1\..*": 5.0}),
    "block 1 is not block 11": ({r"1\..*": 2, r"11\..*": 3}, {}),
    "dot matches anything": ({"self.attn.q_proj": 2, "layers.1.mlp.up_proj": 3}, {"layers.1.mlp.up_proj": 7.0}),
    "whole name": ({r"model\.layers\.2\.mlp\.up_proj": 1}, {r"model\.layers\.2\.mlp\.up_proj": 0.5}),
    "anchored": ({r"^model\.layers\.0\.self_attn\.q_proj$": 2, r"^layers\.0\..*": 3}, {}),
    "first match wins": ({"q_proj": 2, r"0\.self_attn\.q_proj": 3}, {r"0\.self_attn\.q_proj": 3.0, "q_proj": 5.0}),
    "alternatives": ({"q_proj|v_proj": 2, r"(3|4|5)\.mlp\.(up|down)_proj": 3}, {"k_proj|o_proj": 1.0}),
    "class": ({r"layers\.[02468]\..*": 2, r".*attn.*": 6}, {r".*": 9.0}),
    "alpha without rank": ({}, {"v_proj": 1.5}),
}


@pytest.mark.parametrize(("ranks", "alphas"), PATTERNS.values(), ids=PATTERNS)
def test_patterns_resolve_as_in_peft(ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """The independent reference: PEFT's own layers, on a model of 4 blocks."""
    import peft

    model = tiny_model("llama")
    names = [name for name in NAMES if int(name.split(".")[2]) < 4]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, rank_pattern=ranks, alpha_pattern=alphas)
    wrapped = peft.inject_adapter_in_model(config, model)
    theirs = {name: wrapped.get_submodule(name) for name in names}
    spec = LoraSpec(4, 8.0, ALL_LINEAR, ranks, alphas)
    assert {name: spec.rank(name) for name in names} == {name: layer.r["default"] for name, layer in theirs.items()}
    for name, layer in theirs.items():
        assert spec.scaling(name) == pytest.approx(layer.scaling["default"], rel=1e-12), name


@pytest.mark.parametrize(("ranks", "alphas"), PATTERNS.values(), ids=PATTERNS)
def test_patterns_resolve_as_in_peft_on_many_blocks(ranks: dict[str, int], alphas: dict[str, float]) -> None:
    from peft.utils.other import get_pattern_key

    spec = LoraSpec(4, 8.0, ALL_LINEAR, ranks, alphas)
    for name in NAMES:
        rank = ranks.get(get_pattern_key(ranks, name), 4)
        assert spec.rank(name) == rank
        assert spec.scaling(name) == pytest.approx(alphas.get(get_pattern_key(alphas, name), 8.0) / rank, rel=1e-12)


def test_targets_are_name_endings_in_the_models_order() -> None:
    names = NAMES[:14]
    assert LoraSpec().targets(names) == names
    assert LoraSpec().targets(iter(names)) == names
    assert LoraSpec(target_modules=("v_proj", "q_proj")).targets(names) == [n for n in names if n[-6:-5] in "qv"]
    assert LoraSpec(target_modules=("1.mlp.up_proj",)).targets(names) == ["model.layers.1.mlp.up_proj"]
    assert LoraSpec(target_modules=(names[3],)).targets(names) == [names[3]]
    assert LoraSpec(target_modules="q_proj") == LoraSpec(target_modules=("q_proj",))


def test_rank_zero_is_no_target() -> None:
    names = NAMES[:14]
    spec = LoraSpec(4, rank_pattern={r"layers\.0\..*": 0, "mlp.*": 0})
    assert spec.targets(names) == [n for n in names if "layers.1.self_attn" in n]
    assert LoraSpec(0).targets(names) == []
    assert LoraSpec(0, rank_pattern={"q_proj": 1}).targets(names) == [n for n in names if n.endswith("q_proj")]


@pytest.mark.parametrize("target", ["proj", "query", "lm_head", "layers.1", "q_proj$", ""])
def test_a_target_that_matches_nothing_is_refused(target: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        LoraSpec(target_modules=("q_proj", target)).targets(NAMES)
    message = str(refusal.value)
    assert f"found [{target!r}]" in message
    assert all(leaf in message for leaf in LEAVES)
    assert ALL_LINEAR in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": -1}, r"ranks to be integers >= 0, found \[-1\]. Use 0 for 'no adapter'"),
        ({"r": 2.0}, r"integers >= 0, found \[2.0\]"),
        ({"r": True}, r"integers >= 0, found \[True\]"),
        ({"r": "8"}, r"integers >= 0, found \['8'\]"),
        ({"rank_pattern": {"q_proj": -2}}, r"integers >= 0, found \[8, -2\]"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"integers >= 0, found \[8, 1.5\]"),
        ({"lora_alpha": 0}, r"every lora_alpha to be a finite number > 0, found \[0\]"),
        ({"lora_alpha": -8.0}, r"every lora_alpha to be a finite number > 0"),
        ({"lora_alpha": math.nan}, r"every lora_alpha to be a finite number > 0"),
        ({"lora_alpha": math.inf}, r"every lora_alpha to be a finite number > 0"),
        ({"alpha_pattern": {"q_proj": "8"}}, r"every lora_alpha to be a finite number > 0"),
        ({"rank_pattern": {"q_proj(": 4}}, r"a regular expression in a pattern, found 'q_proj\("),
        ({"target_modules": ()}, r"target_modules, found none. Use 'all-linear'"),
        ({"alpha_pattern": {"q_proj": 0.0}}, r"every lora_alpha to be a finite number > 0, found \[16.0, 0.0\]"),
    ],
    ids=str,
)
def test_bad_specs_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"Expected .*{message}"):
        LoraSpec(**arguments)


@pytest.mark.parametrize(
    "spec",
    [LoraSpec(), LoraSpec(0), LoraSpec(3, 7.5, ("q_proj", "up_proj"), {"a": 1, "b": 0}, {"c": 0.25})],
    ids=["default", "zero", "full"],
)
def test_a_spec_survives_json_with_the_order_of_its_patterns(spec: LoraSpec) -> None:
    found = LoraSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert found == spec
    assert list(found.rank_pattern) == list(spec.rank_pattern)
    assert isinstance(found.target_modules, str) == isinstance(spec.target_modules, str)


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(4, rank_pattern={r"layers\.0\..*": 0, "mlp.*": 2}, alpha_pattern={".*q_proj": 3.0, "down.proj": 0.1}),
        LoraSpec(3, 7.5, ("q_proj", "up_proj"), alpha_pattern={r"layers\.[01]\..*": 0.3}),
        LoraSpec(0, rank_pattern={"nothing.*": 1}),
    ],
    ids=["ranks", "targets", "nothing"],
)
def test_a_spec_spelled_out_gives_the_same_adapters_without_regular_expressions(spec: LoraSpec) -> None:
    spelled = spec.spelled_out(NAMES)
    assert not all(map(is_literal, [*spec.rank_pattern, *spec.alpha_pattern]))
    assert all(map(is_literal, [*spelled.rank_pattern, *spelled.alpha_pattern]))
    assert spelled.targets(NAMES) == spec.targets(NAMES)
    for name in spec.targets(NAMES):
        assert (spelled.rank(name), spelled.scaling(name)) == (spec.rank(name), spec.scaling(name))


def test_a_spec_of_plain_names_is_sent_as_it_is() -> None:
    spec = LoraSpec(4, 8.0, ("q_proj",), {"up_proj": 2, r"layers\.1\.mlp\.up_proj": 3})
    assert spec.spelled_out(NAMES) is spec
    assert [is_literal(key) for key in ("q.proj", r"q\.proj", "a|b", r"\d", "q_proj", "(", "")] == [
        False, True, False, False, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"r": None}], ids=["one more", "one less"])
def test_a_spec_of_other_keys_is_refused(change: dict[str, Any]) -> None:
    data = {key: value for key, value in {**LoraSpec().to_dict(), **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=r"Expected a LoRA spec with the keys .*found"):
        LoraSpec.from_dict(data)


def test_the_dense_update_of_factors() -> None:
    factors = LoraFactors(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [-1.0]]), 0.5)
    assert factors.rank == 1
    assert torch.equal(factors.delta(), torch.tensor([[5.0, 10.0, 15.0], [-0.5, -1.0, -1.5]]))


def test_a_fresh_A_is_that_of_peft_in_distribution() -> None:
    """PEFT and nn.Linear: Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(d_in)."""
    rank, d_in = 64, 300
    A = init_lora_A(rank, d_in, seed=3)
    assert A.shape == (rank, d_in)
    assert A.dtype == torch.float32
    bound = 1 / math.sqrt(d_in)
    assert 0.99 * bound < A.abs().max() <= bound
    assert A.mean().abs() < 4 * bound / math.sqrt(3 * A.numel())  # four standard errors
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    torch.manual_seed(0)
    theirs = torch.empty(rank, d_in)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5))
    assert A.std().item() == pytest.approx(theirs.std().item(), rel=0.03)


def test_a_fresh_A_depends_on_its_seed_alone() -> None:
    expected = init_lora_A(4, 10, seed=1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(init_lora_A(4, 10, seed=1), expected)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers stay as they are
    assert not torch.equal(init_lora_A(4, 10, seed=2), expected)


def test_planned_ranks_scale_as_rslora_does_and_can_be_sent() -> None:
    ranks = {"h.0.q": 4, "h.1.q": 9, "h.2.q": 0}
    spec = LoraSpec.of_ranks(ranks, 6.0, use_rslora=True)
    assert [spec.scaling(name) for name in ("h.0.q", "h.1.q")] == [3.0, 2.0]
    assert LoraSpec.from_dict(spec.to_dict()) == spec
    assert [LoraSpec.of_ranks(ranks, 6.0).scaling(name) for name in ("h.0.q", "h.1.q")] == [1.5, 6 / 9]
