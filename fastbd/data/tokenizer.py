"""Captions to CLIP's byte-pair tokens (Radford et al. 2021, arXiv 2103.00020, section 2.4)."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import cache

import ftfy
import numpy as np
from instant_clip_tokenizer import Tokenizer  # pyright: ignore[reportAttributeAccessIssue] - it has no hints

from fastbd.kernels.text_pack import lengths_of

CONTEXT = 77
VOCABULARY = 49408
LONGEST_TOKEN = 32  # bytes; eight emoji


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer()


def clean(text: str) -> str:
    """Mend broken Unicode, undo HTML escapes (twice, for web text that was escaped twice), fold white space."""
    if text.isascii() and text.isprintable() and "&" not in text:  # most captions: nothing to mend, 20 times faster
        return " ".join(text.split())
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def tokenize(texts: Sequence[str], context: int = CONTEXT) -> np.ndarray:
    """uint16 [B, context]: start (49406), the lower-cased text, end (49407), zeros.

    A long text is cut, its end token is not: the text tower reads its output there. Merging a word's bytes takes time
    that grows with the square of its length, so one that is twice as long as `context` of the longest tokens is cut.
    """
    if not texts:
        return np.zeros((0, context), np.uint16)
    most = 2 * LONGEST_TOKEN * context
    words = [text if len(text) <= most else re.sub(rf"(\S{{{most}}})\S+", r"\1", text) for text in texts]
    return _tokenizer().tokenize_batch(words, context_length=context)


def detokenize(tokens: np.ndarray) -> list[str]:
    """Texts of tokens [B, context], as the model reads them: lower-cased, and cut where they were too long."""
    ends = lengths_of(tokens) - 1
    return [_tokenizer().decode(row[1:end].tolist()) for row, end in zip(tokens, ends, strict=True)]
