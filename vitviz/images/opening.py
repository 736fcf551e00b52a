"""Bytes → a Pillow image that is yet to be decoded, with the decoders that Pillow lacks."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError
from PIL import __version__ as pillow

from vitviz.errors import ImageError

__all__ = ["has_frames", "open_image"]

_HEIF = {b"hei", b"hev", b"mif", b"msf"}  # how the brands of such files begin
_WITH_FRAMES = ("AVIF", "GIF", "HEIF", "PNG", "TIFF", "WEBP")  # not MPO: previews, maps of gain


def open_image(content: bytes) -> Image.Image:
    """Open an image; HEIF by pillow-heif, where that is installed.

    Raises:
        ImageError: It is of a format that another Pillow or another package can read.
        UnidentifiedImageError: It is no image.
    """
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        brand = content[8:11] if content[4:8] == b"ftyp" else b""
        if brand == b"avi" and "AVIF" not in Image.OPEN:
            raise ImageError(
                f"is AVIF, which Pillow reads from version 11.3 on; this is {pillow}"
            ) from None
        if brand not in _HEIF or "HEIF" in Image.OPEN:
            raise
        _add_heif()
        return Image.open(io.BytesIO(content))


def _add_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ImageError(
            "is HEIF (.heic), which Pillow reads with pillow-heif alone: pip install pillow-heif"
        ) from None
    register_heif_opener()


def has_frames(content: bytes, kind: str | None) -> bool:
    """Tell whether an image of this format has more than one frame or page."""
    if kind not in _WITH_FRAMES:
        return False
    try:
        # Opened anew, for looking at a second frame takes the first one out of some.
        with open_image(content) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # of a second frame that is damaged, or of its metadata
        return True
