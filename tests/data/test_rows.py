from __future__ import annotations

import re
import zlib

import numpy as np
import pytest

from fastbd.base.errors import UserError
from fastbd.data.rows import read_rows, write_rows


def test_rows_are_one_a_line_below_a_comment_and_come_back(tmp_path):
    path = tmp_path / "kept.rows"
    write_rows(path, np.array([0, 3, 11]), "ab12", "without the 0.75 that slof finds worst")
    crc = f"{zlib.crc32(b'0 3 11'):08x}"
    head = f"# fastbd rows of ab12, crc32 {crc}, without the 0.75 that slof finds worst"
    assert path.read_text() == f"{head}\n0\n3\n11\n"
    rows = read_rows(path, "ab12", 12)
    assert rows.dtype == np.int64 and rows.tolist() == [0, 3, 11]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no row list of fastbd; make one with: python -m fastbd detect --drop"),
        ("0\n1\n", "is no row list of fastbd"),
        ("# fastbd rows of ab12, x\n1\ntwo\n", "is no row list of fastbd"),
        ("# fastbd rows of ab12, x\n1\n2.0\n", "is no row list of fastbd"),
        ("# fastbd rows of ab12, x\n1_0\n", "is no row list of fastbd"),
        ("# fastbd rows of ab12, x\n\u0663\n", "is no row list of fastbd"),
        ("# fastbd rows of ab12, x\n1\n9223372036854775808\n", "is no row list of fastbd"),
        ("# fastbd rows of ab12, crc32 00000000, x\n1\n", "not those that were written"),
        ("# fastbd rows of ab1, x\n1\n", "was made for other data"),
        ("# fastbd rows of ab12, x\n", "must ascend within 0..11, at least one"),
        ("# fastbd rows of ab12, x\n1\n1\n", "must ascend within 0..11"),
        ("# fastbd rows of ab12, x\n-1\n3\n", "must ascend within 0..11"),
        ("# fastbd rows of ab12, x\n3\n12\n", "must ascend within 0..11"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "kept.rows").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_rows(tmp_path / "kept.rows", "ab12", 12)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="none.rows cannot be read .No such file"):
        read_rows(tmp_path / "none.rows", "ab12", 12)
