"""A model whose head and tail together are not the model is refused before it trains, with the figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hsplit_flwr import cli
from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.models import equality, segments, trial
from hsplit_flwr.models.equality import require_cuttable
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.miniature import narrow, random_model
from tests.helpers.models import ARCHITECTURES, tiny_config

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zamba2": (
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "num_key_value_heads": 4,
        },
        r"found that its blocks also read original_hidden_states, which depend on the tokens",
    ),
    "gemma3n_text": (
        {
            "head_dim": 8,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        r"hidden states of the shape|also read per_layer_input",
    ),
    "xlnet": (
        {"n_layer": 4, "d_model": 32, "n_head": 4, "d_inner": 64},
        r"found hidden states of the shape \(2, 1, 16\)",
    ),
}
"""by model type: settings of a tiny one, and why it is refused"""


def test_a_model_that_looks_ahead_is_refused() -> None:
    """What follows the last target does not travel: such a model would train on wrong numbers without a word."""
    config = tiny_config("gemma3_text", True)
    require_cuttable(config)
    config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedModelError, match="found logits that depend on later tokens or on padding"):
        require_cuttable(config)


def config_of(name: str) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.for_model(name, **(_SIZES | REFUSED[name][0]))
    return config


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_equal_when_cut_passes(name: str, tied: bool) -> None:
    require_cuttable(tiny_config(name, tied))


@pytest.mark.parametrize("name", REFUSED)
def test_what_differs_or_fails_is_refused_with_one_clear_error(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[name][1]):
        require_cuttable(config_of(name))


@pytest.mark.parametrize("name", ["zamba2", "xlnet"])
def test_plan_and_run_refuse_the_same(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan said ok to models that the run met with KeyError, AttributeError or wrong numbers."""
    config = config_of(name)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        GlobalModel(ModelFiles.resolve(str(tmp_path)))
    profiles = tmp_path / "fleet.toml"
    profiles.write_text('[server]\ndevice = "workstation"\n[[client]]\ndevice = "phone"\n')
    assert cli.main(["plan", "--model", str(tmp_path), "--profiles", str(profiles)]) == cli.USER_ERROR
    assert capsys.readouterr().err.endswith(f"hsplit-flwr: error: {caught.value}\n")


def test_activations_that_the_model_writes_into_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """CTRL scales its embeddings in place. Once these were a view of the activations: loss 4.526 instead of 4.542."""
    monkeypatch.setattr(equality, "_FAULTS", {})
    monkeypatch.setattr(segments, "stand_in", lambda activations, _size: activations.detach())
    with pytest.raises(UnsupportedModelError, match=r"of a 'ctrl' model .* found"):
        require_cuttable(tiny_config("ctrl", tied=True))
    require_cuttable(tiny_config("llama", tied=True))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda embedded: embedded.mean(-1, keepdim=True), r"found logits that differ by \d.* of the largest one"),
        (lambda embedded: embedded - embedded.detach(), r"found a gradient of model\..* that differs by \d.*"),
    ],
    ids=["values", "gradients alone"],
)
def test_blocks_that_read_the_first_embeddings_are_refused_with_the_figures(
    read: Callable[[Tensor], Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Zamba2, whose logits were 3.57 off: here every block gets them by way of the rotary angles."""
    angles = LlamaRotaryEmbedding.forward

    def forward(self: LlamaRotaryEmbedding, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles(self, x, position_ids)
        return cos + read(x)[..., : cos.shape[-1]], sin

    monkeypatch.setattr(equality, "_FAULTS", {})
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=message):
        require_cuttable(tiny_config("llama", tied=False))


def test_a_config_is_tried_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "_FAULTS", {})
    tried: list[str] = []
    monkeypatch.setattr(equality, "_fault", lambda config: tried.append(config.model_type))
    for name in ("llama", "llama", "gpt2"):
        require_cuttable(tiny_config(name, tied=True))
    require_cuttable(tiny_config("llama", tied=False))
    assert tried == ["llama", "gpt2", "llama"]


def test_the_check_changes_nothing_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's random numbers are the same with and without it; it works where gradients are off."""
    monkeypatch.setattr(equality, "_FAULTS", {})
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with torch.no_grad():
        require_cuttable(tiny_config("gpt2", tied=True))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_miniature_has_all_blocks_and_ties_but_few_parameters(tied: bool) -> None:
    config = AutoConfig.for_model("llama", tie_word_embeddings=tied, num_key_value_heads=8)
    small = random_model(narrow(config))
    assert small.config.num_hidden_layers == config.num_hidden_layers == 32
    assert sum(parameter.numel() for parameter in small.parameters()) < 10_000_000
    assert (small.get_input_embeddings().weight is small.get_output_embeddings().weight) == tied
    assert (config.hidden_size, config.vocab_size) == (4096, 32000)


def test_widths_that_do_not_fit_when_narrow_are_tried_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def misfit(config: PretrainedConfig) -> PretrainedConfig:
        small = narrow(config)
        small.__dict__["num_key_value_heads"] = 3
        return small

    monkeypatch.setattr(equality, "_FAULTS", {})
    monkeypatch.setattr(trial, "narrow", misfit)
    require_cuttable(tiny_config("llama", tied=True))
    with pytest.raises(UnsupportedModelError, match=r"one of 6,738,415,616 parameters whose miniature does not run"):
        require_cuttable(AutoConfig.for_model("llama"))
