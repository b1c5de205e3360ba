"""Texts a model writes: many prompts at a time, the most likely continuation of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.streaming import TextPieces, decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """A text that a model wrote."""

    text: str
    """what follows the prompt, without special tokens and outer spaces"""
    ended: bool
    """by its end token; False: cut at ``max_new_tokens``"""


def generate_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    num_beams: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The texts alone of `write_texts`, with its arguments and errors."""
    written = write_texts(
        *(model, tokenizer, prompts),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        num_beams=num_beams,
        progress=progress,
    )
    return [one.text for one in written]


def write_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    num_beams: int = 1,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Written]:
    """The continuation of every prompt by transformers' ``generate``, greedy (``num_beams=1``) or by beam search.

    Sampling is off, so equal weights write equal texts. Prompts are padded on the left here, by the pad token or,
    without one, the end token: the tokenizer is left as it is, and so are the model's mode and device. What a
    checkpoint's own ``generation_config`` says beyond that (a repetition penalty, say) stays in force.

    Args:
        model: a causal language model with its head.
        tokenizer: with an end token, at which a text ends.
        prompts: as in training, `hsplit_flwr.data.text_batches.prompt_text`; texts, or their token ids.
        max_new_tokens: where a text without an end token is cut.
        batch_size: prompts at a time; it changes time and memory only (and, in low precision, ties).
        num_beams: width of the search.
        progress: called after every batch with the number of prompts done and their total.
        say: called with each piece of the text as it is written (see `TextPieces`); of a single prompt, greedy.

    Returns:
        One text per prompt and in its order.

    Raises:
        ConfigError: a number below 1, no end token, a prompt without tokens, or one that leaves too few positions.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("num_beams", num_beams)):
        if value < 1:
            raise ConfigError(f"Expected {name} >= 1, found {value}.")
    if say and (len(prompts) > 1 or num_beams > 1):
        raise ConfigError(
            f"Expected a single prompt and num_beams = 1 where a text is said as it is written, found {len(prompts)} "
            f"and {num_beams}. Leave out `say`."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError("Expected a tokenizer with an end token, found none. Set tokenizer.eos_token.")
    if not prompts:
        return []
    ids = [tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt for prompt in prompts]
    _check_lengths(ids, max_new_tokens, getattr(model.config, "max_position_embeddings", None))
    texts: list[Written] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(ids), batch_size):
            texts += _continue(model, tokenizer, ids[start : start + batch_size], max_new_tokens, num_beams, say)
            if progress is not None:
                progress(len(texts), len(ids))
    finally:
        model.train(was_training)
    return texts


def _check_lengths(ids: Sequence[Sequence[int]], max_new_tokens: int, positions: int | None) -> None:
    lengths = [len(prompt) for prompt in ids]
    if not all(lengths):
        raise ConfigError(
            f"Expected prompts of at least one token, found prompt {lengths.index(0)} without any. Leave it out."
        )
    if positions is not None and max(lengths) + max_new_tokens > positions:
        raise ConfigError(
            f"Expected prompt and text together within the model's {positions} positions, found a prompt of "
            f"{max(lengths)} tokens and max_new_tokens={max_new_tokens}. Lower max_new_tokens or shorten the prompt."
        )


def _continue(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[list[int]],
    max_new_tokens: int,
    num_beams: int,
    say: Callable[[str], None] | None,
) -> list[Written]:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pad = eos if pad is None else pad
    input_ids, attention_mask = _left_padded(ids, pad)
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=num_beams,
            pad_token_id=pad,
            eos_token_id=eos,
            streamer=TextPieces(tokenizer, say) if say else None,
        )
    new: list[list[int]] = output[:, input_ids.shape[1] :].tolist()
    return [Written(decoded(tokenizer, tokens), eos in tokens) for tokens in new]


def _left_padded(ids: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` (B, T) int64; the last column of every row is its prompt's last token."""
    width = max(map(len, ids))
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return input_ids, attention_mask
