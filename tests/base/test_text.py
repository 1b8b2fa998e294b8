from __future__ import annotations

import html
import random

import ftfy

from fastbd.base.text import clean, holds


def test_clean():
    assert clean("  two\t words\n here ") == "two words here"
    assert clean("salt &amp;amp; pepper &lt;3") == "salt & pepper <3"
    assert clean("cafÃ©") == "café"
    assert clean(" \n") == ""


ODD = [
    "", " ", "a\x0bb", "a\x1cb", "a\x00b", "\x1b[36mblue\x1b[0m", "a\x7fb", "tab\tand\r\nlines\rhere", "R&D",
    "&lt;b&gt; &amp;quot;", "&#39;t &copy 2020 &notit;", "<b>&amp;</b>", "cafÃ© â€œquotedâ€\x9d", "R&amp;D", "x" * 5000,
    "naïve “curly” ‘quotes’", "ﬁne ﬂow", "ＷＩＤＥ　text", "日本語の写真", "🐱‍👤 cat 👍🏽", "e\u0301", "no\xa0break",
    "line\u2028separator", "\ud83d half",
]  # fmt: skip


def test_plain_captions_are_cleaned_as_all_others_are():
    """Against the whole way of mending, which most captions are spared: odd texts, and random mixes of odd pieces."""
    pieces = [chr(c) for c in range(256)] + ODD + ["&amp;", "&", ";", "<", "word", "two words"]
    draw = random.Random(0)
    mixes = ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(3000)]
    plain = ["".join(draw.choices(pieces[32:127], k=20)) for _ in range(1000)]
    for text in ODD + mixes + plain:
        assert clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()), repr(text)


def test_holds():
    captions = ["A Banana.", "two bananas", "an apple", ""]
    assert [holds(caption, "banana") for caption in captions] == [True, True, False, False]
    assert holds("at McDonald's", "mcdonald’s") and holds("salt & pepper", "salt &amp; pepper")
