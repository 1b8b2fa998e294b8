"""The image formats that are read."""

from __future__ import annotations

from PIL import features

# By Pillow's names. JPEG includes MPO. No format that starts another program, as EPS does.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else []))
