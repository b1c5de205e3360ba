"""A tokenizer of SentencePiece's kind as llama.cpp reads it: tokens with scores instead of merges.

LLaMA 2's is byte-pair encoding over whole texts, with U+2581 for spaces and bytes for what is no token. llama.cpp joins
the neighbours whose text together is the token of the highest score; the package tokenizers joins by a list of pairs.
They are the same where every pair that makes a token is in the list, by token, which is looked at here.
"""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.models.gguf_layouts import ELSE

SPACE = "\u2581"
UNKNOWN, BYTE = 2, 6
"""llama.cpp's types of tokens that only such a tokenizer has"""
_BYTES = re.compile(r"<0x[0-9A-F]{2}>")
_PREPENDED = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]

_log = logging.getLogger("hsplit_flwr")


def is_sentencepiece(backend: Mapping[str, Any]) -> bool:
    """Whether a tokenizer (its ``tokenizer.json``) is byte-pair encoding with bytes for what is no token."""
    return backend["model"]["type"] == "BPE" and bool(backend["model"].get("byte_fallback"))


def sentencepiece_figures(
    backend: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], added: Collection[int], unknown: int | None
) -> dict[str, Any]:
    """What a file says of such a tokenizer, by the key after ``tokenizer.``

    Args:
        backend: its ``tokenizer.json``.
        tokens: the text of every id.
        types: llama.cpp's types of the tokens, but for `UNKNOWN` and `BYTE`.
        added: ids of tokens that are found before all others, such as ``<s>``.
        unknown: the id of ``<unk>``, if there is one.

    Raises:
        UnsupportedModelError: llama.cpp would cut texts into other tokens.
    """
    model = backend["model"]
    if missing := {f"<0x{byte:02X}>" for byte in range(256)} - set(tokens):
        raise _refused("a token for each of the 256 bytes", f"none of {min(missing)}")
    if strange := [key for key in ("dropout", "ignore_merges", "end_of_word_suffix") if model.get(key)]:
        raise _refused("plain byte-pair encoding", strange[0])
    kinds = [BYTE if _BYTES.fullmatch(token) else kind for token, kind in zip(tokens, types, strict=True)]
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": list(tokens),
        "ggml.scores": _scores(model, tokens, added),
        "ggml.token_type": kinds,
        "ggml.add_space_prefix": _adds_space(backend),
    }


def _scores(model: Mapping[str, Any], tokens: Sequence[str], added: Collection[int]) -> list[float]:
    """0 for the token that is made first, one less for each next one; least for those that no pair makes."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    made = [left + right for left, right in pairs]
    order = list(dict.fromkeys(made))
    rank = {token: number for number, token in enumerate(order)}
    ranks = [rank[token] for token in made]
    if ranks != sorted(ranks):
        raise _refused("merges of one token after the other", "merges of one token in several places")
    plain = {token for number, token in enumerate(tokens) if number not in added}
    listed = set(pairs)
    for token in plain:
        for split in range(1, len(token)):
            pair = (token[:split], token[split:])
            if plain.issuperset(pair) and pair not in listed:
                raise _refused("merges of all pairs that make a token", f"none of {pair[0]!r} and {pair[1]!r}")
    return [-float(rank.get(token, len(order))) for token in tokens]


def _adds_space(backend: Mapping[str, Any]) -> bool:
    """Whether a space comes before a text."""
    normalizer, cutter = backend.get("normalizer"), backend.get("pre_tokenizer")
    if cutter is None and normalizer:
        steps = normalizer.get("normalizers", [normalizer])
        if steps in (_PREPENDED, _PREPENDED[1:]):
            return bool(steps == _PREPENDED)
    if normalizer is None and cutter and cutter["type"] == "Metaspace" and not cutter.get("split", True):
        scheme = cutter.get("prepend_scheme", "always")
        if scheme != "never":
            # transformers' own deviation from SentencePiece, which llama.cpp follows; nothing in a file says which.
            where = "a text that begins with one" + (" and after special tokens" if scheme == "first" else "")
            _log.warning("llama.cpp puts a space before %s, where this tokenizer puts none.", where)
        return bool(scheme != "never")
    found = f"{(normalizer or {}).get('type')} and {(cutter or {}).get('type')}"
    raise _refused(f"spaces as {SPACE} and nothing else before the merges", found)


def _refused(expected: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Expected a tokenizer of SentencePiece's kind with {expected} for GGUF, found {found}: llama.cpp would cut "
        f"texts into other tokens. {ELSE}"
    )
