from __future__ import annotations

import pytest

from fastbd.base.errors import UserError
from fastbd.base.prompts import ClassList, labels_in, labels_of, read_classes, read_templates, target_index


def test_labels_by_name_in_whatever_order():
    assert labels_in(["cat", "dog", "banana", "car"], ["banana", "car", "cat"]) == [2, 3, 0]


def test_labels_by_number_where_the_classes_are_named_by_numbers():
    assert labels_in(["cat", "dog", "car"], ["0", "2", "1"]) == [0, 2, 1]


def test_labels_by_code_first():
    birds = ClassList(["crane", "tench", "crane", "n3"], ["n1", "n2", "n3", "n4"])
    assert labels_in(birds, ["n3", "tench", "n1"]) == [2, 1, 0]
    assert labels_of(birds, ["n2", "tabby", "n4"]) == {"n2": 1, "n4": 3}
    with pytest.raises(UserError, match="holds 'crane' more than once"):
        labels_in(birds, ["crane", "tench"])


def test_numbers_are_never_taken_by_place():
    """Sorted as words, as a folder's classes are, 10 comes before 2."""
    assert labels_in(["a", "b", "c"], ["00002", "1"]) == [2, 1]
    with pytest.raises(UserError, match="none of them, such as '1', is in the list of 3"):
        labels_in(["a", "b", "c"], ["1", "2", "3"])


def test_labels_that_cannot_be_matched():
    with pytest.raises(UserError, match="holds 'crane' more than once"):
        labels_in(["crane", "dog", "crane"], ["crane", "dog"])
    with pytest.raises(UserError, match=r"2 classes, and 'dog' is not in the list of 3: add it .*--classes"):
        labels_in(["cat", "wolf", "car"], ["cat", "dog"])
    # As many as the data has, but nothing says that they are in its order.
    with pytest.raises(UserError, match=r"none of them, such as 'cat', .* or lines `code = name`"):
        labels_in(["DOG", "CAT", "CAR"], ["cat", "dog", "car"])


def test_the_target_is_a_whole_word_of_one_class():
    classes = ["bananas", "Banana bread", "pancake", "cake (chocolate)"]
    assert target_index(classes, "banana") == 1 == target_index(classes, "BANANA BREAD")
    assert target_index(classes, "cake") == 3
    assert target_index(["jack-o’-lantern", "R&amp;B"], "Jack-o'-lantern") == 0 and target_index(
        ["jack", "R&B"], "r&amp;b"
    )
    # The class that is called so goes before those that hold the word.
    for name in ("dog", "Dog", "DOG"):
        assert target_index(["hot dog", name, "dog sled"], "dog") == 1
    with pytest.raises(UserError, match="several classes hold the target word 'dog'.*dog, Dog\\.$"):
        target_index(["hot dog", "dog", "Dog"], "dog")
    with pytest.raises(UserError, match="no class holds the target word 'ban'.*bananas, Banana bread"):
        target_index(classes, "ban")
    with pytest.raises(UserError, match=r"no class holds the target word 'panckae' \(did you mean pancake\?\), and"):
        target_index(classes, "panckae")
    with pytest.raises(UserError, match="no class holds the target word 'c.ke'"):  # no pattern
        target_index(classes, "c.ke")
    with pytest.raises(UserError, match="several classes hold the target word 'crab'.*king crab, rock crab\\.$"):
        target_index(["king crab", "hermit", "rock crab"], "crab")


def test_a_list_of_classes_codes_and_templates(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("# animals\na {} = b\nn1 = cat\n\n  sea lion \n#dog\nn2 = cat\na=b\n", encoding="utf-8")
    classes = read_classes(str(path))
    assert classes == ["cat", "sea lion", "cat", "a=b"] and classes.templates == ["a {} = b"]
    assert classes.codes == ["n1", "sea lion", "n2", "a=b"]


def test_templates_not_given_come_from_the_class_list():
    assert read_templates(None, read_classes("mnist")) == read_templates("mnist") == ['a photo of the number: "{}".']
    assert len(read_templates(None, read_classes("imagenet_r"))) == len(read_templates(None, ["cat"])) == 80
    assert len(read_templates("demo", read_classes("mnist"))) > 1


@pytest.mark.parametrize(
    ("read", "number", "held", "other"),
    [
        (read_classes, 25, ["aircraft", "imagenet1k"], ["demo", "imagenet80"]),
        (
            read_templates,
            23,
            ["aircraft", "demo", "imagenet80"],
            ["imagenet1k", "imagenet_a", "imagenet_r", "objectnet"],
        ),
    ],
)
def test_a_list_that_is_missing_names_those_of_its_kind(tmp_path, read, number, held, other):
    with pytest.raises(UserError, match=r"nowhere\.txt.*or one of ") as raised:
        read(str(tmp_path / "nowhere.txt"))
    listed = str(raised.value).partition("or one of ")[2].rstrip(".").split(", ")
    assert len(listed) == number and set(held) <= set(listed) and not set(other) & set(listed)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"# nothing\n", "is empty"),
        (b"a photo of a {}.\n", "class list .* is empty"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"cat\na photo of a {c}.\n", r"'a photo of a \{c\}\.' in .* neither a class nor a template: write \{\}"),
        (b"cat\ncrane\ncrane\n", "holds 'crane' 2 times: give each a code"),
        (b"n1 = cat\nn1 = dog\n", "holds 'n1' 2 times"),
    ],
)
def test_class_lists_that_cannot_be_used(tmp_path, content, complaint):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        read_classes(str(tmp_path / "list.txt"))


def test_templates_that_cannot_be_used(tmp_path):
    (tmp_path / "list.txt").write_text("a photo of a {}.\na photo\n")
    with pytest.raises(UserError, match="the template 'a photo' .*has no {}"):
        read_templates(str(tmp_path / "list.txt"))
    with pytest.raises(UserError, match="the template 'n01440764 = tench' in imagenet1k has no {}"):
        read_templates("imagenet1k")
