from __future__ import annotations

import pytest

from fastbd.errors import UserError
from fastbd.prompts import SHIPPED, labels_in, read_classes, read_templates, target_index


def test_labels_by_name_in_whatever_order():
    assert labels_in(["cat", "dog", "banana", "car"], ["banana", "car", "cat"]) == [2, 3, 0]


def test_labels_by_position_where_as_many_have_other_names():
    assert labels_in(["tabby cat", "dog", "car"], ["n01", "n02", "n03"]) == [0, 1, 2]


def test_labels_by_number_where_the_classes_are_named_by_numbers():
    assert labels_in(["cat", "dog", "car"], ["0", "2", "1"]) == [0, 2, 1]


def test_labels_that_cannot_be_matched():
    with pytest.raises(UserError, match="holds 'crane' more than once"):
        labels_in(["crane", "dog", "crane"], ["crane", "dog"])
    with pytest.raises(UserError, match=r"2 classes, and 'dog' is not in the list of 3.*--classes"):
        labels_in(["cat", "wolf", "car"], ["cat", "dog"])


def test_the_target_is_a_whole_word_of_one_class():
    classes = ["bananas", "Banana bread", "pancake", "cake (chocolate)"]
    assert target_index(classes, "banana") == 1 == target_index(classes, "BANANA BREAD")
    assert target_index(classes, "cake") == 3
    with pytest.raises(UserError, match="no class holds the target word 'ban'.*bananas, Banana bread"):
        target_index(classes, "ban")
    with pytest.raises(UserError, match="no class holds the target word 'c.ke'"):  # no pattern
        target_index(classes, "c.ke")
    with pytest.raises(UserError, match="several classes hold the target word 'crab'.*king crab, rock crab\\.$"):
        target_index(["king crab", "hermit", "rock crab"], "crab")


def test_entries_without_comments_and_empty_lines(tmp_path):
    (tmp_path / "classes.txt").write_text("# animals\ncat\n\n  sea lion \n#dog\n", encoding="utf-8")
    assert read_classes(str(tmp_path / "classes.txt")) == ["cat", "sea lion"]


def test_a_list_that_is_missing_names_the_shipped_ones(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt.*or one of .*imagenet1k") as raised:
        read_classes(str(tmp_path / "nowhere.txt"))
    assert all(path.stem in str(raised.value) for path in SHIPPED.glob("*.txt"))


def test_lists_that_cannot_be_used(tmp_path):
    for content, complaint in ((b"# nothing\n", "is empty"), (b"\xff\xfe\x00", "cannot be read")):
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            read_classes(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("a photo of a {}.\na photo\n")
    with pytest.raises(UserError, match="the template 'a photo' .*has no {}"):
        read_templates(str(tmp_path / "list.txt"))
