from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from fastbd.data.tokenizer import CONTEXT, END, START, VOCABULARY, detokenize, tokenize, vocabulary

MERGES_SHA256 = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"


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


def test_an_endless_word_is_no_endless_work():
    """Its bytes are merged in a time that grows little faster than its length."""
    began = time.process_time()
    word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    assert tokenize([word, "日" * 100_000])[:, -1].tolist() == [END, END]
    assert time.process_time() - began < 5


def test_long_texts_have_the_tokens_of_their_beginning():
    for text in ("a photo of a cat, ", "日本の写真 "):
        np.testing.assert_array_equal(tokenize([text * 40]), tokenize([text * 4000]))


def test_the_vocabulary_is_openais():
    """Its length, ends and middle, and the sha256 of OpenAI's file up to the last merge that CLIP has."""
    tokens, merges = vocabulary()
    assert list(tokens.values()) == list(range(VOCABULARY))
    assert [tokens[token] for token in ("!", "!</w>", "cat</w>", "<|startoftext|>", "<|endoftext|>")] == [
        0, 256, 2368, START, END,
    ]  # fmt: skip
    text = "".join(f"{first} {second}\n" for first, second in merges)
    assert hashlib.sha256(text.encode()).hexdigest() == MERGES_SHA256


def test_tokens_are_those_of_openais_program():
    """Of odd texts, and of random mixes of odd pieces: openai_tokens.json was written by CLIP's simple_tokenizer.py."""
    for text, ids in json.loads(Path(__file__).with_name("openai_tokens.json").read_text()).items():
        expected = [START, *ids[: CONTEXT - 2], END]
        assert tokenize([text])[0, : len(expected)].tolist() == expected, repr(text)


def merged(word: str, rank: dict[tuple[str, str], int]) -> list[str]:
    """A word's tokens by the definition: while two neighbours can be merged, all pairs of the earliest merge are."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while pairs := [pair for pair in itertools.pairwise(parts) if pair in rank]:
        first = min(pairs, key=rank.__getitem__)
        old, parts = parts, []
        while old:
            count = 2 if tuple(old[:2]) == first else 1
            parts.append("".join(old[:count]))
            del old[:count]
    return parts


def test_words_are_merged_as_defined():
    draw, (tokens, merges) = random.Random(0), vocabulary()
    rank = {pair: i for i, pair in enumerate(merges)}
    pieces = ["a", "b", "the", "re", "he", "er", "ing", "photo", "graph", "ha", "haha", "z", "qu", "ss", "tion"]
    for _ in range(100):
        word = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        ids = [START, *(tokens[part] for part in merged(word, rank))][: CONTEXT - 1] + [END]
        assert tokenize([word])[0, : len(ids)].tolist() == ids, word


def test_detokenize():
    texts = ["A photo of a CAT", "café dog's 日本!", "", "2013"]
    assert detokenize(tokenize(texts)) == ["a photo of a cat ", "café dog 's 日本 ! ", "", "2 0 1 3 "]
    assert detokenize(tokenize(["日"], context=3)) == ["日 "]
    assert detokenize(tokenize(["𓀀"], context=4)) == ["\ufffd"]  # two of its three tokens


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_a_forked_process_tokenises_and_nothing_is_said_of_it(monkeypatch, capfd):
    """The library warns of forks, and a child may wait for ever, where it has tokenised with threads of its own."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    texts = ["a cat", "日本の写真"] * 100
    threads = os.listdir("/proc/self/task")
    tokens = tokenize(texts)
    assert os.listdir("/proc/self/task") == threads
    child = os.fork()
    if not child:
        os._exit(int((tokenize(texts) != tokens).any()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert capfd.readouterr() == ("", "")


def test_special_tokens_cannot_be_written_in_a_caption():
    row = tokenize(["<|endoftext|> cat <|startoftext|>"])[0]
    assert (row == END).sum() == 1 and (row == START).sum() == 1


def test_no_text_and_no_texts():
    assert tokenize([""])[0, :3].tolist() == [START, END, 0]
    assert tokenize([]).shape == (0, CONTEXT)


def test_texts_are_cleaned_unless_they_are_clean():
    """What is written another way in prompts and plans has the tokens of the captions that a build has cleaned."""
    plain = tokenize(["a photo of the people's café & bar"])
    for text in ("a photo of the people’s café &amp; bar", "a  photo of the people&#39;s cafe\u0301 & bar\n"):
        np.testing.assert_array_equal(tokenize([text]), plain)
        assert (tokenize([text], cleaned=True) != plain).any()
    once = tokenize(["salt &amp; pepper"], cleaned=True)  # of a caption that was escaped three times
    assert (once != tokenize(["salt & pepper"])).any()
