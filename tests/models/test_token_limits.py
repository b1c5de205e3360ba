"""Rows too long and ids outside of the vocabulary are named before the model meets them."""

import logging
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import AutoConfig

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.block_layout import build_skeleton
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import segment_from_model
from hsplit_flwr.models.token_limits import TokenLimits
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.head import train_head
from hsplit_flwr.training.loss import score_segment
from hsplit_flwr.training.session import TailSession
from tests.helpers.models import ARCHITECTURES, VOCAB_SIZE, tiny_model

POSITIONS = 64
WITH_A_TABLE = {"gpt2", "opt", "ctrl"}


def rows(width: int, highest: int = 5) -> torch.Tensor:
    ids = torch.full((2, width), 3)
    ids[1, -1] = highest
    return ids


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_limit_is_where_the_model_itself_breaks(name: str) -> None:
    model = tiny_model(name)
    limit = TokenLimits.of(model).positions
    assert limit == (POSITIONS if name in WITH_A_TABLE else None)
    model(input_ids=rows(POSITIONS))
    if limit is None:
        model(input_ids=rows(POSITIONS + 1))
    else:
        with pytest.raises(IndexError):
            model(input_ids=rows(POSITIONS + 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "gpt_neo", "attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4},
        {"model_type": "gptj", "rotary_dim": 4, "n_layer": 4, "n_head": 4},
    ],
    ids=lambda settings: str(settings["model_type"]),
)
def test_tables_of_other_kinds_count_too(settings: dict[str, object]) -> None:
    config = AutoConfig.for_model(**settings, vocab_size=97, hidden_size=32, max_position_embeddings=POSITIONS)
    assert TokenLimits.of(build_skeleton(config, torch.float32)).positions == POSITIONS


def test_rows_longer_than_the_positions_are_named_before_training() -> None:
    """GPT-2 with 1,000 tokens at 192 positions ended in 'index out of range in self'."""
    head = segment_from_model(tiny_model("gpt2"), 0, 1)
    batch = {"input_ids": rows(100), "attention_mask": torch.ones_like(rows(100)), "labels": rows(100)}
    config = TrainingConfig(rounds=1, local_steps=1, learning_rate=1e-3)
    adapters = SegmentAdapters(head, LoraSpec(2, 4.0))
    with pytest.raises(ConfigError, match=r"at most 64 tokens, the positions .* gpt2 .* found rows of 100\. Lower"):
        train_head(head, adapters, [batch], cast(TailSession, None), config)  # no tail is asked
    with pytest.raises(ConfigError, match="found rows of 100"):
        score_segment(segment_from_model(tiny_model("gpt2")), [batch])


def test_rotary_models_may_go_on_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    head = segment_from_model(tiny_model("llama"), 0, 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            head.check_tokens(rows(81))
    assert [r.getMessage()[:51] for r in caplog.records] == ["Rows of 81 tokens: config.json of this llama model "]


@pytest.mark.parametrize(("highest", "message"), [(VOCAB_SIZE, "found 97"), (-1, "found -1"), (50256, "found 50256")])
def test_ids_outside_of_the_vocabulary_are_named(highest: int, message: str) -> None:
    head = segment_from_model(tiny_model("llama"), 0, 1)
    head.check_tokens(rows(8, VOCAB_SIZE - 1), rows(8, -100))
    with pytest.raises(ConfigError, match=rf"Expected token ids in 0\.\.96, .* {message}\. Use the tokenizer"):
        head.check_tokens(rows(8, highest))
    with pytest.raises(ConfigError, match=rf"Expected labels that are -100 or in 0\.\.96, .* {message}\."):
        head.check_tokens(rows(8), rows(8, highest))


def test_files_know_the_longest_row(tmp_path: Path) -> None:
    for name, expected in (("gpt2", POSITIONS), ("llama", None)):
        tiny_model(name).save_pretrained(tmp_path / name)
        assert ModelFiles.resolve(str(tmp_path / name)).max_positions == expected
