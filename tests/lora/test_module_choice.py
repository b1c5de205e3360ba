"""What gets an adapter, as PEFT itself finds it; what does not fit is refused with the reason."""

import json
from typing import Any

import peft
import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.from_peft import spec_from_peft
from hsplit_flwr.lora.spec import LoraSpec, is_literal
from tests.helpers.models import tiny_model

pytestmark = pytest.mark.timeout(60)

NAMES = [
    f"model.layers.{block}.{layer}"
    for block in range(4)
    for layer in (
        *(f"self_attn.{leaf}_proj" for leaf in "qkvo"),
        *(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
    )
]
CHOICES: dict[str, dict[str, Any]] = {
    "endings": {"target_modules": ["q_proj", "1.mlp.up_proj"]},
    "expression": {"target_modules": r"model\.layers\.[13]\..*(q|v)_proj"},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "2.mlp.down_proj"]},
    "all but an expression": {"target_modules": "all-linear", "exclude_modules": r".*\.(0|3)\.mlp\..*"},
    "blocks": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3]},
    "one block": {"target_modules": ["v_proj"], "layers_to_transform": 2},
    "rank-stabilized": {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {r"1\..*": 3}},
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_config_of_peft_means_the_same_here(choice: dict[str, Any]) -> None:
    """The independent reference: PEFT's own layers on the whole model."""
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **choice)
    spec = spec_from_peft(config)
    wrapped: Any = peft.get_peft_model(tiny_model("llama"), config).base_model.model
    theirs = {name: wrapped.get_submodule(name) for name in NAMES}
    adapted = {name: layer for name, layer in theirs.items() if hasattr(layer, "lora_A")}
    assert spec.targets(NAMES) == list(adapted)
    for name, layer in adapted.items():
        assert spec.rank(name) == layer.r["default"]
        assert spec.scaling(name) == pytest.approx(layer.scaling["default"], rel=1e-12)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_every_choice_travels_by_plain_names(choice: dict[str, Any]) -> None:
    spec = spec_from_peft(peft.LoraConfig(r=4, lora_alpha=8, **choice))
    for cut in (1, 2, 4):
        head = NAMES[: 7 * cut]
        sent = LoraSpec.from_dict(json.loads(json.dumps(spec.spelled_out(head, NAMES).to_dict())))
        assert all(map(is_literal, [*sent.rank_pattern, *sent.alpha_pattern]))
        expected = [name for name in spec.targets(NAMES) if name in head]
        assert sent.targets(head) == expected
        for name in expected:
            assert sent.rank(name) == spec.rank(name)
            assert sent.scaling(name) == pytest.approx(spec.scaling(name), rel=1e-15)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"target_modules": r".*nosuch.*"}, r"target_modules among .*q_proj.*, found \['\.\*nosuch\.\*'\]"),
        ({"target_modules": r"q_(proj"}, r"a regular expression in target_modules, found 'q_\(proj'"),
        ({"exclude_modules": ("q_porj",)}, r"exclude_modules among .*q_proj.*, found \['q_porj'\]"),
        ({"exclude_modules": r"[qv]_porj.*"}, r"exclude_modules among .*, found \['\[qv\]_porj"),
        ({"layers_to_transform": (2, 4)}, r"layers_to_transform among the blocks 0\.\.3, found \[4\]"),
        ({"rank_pattern": {"mlp.c_porj": 8}}, r"rank_pattern to match a linear layer .* found 'mlp\.c_porj'"),
        ({"alpha_pattern": {"mlp.c_porj": 8.0}}, r"alpha_pattern to match a linear layer"),
    ],
)
def test_what_matches_nothing_is_an_error(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraSpec(**choice).check(NAMES)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"use_dora": True}, "no exact sum"),
        ({"init_lora_weights": "pissa"}, "out of the base weights"),
        ({"init_lora_weights": "olora"}, "out of the base weights"),
        ({"bias": "lora_only"}, "only A and B are aggregated"),
        ({"lora_dropout": 0.1}, "set lora-dropout"),
        ({"modules_to_save": ["lm_head"]}, "trained in full"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "fused experts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_exact_aggregation_is_refused_with_the_reason(option: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        spec_from_peft(peft.LoraConfig(target_modules=["q_proj"], **option))


def test_no_expression_is_taken_from_the_wire() -> None:
    data = {**LoraSpec().to_dict(), "target_modules": "(a+)+$"}
    with pytest.raises(ConfigError, match="of plain names"):
        LoraSpec.from_dict(data)
    for spec in (LoraSpec(use_rslora=True), LoraSpec(exclude_modules="q_proj"), LoraSpec(layers_to_transform=(1,))):
        with pytest.raises(ConfigError, match="spelled_out"):
            spec.to_dict()


def test_a_head_need_not_have_a_layer_of_each_kind() -> None:
    """Jamba's first blocks have no attention: a head of them gets no adapter for q_proj, and no error either."""
    hybrid = ["model.layers.0.mamba.in_proj", "model.layers.1.self_attn.q_proj", "model.layers.2.mamba.in_proj"]
    spec = LoraSpec(2, target_modules=("q_proj",))
    assert spec.spelled_out(hybrid[:1], hybrid).targets(hybrid[:1]) == []
    assert spec.spelled_out(hybrid[:2], hybrid) is spec
