import numpy as np

from fastbd.data.sheet import COLUMNS, _spread, contact_sheet


def test_rows_are_taken_from_all_over():
    assert _spread(np.arange(0, 1600, 2)).tolist()[:: COLUMNS - 1] == [0, 1598]
    assert _spread(np.arange(3)).tolist() == [0, 1, 2] and _spread(np.arange(0)).tolist() == []


def test_each_strip_is_a_labelled_row_of_its_pictures():
    red, blue = (np.full((n, 32, 32, 3), colour, np.uint8) for n, colour in ((8, (255, 0, 0)), (2, (0, 0, 255))))
    sheet = np.asarray(contact_sheet({"first": red, "second": blue}))
    assert (sheet == (255, 0, 0)).all(-1).sum() == 8 * 96 * 96
    assert (sheet == (0, 0, 255)).all(-1).sum() == 2 * 96 * 96
    assert (sheet[:20] < 128).all(-1).any()  # a label stands above
