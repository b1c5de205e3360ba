"""A tokenizer as llama.cpp reads it: of SentencePiece's kind, or byte-level BPE that cuts words in a way with a name.

llama.cpp has these ways in its code, and a file names one. A wrong name would give other tokens without a word, so only
those are written that are known here, compared with what the tokenizer itself says.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.models.gguf_layouts import ELSE
from hsplit_flwr.models.gguf_sentencepiece import is_sentencepiece, sentencepiece_figures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA_3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's types of tokens"""


def _bytes(*, regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _bytes(regex=False)]


CUTS: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2": [_bytes(regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(regex=True)],
    "llama-bpe": _split(LLAMA_3),
    "qwen2": _split(QWEN_2),
}
"""llama.cpp's name of a way to cut words -> the steps of a tokenizer of the package tokenizers"""
NORMALIZERS = {"qwen2": "NFC"}
"""what a tokenizer may do before: Qwen's composes letters and accents, as texts mostly are; llama.cpp leaves it out"""
SAME_AS_READ = frozenset(["default", "llama-spm"])
"""names that say nothing of words: SentencePiece, and what files say that were made before there were names"""
IGNORES_MERGES = frozenset(["llama-bpe"])
"""those with which llama.cpp takes whole words before it merges"""


def tokenizer_figures(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> dict[str, Any]:
    """What a file says of a tokenizer, by the key after ``tokenizer.``; lists are of one type.

    Args:
        tokenizer: the model's.
        vocab_size: rows of the model's embeddings; ids beyond the tokenizer's become unused tokens.

    Raises:
        UnsupportedModelError: neither kind, a way to cut words that is not in `CUTS`, or see `sentencepiece_figures`.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    tokens, types = _tokens(tokenizer, vocab_size)
    if is_sentencepiece(backend):
        added = tokenizer.added_tokens_decoder.keys()
        figures = sentencepiece_figures(backend, tokens, types, added, tokenizer.unk_token_id)
    else:
        figures = _byte_level_figures(backend, tokens, types)
    figures |= _ends(tokenizer)
    for name, found in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = getattr(tokenizer, f"{found}_token_id")
        if number is not None:
            figures[f"ggml.{name}_token_id"] = int(number)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return {**figures, "chat_template": template} if template else figures


def _byte_level_figures(backend: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    return {
        "ggml.model": "gpt2",
        "ggml.pre": _cut(backend),
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]],
        "ggml.add_space_prefix": False,
    }


def cut_words_as(tokenizer: "PreTrainedTokenizerBase", name: str) -> bool:
    """Let a byte-level BPE tokenizer cut words in llama.cpp's way of that name; False where that is not known here."""
    from tokenizers import Tokenizer

    if name not in CUTS or not tokenizer.is_fast:
        return name in SAME_AS_READ
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if _steps(backend["pre_tokenizer"]) != CUTS[name]:
        steps = [{**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step for step in CUTS[name]]
        backend["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        tokenizer.backend_tokenizer.pre_tokenizer = Tokenizer.from_str(json.dumps(backend)).pre_tokenizer
    return True


def _cut(backend: Mapping[str, Any]) -> str:
    """The name in `CUTS` of how the tokenizer cuts words."""
    model = backend["model"]
    steps = _steps(backend.get("pre_tokenizer"))
    normalizer = (backend.get("normalizer") or {}).get("type")
    if model["type"] == "BPE":
        for name, known in CUTS.items():
            merges_alike = bool(model.get("ignore_merges")) == (name in IGNORES_MERGES)
            if steps == known and merges_alike and normalizer in (None, NORMALIZERS.get(name)):
                return name
    found = json.dumps(backend.get("pre_tokenizer"))[:200]
    raise UnsupportedModelError(
        f"Expected a byte-level BPE tokenizer that cuts words as one of {', '.join(CUTS)} for GGUF, found "
        f"{model['type']}, {normalizer or 'no normalizer'} and {found}. {ELSE}"
    )


def _steps(cutter: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Its steps, without what changes offsets alone."""
    if cutter is None:
        return []
    steps = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _tokens(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the type of every id."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if beyond := [token for number, token in by_id.items() if number >= vocab_size]:
        raise UnsupportedModelError(
            f"Expected tokens within the model's vocabulary of {vocab_size}, found {len(beyond)} beyond it, such as "
            f"{beyond[0]!r}. Take model and tokenizer of one checkpoint."
        )
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(vocab_size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number in added:
            types.append(CONTROL if added[number].special else USER_DEFINED)
        else:
            types.append(NORMAL if number in by_id else UNUSED)
    return tokens, types


def _ends(tokenizer: "PreTrainedTokenizerBase") -> dict[str, bool]:
    """Whether the tokenizer puts its begin and end tokens around a text."""
    ids = tokenizer("a")["input_ids"]
    return {
        "ggml.add_bos_token": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "ggml.add_eos_token": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
