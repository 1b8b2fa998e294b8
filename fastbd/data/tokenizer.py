"""Captions to CLIP's byte-pair tokens (Radford et al. 2021, arXiv 2103.00020, section 2.4)."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastbd.base.text import clean
from fastbd.kernels.text_pack import END, lengths_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 77
VOCABULARY = 49408
START = END - 1
SHORT = 1000  # characters; the words of longer texts would crowd others out of the memory for words
# OpenAI's program ignores case although its text is in lower case: so "'ſ" is an "'s", and it loses U+0345.
WORDS = r"'[sſtmd]|'re|'ve|'ll|\p{L}+|\p{N}|[^\s\p{L}\p{N}\u0345]+"
ASCII_WORDS = re.compile(r"'[stmd]|'re|'ve|'ll|[a-z]+|[0-9]|[^\sa-z0-9]+")


@cache
def _byte_of() -> dict[str, int]:
    """The bytes that characters of the vocabulary stand for, in its order: first those that can be seen, themselves."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = (byte for byte in range(256) if byte not in seen)
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(rest)}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Make many objects at once, all of use: a search for garbage among PyTorch's takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
@_no_collection()
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's tokens with their ids, in the ids' order, and its merges in theirs, as OpenAI's program writes both."""
    text = Path(__file__).with_name("clip_merges.txt").read_text(encoding="utf-8").partition("\n\n")[2]
    parts = text.split()
    merges = list(zip(parts[::2], parts[1::2], strict=True))
    tokens = [*_byte_of(), *(one + "</w>" for one in _byte_of()), *text.replace(" ", "").split()]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


@cache
def _tokenizer() -> Tokenizer:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # takes as long as all that runs here

    tokens, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE(tokens, merges, end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    return tokenizer


def _encode(text: str) -> list[int]:
    """The ids of a lower-case text, in this thread: a batch would start threads, which a forked process has not."""
    return _tokenizer().encode(text, add_special_tokens=False).ids


_encode_word = lru_cache(1 << 16)(_encode)


def _ids(text: str) -> list[int]:
    text = text.lower()
    if len(text) > SHORT or not text.isascii():
        return _encode(text)
    return [i for word in ASCII_WORDS.findall(text) for i in _encode_word(word)]  # 10 times faster


def tokenize(texts: Sequence[str], context: int = CONTEXT, *, cleaned: bool = False) -> np.ndarray:
    """uint16 [B, context]: start (49406), the text, cleaned (unless it is `cleaned`) and in lower case, end, zeros.

    A long text is cut, its end token (49407) is not: the text tower reads its output there. The ids are those of
    OpenAI's program, but that "<|endoftext|>" in a text is a word as others are.
    """
    tokens = np.zeros((len(texts), context), np.uint16)
    for row, text in zip(tokens, texts, strict=True):
        ids = [START, *_ids(text if cleaned else clean(text))[: context - 2], END]
        row[: len(ids)] = ids
    return tokens


def detokenize(tokens: np.ndarray) -> list[str]:
    """Texts of tokens [B, context], as the model reads them: lower-cased, and cut where they were too long."""
    names, ends = list(vocabulary()[0]), lengths_of(tokens) - 1
    return [_read("".join(names[i] for i in row[1:end])) for row, end in zip(tokens, ends, strict=True)]


def _read(words: str) -> str:
    """The text that the vocabulary's characters stand for; a character that is cut becomes a mark."""
    texts = (bytes(_byte_of()[one] for one in word).decode(errors="replace") for word in words.split("</w>"))
    return " ".join(texts)
