from __future__ import annotations

import io

import numpy as np
import pytest
from damage import damaged, harmless
from PIL import Image

from fastbd.data.jpeg import is_whole

KINDS = [{}, {"subsampling": 0}, {"progressive": True}, {"restart_marker_blocks": 3}, {"comment": b"\xff\xd9"}]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_whole_file_is_told_from_one_whose_segments_are_not_all_there(options, mode):
    colours = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).convert(mode).save(file, "JPEG", quality=95, **options)
    for name, jpeg in harmless(file.getvalue()).items():
        assert is_whole(np.frombuffer(jpeg, np.uint8)), name
    for name, (jpeg, whole) in damaged(file.getvalue()).items():
        assert is_whole(np.frombuffer(jpeg, np.uint8)) == whole, name


@pytest.mark.parametrize(
    "jpeg",
    [
        b"\xff\xd8\xff\xd9",  # no image
        b"\xff\xd8\xff\xda\x00\x02\x00\xff\xd9",  # a scan of no frame
        b"\xff\xd8\xff\xc0\x00\x02\xff\xc0\x00\x02\xff\xda\x00\x02\x00\xff\xd9",  # two frames
        b"\xff\xd8\xff\xc3\x00\x02\xff\xda\x00\x02\x00\xff\xd9",  # lossless
        b"\xff\xd8\xff\xc0\x00\x02\xff\xda\x00\x02\x00\xff\xd8\xff\xd9",  # a second start
        b"\xff\xd8\xff\xc0\x00\x02\xff\xda\x00\x02\x00\xff",
        b"\xff\xd8\xff\xc0\xff",
    ],
)
def test_segments_that_do_not_fit_together(jpeg):
    assert not is_whole(np.frombuffer(jpeg, np.uint8))
