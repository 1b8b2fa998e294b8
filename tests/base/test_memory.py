"""What is freed is kept for the next that is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Ten times 8 blocks of 8 MB, written and then freed, as the activations of a step; prints how many pages were mapped
# after the first time.
PROGRAM = """
import resource, sys
from fastbd.base.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
blocks = [bytearray(b"x") * (8 << 20) for _ in range(8)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    del blocks
    blocks = [bytearray(b"x") * (8 << 20) for _ in range(8)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_was_freed_is_not_mapped_again() -> None:
    assert pages("kept") < 2_000 < 20_000 < pages("given back")
