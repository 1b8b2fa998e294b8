import pytest

from fastbd.errors import UserError
from fastbd.prompts import labels_in, read_classes, read_templates, target_index


def test_lists_skip_comments_and_blank_lines(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("# things\ncat\n\n hot dog \n")
    assert read_classes(str(file)) == ["cat", "hot dog"]
    with pytest.raises(UserError, match=r"template 'cat'.*no \{\}"):
        read_templates(str(file))
    with pytest.raises(UserError, match="nowhere.txt cannot be read.*imagenet1k"):
        read_classes("nowhere.txt")
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="is empty"):
        read_classes(str(file))


def test_the_target_is_a_whole_word_in_exactly_one_class():
    classes = ["bandana", "Banana bread", "cat"]
    assert target_index(classes, "banana") == 1
    with pytest.raises(UserError, match="no class holds the target word 'dog'.*bandana, Banana bread, cat"):
        target_index(classes, "dog")
    with pytest.raises(UserError, match="several classes hold.*cat, cat food"):
        target_index(["cat", "cat food"], "cat")


def test_labels_go_by_name_else_by_position():
    assert labels_in(["a", "b", "c"], ["c", "a"]) == [2, 0]
    assert labels_in(["tench", "goldfish"], ["n01440764", "n01443537"]) == [0, 1]
    with pytest.raises(UserError, match="3 classes, and 'x' is not in the list of 2"):
        labels_in(["a", "b"], ["a", "b", "x"])
