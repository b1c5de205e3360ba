"""Tokenizers of SentencePiece's kind in GGUF files: what llama.cpp does with tokens and scores gives the same ids."""

import json
import logging
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from hsplit_flwr.common.cache_folder import CACHE_VARIABLE
from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.gguf_export import write_gguf
from hsplit_flwr.models.gguf_tokenizer import tokenizer_figures
from tests.helpers.gguf_files import VOCABULARY, fields, small

SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = "▁abcdefghijklmnopqrstuvwxyzTMI'.,2345é"
WORDS = "the mill is a pub by river and metres away it has 345 seats in the café near the theatre"
TEXTS = [
    "the mill is a pub.",
    "It's 2,345 metres away!\n\n  Ünïcode 日本 🙂",
    "a     b   the the",
    "x</s>the mill </s> a",
]
PREPENDED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def like_llama_2(**changes: Any) -> PreTrainedTokenizerFast:
    """Bytes, then tokens that pairs make, then letters; with the normalizer of LLaMA 2's ``tokenizer.json``."""
    made = dict.fromkeys(f"▁{word}"[:end] for word in WORDS.split() for end in range(2, len(word) + 2))
    made |= dict.fromkeys(
        word[start:end] for word in WORDS.split() for start in range(9) for end in range(start + 2, 10)
    )
    made |= dict.fromkeys("▁" * length for length in range(2, 9))
    pieces = [token for token in made if 1 < len(token) <= 8]
    random.Random(3).shuffle(pieces)
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(pieces), *LETTERS]
    known = set(tokens)
    merges = [
        (token[:end], token[end:])
        for token in tokens
        for end in range(1, len(token))
        if {token[:end], token[end:]} <= known and token not in SPECIAL
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = json.loads(LlamaTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer.to_str())
    backend |= {"normalizer": PREPENDED, "pre_tokenizer": None, **changes}
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert {"the", "▁mill"} < known
    return own


def as_llama_cpp_cuts(text: str, said: dict[str, Any]) -> list[int]:
    """Ids by tokens, scores and types of a file alone: neighbours are joined, the best first, then the leftmost."""
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    scores, numbers = said["tokenizer.ggml.scores"], {token: number for number, token in enumerate(tokens)}
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    ids = [said["tokenizer.ggml.bos_token_id"]] if said["tokenizer.ggml.add_bos_token"] else []
    for part in re.split("(" + "|".join(map(re.escape, control)) + ")", text):
        if part in control:
            ids.append(numbers[part])
            continue
        symbols = list(("▁" if part and said["tokenizer.ggml.add_space_prefix"] else "") + part.replace(" ", "▁"))
        while True:
            pairs = enumerate(map("".join, pairwise(symbols)))
            joined = [(scores[numbers[both]], -left) for left, both in pairs if both in numbers]
            if not joined:
                break
            at = -max(joined)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            if symbol in numbers:
                ids.append(numbers[symbol])
            else:
                ids += [numbers[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


def random_texts(number: int) -> list[str]:
    draw = random.Random(7)
    pieces = ["the", " ", "  ", "mill", "é", "日", "a", "</s>", "re", ",", "5", "\n", "th", "e", "▁"]
    return ["".join(draw.choices(pieces, k=draw.randrange(1, 14))) for _ in range(number)]


def test_ids_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    own = like_llama_2()
    write_gguf(small(), own, tmp_path / "own.gguf")
    said = fields(tmp_path / "own.gguf")
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("llama", "default")
    assert said["tokenizer.ggml.add_space_prefix"] is True
    kinds = said["tokenizer.ggml.token_type"]
    assert kinds[:4] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    assert set(kinds[len(own) :]) == {gguf.TokenType.UNUSED}
    assert len(said["tokenizer.ggml.scores"]) == VOCABULARY
    for text in [*TEXTS, " begins with a space", *random_texts(300)]:
        assert as_llama_cpp_cuts(text, said) == own(text)["input_ids"], text


def test_a_run_from_the_file_has_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes Metaspace for such a file, which differs at a first space and after special tokens alone."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    own = like_llama_2()
    write_gguf(small(), own, tmp_path / "own.gguf")
    back = AutoTokenizer.from_pretrained(ModelFiles.resolve(str(tmp_path / "own.gguf")).folder)
    plain = [text for text in [*TEXTS, *random_texts(300)] if "</s>" not in text and text[0] not in " ▁"]
    assert len(plain) > 50
    assert [back(text)["input_ids"] for text in plain] == [own(text)["input_ids"] for text in plain]


@pytest.mark.parametrize(
    ("scheme", "prefix", "message"),
    [("first", True, "after special tokens"), ("always", True, "begins with one,"), ("never", False, "")],
)
def test_transformers_own_way_to_put_a_space_is_told_of(
    scheme: str, prefix: bool, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    own = like_llama_2(normalizer=None, pre_tokenizer=metaspace)
    with caplog.at_level(logging.WARNING, logger="hsplit_flwr"):
        figures = tokenizer_figures(own, VOCABULARY)
    assert figures["ggml.add_space_prefix"] is prefix
    assert (message in caplog.text) if message else not caplog.text
    said = {f"tokenizer.{key}": value for key, value in figures.items()}
    for text in TEXTS[:3]:
        assert as_llama_cpp_cuts(text, said) == own(text)["input_ids"], text


SPLIT = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def changed(change: Any) -> PreTrainedTokenizerFast:
    model = json.loads(like_llama_2().backend_tokenizer.to_str())["model"]
    change(model)
    return like_llama_2(model=model)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            changed(lambda model: model["merges"].pop(10)),
            "merges of all pairs that make a token for GGUF, found none of",
        ),
        (
            changed(lambda model: model["merges"].append(model["merges"].pop(0))),
            "merges of one token in several places",
        ),
        (changed(lambda model: model.update(ignore_merges=True)), "found ignore_merges"),
        (like_llama_2(normalizer={"type": "NFKC"}), "found NFKC and None"),
        (like_llama_2(pre_tokenizer=SPLIT), "found Sequence and Metaspace"),
    ],
)
def test_what_scores_cannot_say_is_refused(own: PreTrainedTokenizerFast, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        tokenizer_figures(own, VOCABULARY)
