"""Easy Data Augmentation of captions (Wei and Zou 2019, arXiv 1901.11196), as CleanCLIP uses it (arXiv 2303.03323).

Each version is made by one of four operations with equal probability: synonym replacement, insertion of a synonym,
swap, deletion; each changes a tenth of the words, at least one. Words are a-z, lower case.
"""

from __future__ import annotations

import itertools
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

STRENGTH = 0.1  # share of the words to change; also the probability of deletion
N_DRAWS = 128
TRIES = 10
MOST_WORDS = 512  # of a caption that are worked on: several times as many as 77 tokens hold
DEBIAN_WORDNET = Path("/usr/share/wordnet")

# Function words of English: never replaced by a synonym.
_FUNCTION_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
itself they them their theirs themselves what which who whom this that these those am is are was were be been being
have has had having do does did doing a an the and but if or because as until while of at by for with about against
between into through during before after above below to from up down in out on off over under again further then once
here there when where why how all any both each few more most other some such no nor not only own same so than too very
s t can will just don should now
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())

# Parts of speech with WordNet's rules of detachment: (ending, replacement), morphy(7WN).
PARTS_OF_SPEECH = {
    "noun": [
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ],
    "verb": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")],
    "adj": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "adv": [],
}


def _words(text: str) -> list[str]:
    text = re.sub(r"['’]", "", text.lower())
    return re.sub(r"[^a-z]+", " ", text).split()


class WordNet:
    """The WordNet database files (index.noun, data.noun, noun.exc, ...; formats wndb(5WN)) in a folder or a zip."""

    def __init__(self, root: Path | zipfile.Path):
        self._index, self._data, self._exceptions = {}, {}, {}
        for part in PARTS_OF_SPEECH:
            lines = (root / f"index.{part}").read_bytes().decode().splitlines()
            self._index[part] = {line.partition(" ")[0]: line for line in lines if not line.startswith(" ")}
            self._data[part] = (root / f"data.{part}").read_bytes()
            pairs = (line.split() for line in (root / f"{part}.exc").read_bytes().decode().splitlines())
            self._exceptions[part] = {form: lemmas for form, *lemmas in pairs}

    def _lemmas(self, word: str, part: str) -> Iterator[str]:
        """The word and its base forms that WordNet lists, without repeats."""
        forms = self._exceptions[part].get(word) or [
            word.removesuffix(ending) + new for ending, new in PARTS_OF_SPEECH[part] if word.endswith(ending)
        ]
        return (form for form in dict.fromkeys([word, *forms]) if form in self._index[part])

    def synonyms(self, word: str) -> list[str]:
        """The other words of all synsets of `word`, most frequent sense first, as a-z and spaces."""
        found: dict[str, None] = {}
        for part in PARTS_OF_SPEECH:
            for lemma in self._lemmas(word, part):
                columns = self._index[part][lemma].split()
                for offset in columns[-int(columns[2]) :]:
                    synset = self._line(part, int(offset))
                    count = int(synset[3], 16)
                    found.update(dict.fromkeys(synset[4 : 4 + 2 * count : 2]))
        plain = (" ".join(_words(re.sub(r"\(.*\)", "", name))) for name in found)
        return [name for name in dict.fromkeys(plain) if name and name != word]

    def _line(self, part: str, offset: int) -> list[str]:
        data = self._data[part]
        return data[offset : data.index(b"\n", offset)].decode().split()


def _find_wordnet() -> tuple[str, Path | zipfile.Path | None]:
    try:
        from nltk.data import path as folders  # pyright: ignore[reportMissingImports] - of an extra
    except ImportError:
        folders = []
    for folder in folders:
        root = Path(folder, "corpora", "wordnet")
        if (root / "data.noun").is_file():
            return "nltk", root
        if root.with_suffix(".zip").is_file():
            return "nltk", zipfile.Path(root.with_suffix(".zip"), "wordnet/")
    if (DEBIAN_WORDNET / "data.noun").is_file():
        return "wordnet-base", DEBIAN_WORDNET
    return "none", None


@cache
def _wordnet() -> WordNet | None:
    root = _find_wordnet()[1]
    return WordNet(root) if root else None


def synonyms_source() -> str:
    """Where synonyms come from: "nltk" (its wordnet corpus), "wordnet-base" (the Debian package), or "none"."""
    return _find_wordnet()[0]


@lru_cache(maxsize=1 << 16)
def wordnet_synonyms(word: str) -> list[str]:
    """Synonyms from whichever WordNet is installed; an empty list without one."""
    wordnet = _wordnet()
    return wordnet.synonyms(word) if wordnet else []


Pick = Callable[[int], int]  # pick(n): the next draw as an integer in 0..n-1


def _replace(words: list[str], n: int, pick: Pick, synonyms: Callable[[str], Sequence[str]]) -> list[str]:
    """Replace n different words, all their occurrences, each by a random synonym."""
    left = [word for word in dict.fromkeys(words) if word not in STOP_WORDS]
    while left and n:
        word = left.pop(pick(len(left)))
        if choices := synonyms(word):
            new = choices[pick(len(choices))]
            words = [new if w == word else w for w in words]
            n -= 1
    return words


def _insert(words: list[str], n: int, pick: Pick, synonyms: Callable[[str], Sequence[str]]) -> list[str]:
    """n times: the first synonym of a random word, at a random place."""
    known = [word for word in words if word not in STOP_WORDS and synonyms(word)]
    words = list(words)
    for _ in range(n if known else 0):
        words.insert(pick(len(words) + 1), synonyms(known[pick(len(known))])[0])
    return words


def _insert_any(words: list[str], n: int, pick: Pick, synonyms: Callable[[str], Sequence[str]]) -> list[str]:
    """As published: of any word, also of one that was inserted, of which TRIES are looked at; never behind the last."""
    words = list(words)
    for _ in range(n):
        drawn = (words[pick(len(words))] for _ in range(TRIES))
        if found := next(filter(None, map(synonyms, drawn)), None):
            words.insert(pick(len(words)), found[0])
    return words


INSERTIONS = {"content": _insert, "any": _insert_any}


def _swap(words: list[str], n: int, pick: Pick) -> list[str]:
    """n times: two random words change places."""
    words = list(words)
    for _ in range(n if len(words) > 1 else 0):
        i, j = pick(len(words)), pick(len(words) - 1)
        j += j >= i
        words[i], words[j] = words[j], words[i]
    return words


def _delete(words: list[str], u: Iterator[float], pick: Pick) -> list[str]:
    """Drop each word with probability STRENGTH, but not all of them."""
    return [word for word in words if next(u) >= STRENGTH] or [words[pick(len(words))]]


def eda(
    caption: str,
    u: np.ndarray,
    synonyms: Callable[[str], Sequence[str]] | None = None,
    insertion: str = "content",
) -> str:
    """One augmented version of the caption from uniform draws u [N_DRAWS], used again from the start when they run out.

    `synonyms` [WordNet, where installed] gives a word's synonyms; where no WordNet is installed only swap and deletion
    are drawn. `insertion` is a key of INSERTIONS. A caption without a letter comes back as it is; of a long one
    MOST_WORDS are left.
    """
    words = _words(caption)[:MOST_WORDS]
    if not words:
        return caption
    if synonyms is None and _wordnet():
        synonyms = wordnet_synonyms
    draws = itertools.cycle(u.tolist())

    def pick(n: int) -> int:
        return int(next(draws) * n)

    n = max(1, int(STRENGTH * len(words)))
    operation = pick(4) if synonyms else 2 + pick(2)
    if synonyms and operation == 0:
        words = _replace(words, n, pick, synonyms)
    elif synonyms and operation == 1:
        words = INSERTIONS[insertion](words, n, pick, synonyms)
    elif operation == 2:
        words = _swap(words, n, pick)
    else:
        words = _delete(words, draws, pick)
    return " ".join(words)
