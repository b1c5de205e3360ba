"""Tokenizers with chat templates, and examples of every form, for tests of people's own data. Nothing is downloaded."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hsplit_flwr.models.assets import tiny_checkpoint

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""that of SmolLM2, without its system message; it does not mark what the assistant writes"""
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""the same text, with marks"""
FORGETFUL = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ '<|im_start|>assistant\n[thoughts left out] ' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""writes an answer otherwise once another message follows, as templates of reasoning models do"""

CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Where is the café?"},
            {"role": "assistant", "content": "By the river."},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Is it open? 🙂"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Until when?\nToday, I mean."},
            {"role": "assistant", "content": " Until ten, 日本 time. "},
        ]
    },
    {"messages": [{"role": "user", "content": "Thanks"}, {"role": "assistant", "content": "Welcome"}]},
]
PAIRS: list[dict[str, Any]] = [
    {"prompt": "name[The Mill] =>", "completion": " The Mill is a pub."},
    {"prompt": "Say: ", "completion": "hello there"},
    {"prompt": "two words", "completion": "joined<|endoftext|>"},
    {"prompt": "", "completion": "from nothing"},
]
INSTRUCTIONS: list[dict[str, Any]] = [
    {"instruction": "Name a fruit.", "input": "", "output": "An apple."},
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"instruction": "Say {hello}.", "output": "{hello}"},
]
TEXTS: list[dict[str, Any]] = [{"text": "The Mill is a pub by the river."}, {"text": "It is old."}, {"text": "Ünïcode"}]


def tokenizer(template: str | None = None, *, begins: bool = False) -> PreTrainedTokenizerFast:
    """The tiny checkpoint's tokenizer with a chat template, and, as LLaMA's, with a begin token before every text."""
    found = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint())
    found.chat_template = template
    if begins:
        found.add_special_tokens({"bos_token": "<|begin|>"})
        found.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", found.bos_token_id)]
        )
    return found


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines; returns the path as people type it."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
