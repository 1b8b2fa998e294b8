#!/usr/bin/env bash
# DALI 2.4.0 gives the rest of a damaged baseline JPEG as grey, without an error, where Pillow refuses the file.
#
# Two bytes in the middle of the scan become FF 40, a marker that JPEG does not have. libjpeg calls that an error ("Unsupported
# marker type 0x40"). fn.decoders.image on the CPU returns the image all the same: right up to the damage, 128 below it.
# A progressive file with the same damage raises RuntimeError; so does a file that is cut.
#
# Shown beside it, about those errors:
#   * a file damaged in its headers says "nvImageCodec failure: '#N'", one damaged in its scan "Failed to decode sample #K":
#     there is no one text to look for; N is a status, not the place in the batch (it is 4 in a batch of one), K is the place;
#   * both say "Current pipeline object is no longer valid", but the batches that follow come, each once and in order.
#
# Runs on a CPU in a folder of its own. Exit code 0: as written here; 1: it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q nvidia-dali-cuda130==2.4.0 numpy==2.3.5 pillow==12.0.0
cat > "$place/show.py" <<'PYTHON'
import io
import sys

import numpy as np
import nvidia.dali
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, features


def picture(seed, width=400, height=300):
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def damaged(file):
    header = file.index(b"\xff\xda") + 2
    scan = header + int.from_bytes(file[header : header + 2], "big")
    middle = (scan + len(file)) // 2
    return file[:middle] + b"\xff\x40" + file[middle + 2 :]


def dali(*files):
    """The first image's pixels, or the error, of one batch after another; a file each."""
    feed = iter([[np.frombuffer(file, np.uint8)] for file in files])

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=2)
    def pipeline():
        files = fn.external_source(source=lambda: next(feed), dtype=types.UINT8, ndim=1)
        return fn.decoders.image(files, output_type=types.RGB)

    made, found = pipeline(), []
    made.build()
    while True:
        try:
            found.append(np.array(made.run()[0][0]))
        except StopIteration:
            return found
        except RuntimeError as error:
            found.append(str(error))


def pillow(file):
    try:
        return np.array(Image.open(io.BytesIO(file)).convert("RGB"))
    except OSError as error:
        return f"OSError: {error}"


print(f"DALI {nvidia.dali.__version__}, Pillow {Image.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}")
whole = jpeg(picture(1))
right, wrong = pillow(whole), pillow(damaged(whole))
(got,) = dali(damaged(whole))
silent = isinstance(got, np.ndarray) and isinstance(wrong, str)
print("damaged baseline file, Pillow:", wrong if isinstance(wrong, str) else "pixels")
print("damaged baseline file, DALI:  ", "pixels, no error" if silent else got)
if silent:
    apart = np.abs(got.astype(int) - right).reshape(10, -1).mean(1)
    print("  mean difference from the whole image, by tenths from the top:", *(f"{x:.0f}" for x in apart))
    silent = apart[:4].max() == 0 and bool((got[-20:] == 128).all())
(progressive,) = dali(damaged(jpeg(picture(1), progressive=True)))
print("damaged progressive file, DALI:", "RuntimeError" if isinstance(progressive, str) else "pixels, no error")
(headers,), (cut,) = dali(b"no image"), dali(whole[: len(whole) // 2])
last = [text.strip().splitlines()[-3].strip() for text in (headers, cut)]
print("no JPEG, DALI:   ", last[0])
print("cut JPEG, DALI:  ", last[1])
order = [jpeg(picture(k, 20 + k, 20)) for k in range(8)]
order[3] = order[5] = whole[: len(whole) // 2]
after = [x.shape[1] - 20 if isinstance(x, np.ndarray) else "error" for x in dali(*order)]
print("images 0 to 7, with 3 and 5 cut:", *after)
known = (
    silent and isinstance(progressive, str) and last[0] == "nvImageCodec failure: '#4'"
    and last[1].startswith("Failed to decode sample #0") and after == [0, 1, 2, "error", 4, "error", 6, 7]
)
print("as written" if known else "CHANGED")
sys.exit(not known)
PYTHON
"$place/venv/bin/python" "$place/show.py"
