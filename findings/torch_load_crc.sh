#!/bin/sh
# torch.load of torch 2.13.0 does not compare a checkpoint's bytes with the CRC-32 that torch.save has stored for each of
# its members: after one bit of the file has flipped, on a disk or on the way, it returns other weights without a word.
# Python's zipfile reads the same sums and names the member. Loading with mmap=True, or weights_only=False, is the same.
#
# Output seen, on Python 3.11, for a state of 10,000 numbers with one bit of one of them flipped:
#   torch 2.13.0: 1 number differs (1.0 -> 0.5), mmap: 1, zipfile: bad member state/data/0
#
# Needs a network, or a mirror of PyPI. Exits 1 if the line is another.
#     PYTHON=python3.11 sh findings/torch_load_crc.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/flip.py" <<'FLIP'
import sys
import zipfile

import torch

path = sys.argv[1] + "/state.pt"
torch.save({"weight": torch.ones(10_000)}, path)
with open(path, "rb") as file:
    content = bytearray(file.read())
at = content.index(b"\x00\x00\x80\x3f" * 1000) + 4 * 500  # the number 1.0 is 0x3f800000, little-endian
content[at + 2] ^= 0x80
with open(path, "wb") as file:
    file.write(content)

loaded = torch.load(path, weights_only=True)["weight"]
mapped = torch.load(path, weights_only=True, mmap=True)["weight"]
other = loaded[loaded != 1]
print(
    f"torch {torch.__version__.partition('+')[0]}: {len(other)} number differs (1.0 -> {other[0]}), "
    f"mmap: {int((mapped != 1).sum())}, zipfile: bad member {zipfile.ZipFile(path).testzip()}"
)
FLIP
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore "$folder/flip.py" "$folder" | tee "$folder/seen"
cat >"$folder/expected" <<'EXPECTED'
torch 2.13.0: 1 number differs (1.0 -> 0.5), mmap: 1, zipfile: bad member state/data/0
EXPECTED
cmp -s "$folder/seen" "$folder/expected" || { echo "this has changed" >&2; exit 1; }
