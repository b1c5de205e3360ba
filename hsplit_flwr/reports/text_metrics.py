"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of generated texts, by kept implementations, without Java or network.

Text is lower-cased and split as mteval-v13a does (sacrebleu's ``13a``), once, for all five. BLEU and NIST see all
these tokens; METEOR, ROUGE-L and CIDEr only *words*, tokens with a letter or digit, because the scripts they stand
for drop punctuation. How each differs from the E2E NLG challenge's scripts (github.com/tuetschek/e2e-metrics:
mteval-13a; METEOR 1.5, ROUGE_L and CIDEr of coco-caption after its Java PTBTokenizer), with the two numbers for 64
held-out meaning representations of E2E NLG, one human sentence of each scored against the rest of its sentences:

- **BLEU**: sacrebleu 2.6.0. Tokens, case, closest reference length and smoothing as in mteval-13a: the same number
  (case counted, sacrebleu's own default, it would be 60.7 instead of 62.2).
- **NIST**: nltk 3.10.4 ``corpus_nist``, n-grams up to 5. mteval-13a clips an n-gram's count by all references of a
  text together and takes their mean length; nltk takes, for each text and n, the one reference that gives the
  highest precision. The same for a single reference; here, with several: 7.39 instead of 8.35.
- **METEOR**: nltk 3.10.4, the mean over texts of the METEOR of 2007 (alpha 0.9, beta 3, gamma 0.5; exact, Porter stem
  and synonym matches count alike). METEOR 1.5 also matches paraphrases, weighs matches and function words, and is
  tuned: 0.829 instead of 0.472, so *compare it only with itself*. nltk would download WordNet for the synonyms; they
  come from METEOR 1.5's own table instead (made from WordNet), a plain text inside the wheel pycocoevalcap, read as
  a zip archive; surface forms only. Without synonyms it would be 0.822.
- **ROUGE-L**: rouge-score 0.1.2, F1 of the reference with the highest, mean over texts. coco-caption: F with beta
  1.2 of the highest precision and the highest recall, which two references may give: 0.656 instead of 0.674.
- **CIDEr**: pycocoevalcap 1.2, coco-caption's own scorer (CIDEr-D: clipped, length penalty, sigma 6; 0..10), with
  document frequencies from the references given. Only the tokens differ: 2.21 instead of 2.23.
"""

import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from hsplit_flwr.errors import ConfigError

NIST_ORDER = 5
_Tokens = list[str]


@dataclass(frozen=True)
class TextScores:
    """Corpus scores of generated texts; higher is better."""

    bleu: float
    """0..100"""
    nist: float
    meteor: float
    """0..1"""
    rouge_l: float
    """0..1, F1"""
    cider: float


def score_texts(texts: Sequence[str], references: Sequence[Sequence[str]]) -> TextScores:
    """Corpus scores of ``texts``, each against every sentence of its own entry in ``references``.

    As in the E2E challenge, give one text per meaning representation, with all sentences written for it.
    An empty text counts, with nothing right. CIDEr weighs a word by how few entries have it: of a single entry, or
    of entries with the same words, it is 0.

    Args:
        texts: as generated, not tokenised.
        references: as many entries, each of one or more sentences.

    Raises:
        ConfigError: no text, another number of entries, an entry or sentence without words, or a missing package.
    """
    return ScoredTexts(texts, references).scores(range(len(texts)))


class ScoredTexts:
    """Texts whose scores can be had for any choice of them: `score_texts`, with its arguments and errors.

    METEOR, ROUGE-L and CIDEr are means over texts, computed once; CIDEr's document frequencies are of all entries.
    """

    def __init__(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        _check(texts, references)
        self._texts, self._references = texts, references
        self._tokens = [_tokenize(text) for text in texts]
        self._reference_tokens = [[_tokenize(sentence) for sentence in entry] for entry in references]
        words = [_words(text) for text in self._tokens]
        reference_words = [[_words(sentence) for sentence in entry] for entry in self._reference_tokens]
        self._meteor = _meteor(words, reference_words)
        self._rouge_l = _rouge_l(words, reference_words)
        self._cider = _cider(words, reference_words)

    def __len__(self) -> int:
        return len(self._texts)

    def scores(self, chosen: Iterable[int]) -> TextScores:
        """Scores of the texts at the indices `chosen`; one may come more than once."""
        chosen = list(chosen)
        return TextScores(
            bleu=_bleu([self._texts[i] for i in chosen], [self._references[i] for i in chosen]),
            nist=_nist([self._tokens[i] for i in chosen], [self._reference_tokens[i] for i in chosen]),
            meteor=fmean(self._meteor[i] for i in chosen),
            rouge_l=fmean(self._rouge_l[i] for i in chosen),
            cider=fmean(self._cider[i] for i in chosen),
        )


def has_words(text: str) -> bool:
    """Whether there is anything in `text` to compare: a letter or a digit."""
    return any(map(str.isalnum, text))


def require_packages() -> None:
    """Find out before texts are made that a package is missing.

    Raises:
        ConfigError: it is.
    """
    for module in ("sacrebleu.metrics", "nltk.translate", "rouge_score.rouge_scorer", "pycocoevalcap.cider"):
        _package(module)


def _check(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not texts:
        raise ConfigError("Expected at least one text to score, found none.")
    if len(texts) != len(references):
        raise ConfigError(
            f"Expected an entry of references for each of {len(texts)} texts, found {len(references)} entries."
        )
    for index, entry in enumerate(references):
        if isinstance(entry, str):
            raise ConfigError(f"Expected a list of sentences as references[{index}], found the string {entry!r}.")
        if not entry:
            raise ConfigError(f"Expected at least one sentence in references[{index}], found none. Leave the text out.")
        for sentence in entry:
            if not has_words(sentence):
                raise ConfigError(f"Expected sentences with words in references[{index}], found {sentence!r}.")


def _package(module: str) -> Any:
    """A module of the extra ``evidence``: imported when needed, as training needs none of them."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"Expected the packages that text metrics need, found {error}. Run: pip install 'hsplit_flwr[evidence]'"
        ) from error


def _tokenize(text: str) -> _Tokens:
    tokenized: str = _tokenizer()(text.lower())
    return tokenized.split()


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return _package("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()


def _words(tokens: _Tokens) -> _Tokens:
    return [token for token in tokens if any(map(str.isalnum, token))]


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    most = max(map(len, references))
    by_rank = [[entry[rank] if rank < len(entry) else None for entry in references] for rank in range(most)]
    metric = _package("sacrebleu.metrics").BLEU(lowercase=True, tokenize="13a")
    return float(metric.corpus_score(list(texts), by_rank).score)


def _nist(texts: list[_Tokens], references: list[list[_Tokens]]) -> float:
    # nltk divides by the number of n-grams: an order that no text is long enough for has none, and adds nothing
    order = min(NIST_ORDER, max(map(len, texts)))
    return float(_package("nltk.translate.nist_score").corpus_nist(references, texts, order)) if order else 0.0


def _meteor(texts: list[_Tokens], references: list[list[_Tokens]]) -> list[float]:
    score = _package("nltk.translate.meteor_score").meteor_score
    stem = _package("nltk.stem.porter").PorterStemmer().stem
    return [
        score(entry, text, wordnet=_Synonyms(chain(text, *entry), stem))
        for text, entry in zip(texts, references, strict=True)
    ]


def _rouge_l(texts: list[_Tokens], references: list[list[_Tokens]]) -> list[float]:
    scorer = _package("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_SpaceTokenizer())
    pairs = zip(texts, references, strict=True)
    scores = [scorer.score_multi([" ".join(sentence) for sentence in entry], " ".join(text)) for text, entry in pairs]
    return [score["rougeL"].fmeasure for score in scores]


class _SpaceTokenizer:
    """Undoes the joining that rouge-score's interface asks for."""

    def tokenize(self, text: str) -> _Tokens:
        return text.split()


def _cider(texts: list[_Tokens], references: list[list[_Tokens]]) -> list[float]:
    scorer = _package("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    for text, entry in zip(texts, references, strict=True):
        scorer += (" ".join(text), [" ".join(sentence) for sentence in entry])
    _, by_text = scorer.compute_score()
    return [float(score) for score in by_text]


@dataclass(frozen=True)
class _Lemma:
    text: str

    def name(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Synset:
    words: set[str]

    def lemmas(self) -> list[_Lemma]:
        return [_Lemma(word) for word in self.words]


class _Synonyms:
    """METEOR 1.5's synonyms among ``words``, as the part of nltk's WordNet reader that nltk's METEOR uses.

    nltk stems words for its second stage and goes on to the third with the stems, most of which are no words that a
    dictionary has (movi, inexpens). So stems are what is looked up here, and what is found.
    """

    def __init__(self, words: Iterable[str], stem: Callable[[str], str]) -> None:
        self._sets_of: dict[str, set[str]] = defaultdict(set)
        self._stems_of: dict[str, set[str]] = defaultdict(set)
        for word in set(words):
            for number in _synonym_sets().get(word, ()):
                self._sets_of[stem(word)].add(number)
                self._stems_of[number].add(stem(word))

    def synsets(self, stem: str) -> list[_Synset]:
        return [_Synset(self._stems_of[number]) for number in self._sets_of.get(stem, ())]


@lru_cache(maxsize=1)
def _synonym_sets() -> dict[str, list[str]]:
    """Word -> numbers of its sets of synonyms. Read once per process, in about half a second."""
    jar = Path(_package("pycocoevalcap.meteor").__path__[0]) / "meteor-1.5.jar"
    with zipfile.ZipFile(jar) as archive:
        lines = archive.read("synonym/english.synsets").decode().splitlines()  # a word, its numbers, a word, ...
    return {word: numbers.split() for word, numbers in zip(lines[::2], lines[1::2], strict=True)}
