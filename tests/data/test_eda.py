from __future__ import annotations

import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest

from fastbd.data import eda as eda_module
from fastbd.data.eda import MOST_WORDS, N_DRAWS, WordNet, eda, synonyms_source

REPLACE, INSERT, SWAP, DELETE = 0.1, 0.3, 0.6, 0.9  # first draws that choose the operation


def known(word: str) -> list[str]:
    return {"dog": ["hound", "domestic dog"], "cat": ["feline"]}.get(word, [])


def draws(*values: float) -> np.ndarray:
    return np.array(values + (0.5,) * (N_DRAWS - len(values)))


def test_replacement_takes_a_random_synonym_for_every_occurrence():
    # One word in ten: of the words left after stop words (dog, barks, park) the first, then its second synonym.
    assert eda("The dog barks at a dog, in the park!", draws(REPLACE, 0.0, 0.9), known) == (
        "the domestic dog barks at a domestic dog in the park"
    )


def test_replacement_goes_on_to_a_word_that_has_synonyms():
    assert eda("a red cat", draws(REPLACE, 0.0, 0.0), known) == "a red feline"
    assert eda("a red hat", draws(REPLACE), known) == "a red hat"


def test_insertion_puts_the_first_synonym_anywhere():
    assert eda("one dog", draws(INSERT, 0.99, 0.0), known) == "one dog hound"
    assert eda("one dog", draws(INSERT, 0.0, 0.0), known) == "hound one dog"
    assert eda("red hat", draws(INSERT), known) == "red hat"


def test_the_published_insertion_is_of_any_word_there_is_but_never_behind_the_last():
    def synonyms(word: str) -> list[str]:
        return {"can": ["tin"], "tin": ["metal"]}.get(word, [])

    # "can" is a stop word; the draws choose the operation, the word, the place.
    assert eda("we can dig", draws(INSERT, 0.4, 0.99), synonyms) == "we can dig"
    assert eda("we can dig", draws(INSERT, 0.4, 0.99), synonyms, "any") == "we can tin dig"
    # Of 20 words two are inserted, the second a synonym of the first; "we" has none, and another word is drawn.
    caption = " ".join(["we", "can"] + 18 * ["dig"])
    found = eda(caption, draws(INSERT, 0.0, 0.06, 0.0, 0.0, 0.0), synonyms, "any").split()
    assert found[:4] == ["metal", "tin", "we", "can"] and len(found) == 22
    # Where ten draws find no word with a synonym, none is inserted.
    assert eda("we dig", draws(INSERT), synonyms, "any") == "we dig"


def test_swap_exchanges_two_different_words():
    assert eda("one two three", draws(SWAP, 0.0, 0.99), known) == "three two one"
    assert eda("one two three", draws(SWAP, 0.5, 0.5), known) == "one three two"
    assert eda("one", draws(SWAP), known) == "one"


def test_deletion_drops_words_below_a_tenth_but_never_all():
    assert eda("one two three", draws(DELETE, 0.5, 0.09, 0.1), known) == "one three"
    assert eda("one two three", draws(DELETE, 0.0, 0.0, 0.0, 0.5), known) == "two"


def test_a_tenth_of_the_words_changes():
    caption = " ".join(["dog", "cat"] + [f"w{c}" for c in "abcdefghijklmnopqr"])  # 20 words: two changes
    replaced = eda(caption, draws(REPLACE, *[0.0] * 6), known).split()
    assert replaced[:2] == ["hound", "feline"]
    assert len(eda(caption, draws(INSERT), known).split()) in (22, 23)


def test_a_caption_without_letters_stays():
    assert eda("2019 / 10 !", draws(REPLACE), known) == "2019 / 10 !"
    assert eda("", draws(DELETE), known) == ""


def test_it_is_a_function_of_the_draws_and_each_operation_is_as_likely():
    caption, rng = "one dog two cats three birds", np.random.default_rng(0)
    lengths: Counter[int] = Counter()
    for _ in range(2000):
        u = rng.random(N_DRAWS)
        version = eda(caption, u, lambda word: ["x y"] if word == "dog" else [])
        assert version == eda(caption, u, lambda word: ["x y"] if word == "dog" else [])
        lengths[len(version.split())] += 1
    # Replacement gives 7 words, insertion 8, swap 6; deletion gives 6 with probability 0.9^6.
    for words, share in ((7, 0.25), (8, 0.25), (6, 0.25 + 0.25 * 0.9**6)):
        assert abs(lengths[words] / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5


def write_wordnet(root):
    """Nouns {dog, Domestic_dog}, {frump, dog}, {goose, gander's}; verbs {chase, dog}; adjectives {good, ...}."""
    root.mkdir()
    synsets = {
        "noun": [
            "05 n 02 dog 0 Domestic_dog 0 000 | a pet",
            "18 n 02 frump 0 dog 1 000 | a person",
            "05 n 02 goose 0 gander's 0 000 | a bird",
        ],
        "verb": ["38 v 02 chase 0 dog 0 000 01 + 08 00 | go after"],
        "adj": ["00 a 02 good(a) 0 well-behaved 0 000 | fine"],
        "adv": [],
    }
    senses = {"noun": {"dog": [0, 1], "goose": [2]}, "verb": {"dog": [0]}, "adj": {"good": [0]}, "adv": {}}
    for part, lines in synsets.items():
        data, offsets = b"  1 This software and database is provided as is.\n", []
        for line in lines:
            offsets.append(len(data))
            data += f"{len(data):08d} {line}  \n".encode()
        (root / f"data.{part}").write_bytes(data)
        index = "  1 This software and database is provided as is.\n"
        for lemma, which in senses[part].items():
            at = " ".join(f"{offsets[w]:08d}" for w in which)
            index += f"{lemma} {part[0]} {len(which)} 2 @ ~ {len(which)} 1 {at}  \n"
        (root / f"index.{part}").write_text(index)
        (root / f"{part}.exc").write_text("geese goose\n" if part == "noun" else "")
    return root


def test_wordnet_files(tmp_path):
    wordnet = WordNet(write_wordnet(tmp_path / "wordnet"))
    assert wordnet.synonyms("dog") == ["domestic dog", "frump", "chase"]
    assert wordnet.synonyms("dogs") == ["dog", "domestic dog", "frump", "chase"]  # by the rules of detachment
    assert wordnet.synonyms("geese") == ["goose", "ganders"]  # by the list of exceptions
    assert wordnet.synonyms("good") == ["well behaved"]
    assert wordnet.synonyms("unheard") == []


def test_wordnet_in_a_zip_as_nltk_downloads_it(tmp_path):
    write_wordnet(tmp_path / "wordnet")
    archive = shutil.make_archive(str(tmp_path / "wordnet"), "zip", tmp_path, "wordnet")
    assert WordNet(zipfile.Path(archive, "wordnet/")).synonyms("dog") == ["domestic dog", "frump", "chase"]


def test_without_wordnet_words_are_only_swapped_and_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(eda_module, "_wordnet", lambda: None)
    words = ["one", "dog", "two", "cats", "three", "birds"]
    rng = np.random.default_rng(1)
    versions = {eda(" ".join(words), rng.random(N_DRAWS)) for _ in range(50)}
    assert len(versions) > 10 and all(set(version.split()) <= set(words) for version in versions)


def test_installed_wordnet():
    if synonyms_source() == "none":
        pytest.skip("no WordNet is installed")
    assert "domestic dog" in eda_module.wordnet_synonyms("dog")


@pytest.mark.parametrize("operation", [REPLACE, INSERT, SWAP, DELETE])
def test_a_giant_caption_is_no_endless_work(operation):
    """Replacing a tenth of 200,000 words would look at each of them 20,000 times."""
    caption = " ".join("dog " + "cat" * (i % 7) + "abcdefghij"[i % 10] for i in range(100_000))
    changed = eda(caption, draws(operation), known).split()
    assert 400 < len(changed) <= 2 * MOST_WORDS and changed[0] in ("dog", "hound", "domestic", "cat", "feline", "a")
