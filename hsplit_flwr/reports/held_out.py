"""A result scored on held-out examples: perplexity, exact answers, and how near the others come."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hsplit_flwr.common.tables import format_number, format_table
from hsplit_flwr.data.forms import Example
from hsplit_flwr.data.own_data import OwnData
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.generation import generate_texts
from hsplit_flwr.reports.text_metrics import TextScores, has_words, require_packages, score_texts
from hsplit_flwr.training.loss import Score, target_tokens, token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class HeldOutScore:
    """What a model makes of held-out examples."""

    examples: int
    tokens: int
    """target tokens, over which the loss is the mean"""
    loss: float
    """nats per target token"""
    perplexity: float
    asked: int
    """examples with an answer that the model was asked for: those whose prompt leaves room for one in the model's
    positions; 0: exact answers were not measured"""
    exact: int
    """answers, written greedily, that are those of the file but for spaces around them"""
    texts: TextScores | None = None
    """of all answers whose text in the file has words; None: not asked for, or there are none"""

    def table(self) -> str:
        """The score for people."""
        rows = [
            ["examples", str(self.examples)],
            ["target tokens", f"{self.tokens:,}"],
            ["loss", f"{self.loss:.4f}"],
            ["perplexity", format_number(self.perplexity)],
            ["exact answers", f"{self.exact} of {self.asked}" if self.asked else "not measured"],
        ]
        if self.texts:
            rows += [[name.upper().replace("_", "-"), f"{value:.4f}"] for name, value in asdict(self.texts).items()]
        return format_table(["score", "value"], rows, markdown=False, left_aligned=1)

    def save(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"Expected a file to write the score to, found: {error}.") from error


def score_held_out(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: OwnData,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 0,
    text_scores: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> HeldOutScore:
    """Score `examples` of `data`.

    Args:
        model: a whole causal language model in eval mode.
        tokenizer: its own.
        data: says how examples become rows, and what their loss is on.
        examples: to score.
        max_new_tokens: of an answer; 0: nothing is asked.
        text_scores: also compare the answers' words with those of the file (`text_metrics`).
        progress: see `generate_texts`.

    Raises:
        ConfigError: no target tokens in all of `examples`, or text scores without answers or without their packages.
    """
    if text_scores:
        if not max_new_tokens:
            raise ConfigError("Expected --max-new-tokens above 0 for text scores, found 0: there are no answers then.")
        require_packages()
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for batch in data.scoring_batches(examples):
            logits = model(
                input_ids=batch["input_ids"].to(model.device), attention_mask=batch["attention_mask"].to(model.device)
            ).logits
            nll += float(token_losses(logits, batch["labels"]).double().sum())
            tokens += target_tokens(batch["labels"])
    score = Score(nll, tokens)
    loss = score.loss  # before anything is generated: that takes longer than to find out that nothing is there
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = positions - max_new_tokens if positions else None
    asked = data.asked(examples, longest) if max_new_tokens else []
    texts = generate_texts(
        model, tokenizer, [one.ids for one in asked], max_new_tokens=max_new_tokens or 1, progress=progress
    )
    exact = sum(text == one.answer.strip() for text, one in zip(texts, asked, strict=True))
    worded = [(text, [one.answer]) for text, one in zip(texts, asked, strict=True) if has_words(one.answer)]
    return HeldOutScore(
        examples=len(examples),
        tokens=tokens,
        loss=loss,
        perplexity=score.perplexity,
        asked=len(asked),
        exact=exact,
        texts=score_texts(*zip(*worded, strict=True)) if text_scores and worded else None,
    )
