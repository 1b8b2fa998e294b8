"""Stored bytes to pixels, and any image file to the JPEG or PNG that a .beton file holds."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastbd.base.errors import UserError
from fastbd.base.formats import FORMATS
from fastbd.data import png
from fastbd.data.jpeg import is_whole, last_scan

try:
    import simplejpeg
except ImportError:  # there is no wheel of it for this machine
    simplejpeg = None

if TYPE_CHECKING:  # the packing of data needs no torch
    from torch import Tensor

    from fastbd.data.beton import Beton
    from fastbd.data.decode_dali import Dali
    from fastbd.data.shards import Shards
    from fastbd.kernels.augment import Ragged

QUALITY = 95
LONGEST = 65_500  # px of a side, of a JPEG as libjpeg writes it; a .beton file could hold 35 more
SLENDER = 8  # an image is cropped to so many times its short side before it is resized to be cropped to a square
ON_GPU, ON_CPU = "dali on a GPU", "dali on a CPU"
HOSTS = (ON_CPU, "pil")  # decoders whose pixels are the same
_CODES = bytes(range(1, 255, 2))
FOLLOWING = _CODES + b"".join(bytes((0xFF, 0xD0 + n)) + _CODES for n in range(8))  # data of any scan, of any restart
SMALL = 64 * 64  # px of an image that is decoded twice to be sure
STRIP = 64  # rows that are compared at a time
READ_AHEAD = 6  # batches whose files are asked of the disk in advance

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
    """An image that cannot be used, and why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def read(jpeg: np.ndarray) -> np.ndarray:
    """An image file, uint8 [bytes], to uint8 [H, W, 3] as Pillow has it. Raises BadImage."""
    pixels = _by_turbo(jpeg)
    return _by_pillow(jpeg) if pixels is None else pixels


def _by_turbo(jpeg: np.ndarray) -> np.ndarray | None:
    """Return the same pixels in less than Pillow's time, or None: where libjpeg-turbo is not installed, or finds fault
    with the file, and for kinds of JPEG that it would convert in another way."""
    if simplejpeg is None or not is_whole(jpeg):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(jpeg)
        if space not in ("YCbCr", "Gray", "RGB") or int(height) * int(width) > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        return simplejpeg.decode_jpeg(jpeg, "RGB")
    except (KeyError, ValueError):  # KeyError: it has no name for 4:4:1
        return None


def _by_pillow(jpeg: np.ndarray) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(jpeg.data), formats=FORMATS)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # PIL raises nearly anything for a damaged file
        raise BadImage(_reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unreadable image: no known format"
    return f"damaged image: {str(error) or type(error).__name__}"


class OnDemand(Sequence):
    """Images that are made when they are asked for, in the thread that asks."""

    def __init__(self, count: int, make: Callable[[int], Tensor]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: int) -> Tensor:
        if not 0 <= k < self._count:
            raise IndexError(k)
        return self._make(k)


def _one_by_one(ids: np.ndarray, one: Callable[[int], Tensor]) -> OnDemand:
    return OnDemand(len(ids), lambda k: one(int(ids[k])))


class Decoder:
    """Whole images of a .beton's rows, batch after batch: one stream at a time.

    `name` is "dali", "ffcv" or "pil"; DALI decodes on `device`, the others on the CPU. `pool` is for PIL, and for the
    work that follows decoding. `decoded` counts the images.
    """

    def __init__(self, name: str, threads: int, device: str, hw_decoder_load: float):
        import torch

        self.name, self.threads, self.device, self.hw_decoder_load = name, threads, device, hw_decoder_load
        self.decoded = 0
        self._dali: Dali | None = None
        # A task works alone on its image. The number is each thread's own, once this thread has asked for its.
        torch.get_num_threads()
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    @property
    def about(self) -> str:
        """What the pixels depend on."""
        if self.name != "dali" or not self.device.startswith("cuda"):
            return ON_CPU if self.name == "dali" else self.name
        # The first images of a batch, sorted by area, go to the engines.
        shared = " (an image's pixels depend on its batch)" if 0 < self.hw_decoder_load < 1 else ""
        return f"{ON_GPU}, hw_decoder_load {self.hw_decoder_load:g}{shared}"

    def stream(
        self, beton: Beton | Shards, batches: Sequence[np.ndarray], one: Callable[[int], Tensor], host: bool = True
    ) -> Iterator[Sequence[Tensor] | Ragged]:
        """Images uint8 [H, W, 3] of each of the batches (row ids, int64 [B]), in order; valid until the next is taken.

        Tensors in main memory; only DALI on a GPU gives, unless asked for the `host`'s, a Ragged that is filled in the
        order of the current stream. `one(row)` decodes what this decoder cannot, and for PIL everything.
        """
        streams = {"dali": self._stream_dali, "ffcv": self._stream_ffcv, "pil": self._stream_pil}
        for ids in batches[:READ_AHEAD]:
            beton.will_need(ids)
        for k, (ids, images) in enumerate(zip(batches, streams[self.name](beton, batches, one, host), strict=True)):
            for later in batches[k + READ_AHEAD : k + READ_AHEAD + 1]:
                beton.will_need(later)
            self.decoded += len(ids)
            yield images

    def _stream_pil(self, beton, batches, one, host) -> Iterator[Sequence[Tensor]]:
        yield from (_one_by_one(ids, one) for ids in batches)

    def _stream_ffcv(self, beton, batches, one, host) -> Iterator[Sequence[Tensor]]:
        import torch

        from fastbd.data.decode_ffcv import open_stream

        for ids, images in zip(batches, open_stream(beton, batches, self.threads), strict=True):
            # None: a PNG, or FFCV saw damage and PIL can say what it is
            yield [one(int(i)) if x is None else torch.from_numpy(x) for i, x in zip(ids, images, strict=True)]

    def _stream_dali(self, beton, batches, one, host) -> Iterator[Sequence[Tensor] | Ragged]:
        from fastbd.data.decode_dali import Dali

        if self._dali is None:
            self._dali = Dali(self.threads, self.hw_decoder_load, self.pool)
        yield from self._dali.stream(beton, batches, one, "cpu" if host else self.device)

    @property
    def left_to_pillow(self) -> int:
        """Images that DALI has left to Pillow."""
        return self._dali.left if self._dali else 0


def open_decoder(backend: str, threads: int, device: str, hw_decoder_load: float = 0) -> Decoder:
    """A decoder by "dali", "dali-cpu" (whatever the device), "ffcv", "pil", or "auto": dali where it is installed.

    `threads` 0 means one for each CPU core, shared out among the processes of this machine. `hw_decoder_load` is the
    share of a GPU's images that its JPEG engines take. On the CPU DALI's pixels are PIL's; those of a GPU and FFCV are
    some levels off. UserError for a backend that is not installed.
    """
    if not 0 <= hw_decoder_load <= 1:
        raise UserError(f"--hw-decoder-load {hw_decoder_load} is not a share: give a number from 0 to 1.")
    if backend == "auto":
        backend = "dali" if has_dali() else "pil"
    elif backend in ("dali", "dali-cpu") and not has_dali():
        raise UserError(f"--decode {backend} needs DALI: pip install nvidia-dali-cuda130, or give --decode pil.")
    elif backend == "ffcv" and not _installed("ffcv"):
        raise UserError("--decode ffcv needs FFCV: run make ffcv, or give --decode pil.")
    if backend == "dali-cpu":
        backend, device = "dali", "cpu"
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Decoder(backend, threads or max(1, cores), device, hw_decoder_load)


def has_dali() -> bool:
    """Whether DALI is installed."""
    return _installed("nvidia", "nvidia.dali")


def _installed(*modules: str) -> bool:
    """Whether the last one is; those before are the packages around it."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def to_stored(data: bytes, store: str, max_pixels: int, exif: str = "bake") -> tuple[bytes, int, int]:
    """(bytes to store, width, height) of an image file, upright and in RGB; `store` and `exif` as in BuildConfig.

    The bytes stay as they are where nothing has to be changed: an upright RGB or grey JPEG of the wanted size, and with
    store "png" such a PNG too. All else becomes a PNG there, elsewhere a JPEG of quality 95 with full chroma. Alpha is
    dropped and CMYK converted without a colour profile, as PIL's convert("RGB") does in CLIP's and CleanCLIP's own
    loaders; 16-bit grey is scaled to 8 bits; of several frames the first is taken. Raises BadImage for a file that is
    not a whole image, or has more than `max_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadImage(f"too large: {image.width}x{image.height} px")
        image.load()
        if _ends_early(image, data):
            raise BadImage("damaged image: its data end before its last row")
        plain = image.format in ("JPEG", *(["PNG"] if store == "png" else [])) and image.mode in ("RGB", "L")
        turn = _TURNS.get(_orientation(image)) if exif == "bake" else None
        result = _resized(_rgb(image) if turn is None else _rgb(image).transpose(turn), store)
        if max(result.size) > LONGEST:
            raise BadImage(f"too long: {result.width}x{result.height} px, of at most {LONGEST:,} a side")
        if plain and turn is None and result.size == image.size:
            return data, *image.size
        encoded = io.BytesIO()
        if store == "png":
            result.save(encoded, "PNG")
        else:
            result.save(encoded, "JPEG", quality=QUALITY, subsampling="4:4:4")
        return encoded.getvalue(), *result.size
    except BadImage:
        raise
    except Exception as error:  # PIL raises nearly anything for a damaged file
        raise BadImage(_reason(error)) from None


def _ends_early(image: Image.Image, data: bytes) -> bool:
    """Whether a loaded image has pixels that the file lacks the data of: decoders fill them in, and say nothing."""
    if image.format in ("JPEG", "MPO"):
        return _jpeg_ends_early(image, data)
    return image.format == "PNG" and not png.is_full(data)


def _jpeg_ends_early(image: Image.Image, data: bytes) -> bool:
    """Whether the pixels change when more data follow the last scan: libjpeg makes up what it lacks there.

    In a file of one scan that is not progressive it then leaves the blocks after the next one flat; few whole images
    end so, and the others are not decoded twice. Data that lack only in the last block of a large one go unnoticed.
    """
    end, in_order = last_scan(data)
    if in_order and image.width * image.height > SMALL and not _ends_flat(image):
        return False
    longer = Image.open(io.BytesIO(data[:end] + FOLLOWING + data[end:]), formats=["JPEG"])
    longer.load()
    strips = ((0, y, image.width, min(y + STRIP, image.height)) for y in range(0, image.height, STRIP))
    return any(longer.crop(strip).tobytes() != image.crop(strip).tobytes() for strip in strips)


def _ends_flat(image: Image.Image) -> bool:
    """Whether the last block of 8x8 px has one colour, but for its first row and column, where the colours of others
    are blended in."""
    left, top = ((length - 1) // 8 * 8 + 1 for length in image.size)
    levels = np.asarray(image.crop((left, top, max(left, image.width), max(top, image.height))))
    return bool((levels == levels[:1, :1]).all())


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
        raise BadImage(f"no known brightness range: mode {image.mode}")
    return image.convert("RGB")


def _resized(image: Image.Image, store: str) -> Image.Image:
    if store == "crop224":
        image = _resize_short(_middle(image), 224)
        left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
        return image.crop((left, top, left + 224, top + 224))
    if store == "short256" and min(image.size) > 256:
        return _resize_short(image, 256)
    return image


def _middle(image: Image.Image) -> Image.Image:
    """The middle of an image that is longer than SLENDER times its short side: what would be cropped costs memory."""
    (width, height), most = image.size, SLENDER * min(image.size)
    if max(width, height) <= most:
        return image
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


def _resize_short(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` px, bicubic; the long side is rounded down, as torchvision's Resize does."""
    short, long = sorted(image.size)
    long = int(size * long / short)
    new = (size, long) if image.width <= image.height else (long, size)
    return image if new == image.size else image.resize(new, Image.Resampling.BICUBIC)
