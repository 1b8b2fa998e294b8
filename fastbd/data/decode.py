"""JPEG bytes to pixels, and any image file to the JPEG that a .beton file holds."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastbd.errors import UserError

# JPEG includes MPO. No format that starts another program, as EPS does.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
QUALITY = 95
CHUNK = 64  # images decoded at once: bounds the memory that large originals take

_TURNS = {  # EXIF orientation to the transposition that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


class BadImage(Exception):
    """An image that cannot be used: its index in the batch, and why."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"image {index}: {reason}")
        self.index, self.reason = index, reason


def resize_short(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` px, bicubic; the long side is rounded down, as torchvision's Resize does."""
    short, long = sorted(image.size)
    long = int(size * long / short)
    new = (size, long) if image.width <= image.height else (long, size)
    return image if new == image.size else image.resize(new, Image.Resampling.BICUBIC)


def fit(image: Image.Image, size: int, squash: bool) -> Image.Image:
    """`size` x `size` px: squashed, or short side to `size` and the middle cut out (torchvision's CenterCrop)."""
    if squash:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    image = resize_short(image, size)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _read(index: int, jpeg: np.ndarray) -> Image.Image:
    try:
        return Image.open(io.BytesIO(jpeg), formats=FORMATS).convert("RGB")
    except Exception as error:  # PIL raises nearly anything for a damaged file
        raise BadImage(index, _reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unreadable image: no known format"
    return f"damaged image: {str(error) or type(error).__name__}"


@dataclass(frozen=True)
class Decoder:
    """Decodes and fits batches of JPEG files; one caller at a time.

    decoder(jpegs: uint8 arrays, size, squash: bool [B]) -> uint8 [B, size, size, 3]; raises BadImage for the first
    image that cannot be decoded. `name` is "dali" or "pil".
    """

    name: str
    pool: ThreadPoolExecutor
    read: Callable[[int, Sequence[np.ndarray]], Sequence[Image.Image]]  # (index of the first, a chunk) -> whole images

    def __call__(self, jpegs: Sequence[np.ndarray], size: int, squash: np.ndarray) -> np.ndarray:
        out = np.empty((len(jpegs), size, size, 3), np.uint8)

        def place(index: int, image: Image.Image) -> None:
            out[index] = np.asarray(fit(image, size, bool(squash[index])))

        for first in range(0, len(jpegs), CHUNK):
            images = self.read(first, jpegs[first : first + CHUNK])
            list(self.pool.map(place, range(first, first + len(images)), images))
        return out


def open_decoder(backend: str, threads: int, device: str) -> Decoder:
    """A decoder by "dali", "pil", or "auto": dali where it is installed. `threads` 0 means one for each CPU core.

    DALI decodes on the GPU where `device` is cuda; on the CPU its pixels are PIL's. Resizing is PIL's in each case.
    """
    if backend == "auto":
        backend = "dali" if _has_dali() else "pil"
    elif backend == "dali" and not _has_dali():
        raise UserError("--decode dali needs DALI: pip install nvidia-dali-cuda130, or give --decode pil.")
    threads = threads or os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads)

    def read_pil(first: int, jpegs: Sequence[np.ndarray]) -> list[Image.Image]:
        return list(pool.map(_read, range(first, first + len(jpegs)), jpegs))

    if backend == "pil":
        return Decoder("pil", pool, read_pil)
    pipeline = _dali_pipeline(threads, device)

    def read_dali(first: int, jpegs: Sequence[np.ndarray]) -> list[Image.Image]:
        try:
            pipeline.feed_input("jpegs", list(jpegs))
            (pixels,) = pipeline.run()
        except RuntimeError:  # its message is no index: PIL finds the first bad image, or reads what DALI cannot
            return read_pil(first, jpegs)
        pixels = pixels.as_cpu()
        return [Image.fromarray(np.asarray(pixels[i])) for i in range(len(jpegs))]

    return Decoder("dali", pool, read_dali)


def _has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def _dali_pipeline(threads: int, device: str):
    """JPEG files ("jpegs") to RGB pixels of their own size."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.startswith("cuda")

    @pipeline_def(
        batch_size=CHUNK,
        num_threads=threads,
        device_id=int(device.partition(":")[2] or 0) if gpu else None,
        prefetch_queue_depth=1,
    )
    def pipeline():
        jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
        # The build has turned the images upright; an orientation that is still recorded is not to be applied again.
        return fn.decoders.image(
            jpegs, device="mixed" if gpu else "cpu", output_type=types.RGB, adjust_orientation=False
        )

    built = pipeline()
    built.build()
    return built


def to_jpeg(data: bytes, store: str, max_pixels: int) -> tuple[bytes, int, int]:
    """(JPEG bytes, width, height) of an image file, upright and in RGB; `store` as in BuildConfig.

    The bytes stay as they are where nothing has to be changed: an upright RGB or grey JPEG of the wanted size. All
    else becomes a JPEG of quality 95 with full chroma. Alpha is dropped and CMYK converted without a colour profile,
    as PIL's convert("RGB") does in CLIP's and CleanCLIP's own loaders; 16-bit grey is scaled to 8 bits; of several
    frames the first is taken. Raises BadImage (index 0) for a file that is not a whole image, or has more than
    `max_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadImage(0, f"too large: {image.width}x{image.height} px")
        image.load()
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        turn = _TURNS.get(_orientation(image))
        result = _resized(_rgb(image) if turn is None else _rgb(image).transpose(turn), store)
        if plain and turn is None and result.size == image.size:
            return data, *image.size
        encoded = io.BytesIO()
        result.save(encoded, "JPEG", quality=QUALITY, subsampling="4:4:4")
        return encoded.getvalue(), *result.size
    except BadImage:
        raise
    except Exception as error:  # PIL raises nearly anything for a damaged file
        raise BadImage(0, _reason(error)) from None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.float64) * 255 / 65535
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(0, f"no known brightness range: mode {image.mode}")
    return image.convert("RGB")


def _resized(image: Image.Image, store: str) -> Image.Image:
    if store == "crop224":
        return fit(image, 224, squash=False)
    if store == "short256" and min(image.size) > 256:
        return resize_short(image, 256)
    return image
