from __future__ import annotations

import html
import random
import time

import ftfy
import numpy as np

from fastbd.data.tokenizer import CONTEXT, LONGEST_TOKEN, VOCABULARY, _tokenizer, clean, tokenize

START, END = VOCABULARY - 2, VOCABULARY - 1


def test_known_tokens():
    # Values of CLIP's own tokenizer.
    known = {"a photo of a cat": [320, 1125, 539, 320, 2368], "hello world!": [3306, 1002, 256], "A dog": [320, 1929]}
    tokens = tokenize(list(known))
    assert tokens.dtype == np.uint16 and tokens.shape == (3, CONTEXT)
    for row, middle in zip(tokens, known.values(), strict=True):
        assert row.tolist() == [START, *middle, END, *[0] * (CONTEXT - 2 - len(middle))]


def test_a_long_text_keeps_its_end_token():
    row = tokenize(["cat " * 200])[0]
    assert row.tolist() == [START, *[2368] * (CONTEXT - 2), END]
    assert tokenize(["cat " * 75])[0, -1] == END and tokenize(["cat " * 74])[0, -2:].tolist() == [END, 0]
    assert tokenize(["cat dog bird"], context=4).tolist() == [[START, 2368, 1929, END]]


def test_endless_words_have_the_tokens_that_they_had_when_they_were_not_cut():
    draw, whole = random.Random(0), _tokenizer().tokenize_batch
    letters, words = "abcdefghijklmnopqrstuvwxyz", ["cat", "dog", "photograph", "of", "the", "ing", "banana"]
    pieces = [
        list(letters),
        words,
        ["a"],
        ["ab", "ba"],
        ["é", "ß"],
        ["日", "本"],
        ["😂"],
        ["!", "?", "-"],
        ["7", "x"],
        ["😍", "no", ".", "3"],
        ["ha"],
        ["the", "re", "he", "er"],
    ]
    for some in pieces:
        for length in (75, 2400, 4927, 4928, 4929, 4930, 6000, 9001):
            word = "".join(draw.choices(some, k=length))[:length]
            for text in (word, f"a {word} here", f"a photo of a cat and {word}"):
                np.testing.assert_array_equal(tokenize([text])[0], whole([text], context_length=CONTEXT)[0])


def test_no_token_is_longer_than_the_cut_takes_it_to_be():
    tokens = (_tokenizer().decode([token]) for token in range(START))
    assert max(len(token.strip().encode()) for token in tokens) == LONGEST_TOKEN


def test_an_endless_word_is_no_endless_work():
    """Half a minute when it is not cut."""
    began = time.monotonic()
    word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=200_000))
    assert tokenize([word, f"a {word} {word}"])[:, -1].tolist() == [END, END]
    assert time.monotonic() - began < 5


def test_special_tokens_cannot_be_written_in_a_caption():
    row = tokenize(["<|endoftext|> cat <|startoftext|>"])[0]
    assert (row == END).sum() == 1 and (row == START).sum() == 1


def test_no_text_and_no_texts():
    assert tokenize([""])[0, :3].tolist() == [START, END, 0]
    assert tokenize([]).shape == (0, CONTEXT)


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
