"""Metadata of image files, read where it matters to pixels and never allowed to cost them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL import ExifTags, Image

__all__ = ["orientation_of", "without_metadata"]

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")  # ancillary by their names, but part of the picture


def orientation_of(image: Image.Image) -> int:
    """Return an image's EXIF orientation; 1, upright, where it has none that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # what is damaged makes Pillow raise almost anything
        return 1


def without_metadata(content: bytes) -> bytes | None:
    """Return a PNG with nothing but its pixels, and its EXIF if that is whole; None: no PNG."""
    if not content.startswith(_PNG_START):
        return None
    return _PNG_START + b"".join(chunk for name, chunk in _chunks(content) if _kept(name, chunk))


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the chunks of a PNG, whole, with their names."""
    place = len(_PNG_START)
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        yield content[place + 4 : place + 8], content[place : place + length + 12]
        place += length + 12


def _kept(name: bytes, chunk: bytes) -> bool:
    is_critical = name[:1].isupper()
    if name == b"eXIf":
        return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
    return is_critical or name in _PIXELS
