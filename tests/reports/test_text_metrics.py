import math
import socket
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.reports import text_metrics
from hsplit_flwr.reports.text_metrics import score_texts

TEXTS = [
    "The Otter is a cheap Thai restaurant near the river.",
    "Blue Fox serves French food, and families are welcome!",
    "There is a pub called The Owl.",
]
REFERENCES = [
    ["The Otter is a low-priced Thai restaurant by the river.", "Near the river, The Otter serves cheap Thai food."],
    ["Blue Fox serves French food. Families are welcome.", "Families like the French food of Blue Fox.", "Blue Fox!"],
    ["The Owl is a pub."],
]
EXACT = 1e-12


def test_bleu_pools_clipped_counts_by_hand() -> None:
    # 1- to 4-grams right: 5/6 ("the" counts once), 3/5, 2/4, 1/3
    scores = score_texts(["The cat sat on the mat"], [["the cat sat on a mat"]])
    assert scores.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, rel=EXACT)
    # a second reference allows the second "the" and "on the"; a second text adds to the same fractions
    more = score_texts(
        ["The cat sat on the mat", "a dog ran off"],
        [["the cat sat on a mat", "the dog on the sofa"], ["a dog ran off"]],
    )
    assert more.bleu == pytest.approx(100 * (10 / 10 * 7 / 8 * 4 / 6 * 2 / 4) ** 0.25, rel=EXACT)


def test_bleu_punishes_a_short_text_against_the_closest_reference() -> None:
    scores = score_texts(["the cat sat on"], [["the cat sat on the mat", "one two three four five six seven eight"]])
    assert scores.bleu == pytest.approx(100 * math.exp(1 - 6 / 4), rel=EXACT)


def test_tokens_are_those_of_mteval_13a() -> None:
    tokens = text_metrics._tokenize("It's £20-25, (Family-friendly) &amp; 3.5 stars.")
    assert tokens == ["it's", "£20", "-", "25", ",", "(", "family-friendly", ")", "&", "3.5", "stars", "."]
    assert text_metrics._words(tokens) == ["it's", "£20", "25", "family-friendly", "3.5", "stars"]


def test_nist_by_hand() -> None:
    # references "a a b" and "a c": 5 words, a 3 times. info(a) = log2 5/3, info(b) = info(c) = log2 5,
    # info(a b) = info(a c) = log2 3/1. All n-grams of the texts are right; 4 words against 5.
    unigrams = (2 * math.log2(5 / 3) + 2 * math.log2(5)) / 4
    bigrams = 2 * math.log2(3) / 2
    penalty = math.exp(math.log(0.5) * (math.log(4 / 5) / math.log(1.5)) ** 2)
    assert score_texts(["a b", "a c"], [["a a b"], ["a c"]]).nist == pytest.approx(
        penalty * (unigrams + bigrams), rel=EXACT
    )


def nist_of_mteval(texts: list[list[str]], references: list[list[str]]) -> float:
    """mteval-13a's rule for one reference per text (Doddington 2002, equations 2 and 3), n up to 5."""
    grams = [[Counter(zip(*(s[i:] for i in range(n)), strict=False)) for s in references] for n in range(1, 6)]
    counts: Counter[tuple[str, ...]] = sum((c for order in grams for c in order), Counter())
    counts[()] = sum(map(len, references))
    total = 0.0
    for n in range(1, 6):
        found = [Counter(zip(*(t[i:] for i in range(n)), strict=False)) for t in texts]
        right = sum((f & g for f, g in zip(found, grams[n - 1], strict=True)), Counter())
        gain = sum(count * math.log2(counts[gram[:-1]] / counts[gram]) for gram, count in right.items())
        total += gain / sum(f.total() for f in found)
    ratio = min(1.0, sum(map(len, texts)) / sum(map(len, references)))
    return total * math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2)


def test_nist_with_one_reference_is_that_of_mteval() -> None:
    references = [entry[:1] for entry in REFERENCES]
    split = text_metrics._tokenize
    expected = nist_of_mteval([split(text) for text in TEXTS], [split(entry[0]) for entry in references])
    assert score_texts(TEXTS, references).nist == pytest.approx(expected, rel=EXACT)


def test_rouge_l_is_the_published_example() -> None:
    """Lin 2004, section 3.1: S2 0.75 and S3 0.5; of several references the best counts."""
    reference = "police killed the gunman"
    assert score_texts(["police kill the gunman"], [[reference]]).rouge_l == pytest.approx(0.75, rel=EXACT)
    assert score_texts(["the gunman kill police"], [[reference]]).rouge_l == pytest.approx(0.5, rel=EXACT)
    both = score_texts(["The gunman, kill police!"], [["nobody", reference]])
    assert both.rouge_l == pytest.approx(0.5, rel=EXACT)


def test_rouge_l_is_f1_by_hand() -> None:
    # longest common subsequence "a b d": precision 3/4, recall 3/6
    assert score_texts(["a b c d"], [["x a b y d z"]]).rouge_l == pytest.approx(2 * 0.75 * 0.5 / 1.25, rel=EXACT)


@pytest.mark.parametrize(
    ("text", "matches", "chunks"),
    [
        ("on the mat sat the cat", 6, 6),  # every word apart from its neighbours
        ("the cat sat on the mat", 6, 1),
        ("the cat was sat on the mat", 6, 2),
        ("the cats sitting on the mat", 5, 2),  # a stem matches (cats), an irregular form does not (sitting)
        ("nothing", 0, 0),
    ],
)
def test_meteor_punishes_fragments_by_hand(text: str, matches: int, chunks: int) -> None:
    """Banerjee and Lavie 2005: F = 10PR / (R + 9P), less half the cube of chunks per match."""
    expected = 0.0
    if matches:
        precision, recall = matches / len(text.split()), matches / 6
        expected = 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / matches) ** 3)
    assert score_texts([text], [["the cat sat on the mat"]]).meteor == pytest.approx(expected, rel=1e-9)


def test_meteor_matches_synonyms_but_not_other_words() -> None:
    def meteor(word: str) -> float:
        return score_texts([f"a fine {word}"], [["a fine movie"]]).meteor

    assert meteor("film") == meteor("movie") == pytest.approx(1 - 0.5 / 27, rel=EXACT)
    assert meteor("river") == pytest.approx(2 / 3 * (1 - 0.5 / 8), rel=EXACT)
    # both by their stems: cheap and inexpens, pub and pub
    assert score_texts(["cheap pubs"], [["inexpensive pub"]]).meteor == pytest.approx(1 - 0.5 / 8, rel=EXACT)


def cider_of_formula(texts: list[list[str]], references: list[list[list[str]]]) -> float:
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726, section 6) over dense vectors of all n-grams, n = 1..4."""
    scores = np.zeros((len(texts), 4))
    for n in range(1, 5):

        def grams(words: list[str], n: int = n) -> list[tuple[str, ...]]:
            return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

        sentences = [*texts, *(sentence for entry in references for sentence in entry)]
        column = {gram: i for i, gram in enumerate(sorted({gram for words in sentences for gram in grams(words)}))}
        seen = np.zeros(len(column))
        for entry in references:
            seen[[column[gram] for gram in {gram for words in entry for gram in grams(words)}]] += 1
        rarity = np.log(len(texts)) - np.log(np.maximum(seen, 1))

        def vector(
            words: list[str], grams: Any = grams, column: dict[Any, int] = column, rarity: Any = rarity
        ) -> np.ndarray[Any, Any]:
            counts = np.zeros(len(column))
            np.add.at(counts, [column[gram] for gram in grams(words)], 1)
            return np.asarray(counts * rarity)

        for i, (text, entry) in enumerate(zip(texts, references, strict=True)):
            for words in entry:
                mine, other = vector(text), vector(words)
                norm = np.linalg.norm(mine) * np.linalg.norm(other)
                cosine = np.minimum(mine, other) @ other / norm if norm else 0.0
                # coco-caption measures length in bigrams
                difference = max(len(text) - 1, 0) - max(len(words) - 1, 0)
                scores[i, n - 1] += 10 * cosine * np.exp(-(difference**2) / (2 * 6.0**2)) / len(entry)
    return float(scores.mean())


def test_cider_is_its_formula() -> None:
    def words(text: str) -> list[str]:
        return text_metrics._words(text_metrics._tokenize(text))

    expected = cider_of_formula([words(t) for t in TEXTS], [[words(r) for r in entry] for entry in REFERENCES])
    assert expected > 1
    assert score_texts(TEXTS, REFERENCES).cider == pytest.approx(expected, rel=1e-9)


def test_perfect_texts_score_the_maximum() -> None:
    texts = ["the red fox runs home", "a small owl sleeps here"]
    scores = score_texts(texts, [[text] for text in texts])
    assert scores.bleu == pytest.approx(100, rel=EXACT)
    assert scores.rouge_l == 1
    assert scores.cider == pytest.approx(10, rel=EXACT)
    assert scores.meteor == pytest.approx(1 - 0.5 / 125, rel=EXACT)
    assert scores.nist == pytest.approx(math.log2(10), rel=EXACT)  # ten words, each once; longer n-grams tell nothing


def test_case_and_outer_spaces_do_not_count_but_order_of_references_and_texts_is_free() -> None:
    scores = score_texts(TEXTS, REFERENCES)
    assert score_texts([f" {text.upper()}\n" for text in TEXTS], REFERENCES) == scores
    turned = score_texts(TEXTS[::-1], [entry[::-1] for entry in REFERENCES[::-1]])
    assert vars(turned) == pytest.approx(vars(scores), rel=1e-9)


def test_empty_texts_have_nothing_right() -> None:
    scores = score_texts(["", "..."], [["a pub"], ["an inn"]])
    assert set(vars(scores).values()) == {0.0}
    half = score_texts(["", "an inn here"], [["a pub here"], ["an inn here"]])
    assert half.rouge_l == 0.5
    assert half.cider == pytest.approx(10 * 3 / 4 / 2)  # three words have no 4-gram


@pytest.mark.parametrize(
    ("texts", "references", "message"),
    [
        ([], [], "at least one text to score, found none"),
        (["a", "b"], [["a"]], "each of 2 texts, found 1 entries"),
        (["a", "b"], [["a"], []], r"at least one sentence in references\[1\], found none"),
        (["a"], [["a", " ."]], r"sentences with words in references\[0\], found ' \.'"),
        (["a"], ["a pub"], r"a list of sentences as references\[0\], found the string 'a pub'"),
    ],
)
def test_wrong_input_is_refused(texts: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score_texts(texts, references)


@pytest.mark.parametrize(
    "module",
    [
        "sacrebleu.metrics",
        "nltk.translate.nist_score",
        "nltk.translate.meteor_score",
        "rouge_score.rouge_scorer",
        "pycocoevalcap.cider.cider_scorer",
        "pycocoevalcap.meteor",
    ],
)
def test_missing_package_names_the_remedy(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text_metrics._synonym_sets.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"found .*{module}.* pip install 'hsplit_flwr\[evidence\]'"):
        score_texts(["a"], [["a"]])


def test_needs_neither_network_nor_java(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened a socket or started a process")

    text_metrics._synonym_sets.cache_clear()
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert score_texts(TEXTS, REFERENCES).bleu > 0


def test_import_alone_loads_no_metric() -> None:
    code = (
        "import sys, hsplit_flwr.reports.text_metrics; "
        "print(*{'nltk', 'sacrebleu', 'rouge_score', 'pycocoevalcap'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
