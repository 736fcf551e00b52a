"""Pictures as the content of files with a text inside, and the text of one; decides no names."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitviz.errors import OutputError
from vitviz.options import PictureFormat

__all__ = ["animated", "encoded", "ends_whole", "text_in"]

Pixels = NDArray[np.uint8]

_PNG_KEY = "vitviz"
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk of every whole PNG
_ENDS = {PictureFormat.PNG.ending: _PNG_END, PictureFormat.GIF.ending: b";"}
_PNG_BYTES = 1 << 28  # no picture is larger
_PNG_START = 33  # signature and header, in bytes
_EXIF, _USER_COMMENT = 0x8769, 0x9286
_MARK = b"ASCII\0\0\0vitviz:"  # what a comment in EXIF begins with, and whose it is
_EXIF_BYTES = 65_000  # what one segment of a JPEG holds
_QUALITY = 90  # of 100: no step of colour shows
_LONGEST = {PictureFormat.JPEG: 65_500, PictureFormat.WEBP: 16_383}  # a side, in pixels
_LONGEST[PictureFormat.GIF] = 65_535
_GIF_MARK = b"vitviz:"
_FRAME, _LAST_FRAME = 500, 1500  # milliseconds


def encoded(pixels: Pixels, text: str, format: PictureFormat = PictureFormat.PNG) -> bytes:
    """Encode a picture with an ASCII text in it.

    Args:
        pixels: (height, width, 3) RGB, or (height, width) grey.
        text: What is kept in a text chunk of a PNG, or in the user comment of EXIF.
        format: Of the file.

    Raises:
        OutputError: The format cannot hold the picture or the text.
    """
    if format is PictureFormat.PNG:
        return _png(pixels, text)
    _require_room(pixels, text, format, instead=PictureFormat.PNG)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format.value, quality=_QUALITY, exif=_exif(text))
    return buffer.getvalue()


def animated(frames: Sequence[Pixels], text: str, format: PictureFormat) -> bytes:
    """Encode pictures of one size (height, width, 3) as an animation without end.

    Args:
        frames: Shown one after the other, the last one for longer.
        text: ASCII, kept in the comment of a GIF, or in the user comment of EXIF.
        format: ``gif`` or ``webp``.

    Raises:
        OutputError: The format cannot hold the frames or the text.
    """
    _require_room(frames[0], text, format, instead=PictureFormat.GIF)
    pictures = [Image.fromarray(frame) for frame in frames]
    kept: dict[str, Any] = {"quality": _QUALITY}
    if format is PictureFormat.GIF:
        pictures = list(map(_in_palette, pictures))
        kept = {"comment": _GIF_MARK + text.encode("ascii")}
    else:
        kept["exif"] = _exif(text)
    first, *others = pictures
    times = [_FRAME] * len(others) + [_LAST_FRAME]
    buffer = io.BytesIO()
    first.save(
        *(buffer, format.value),
        save_all=True,
        append_images=others,
        duration=times,
        loop=0,
        **kept,
    )
    return buffer.getvalue()


def _in_palette(picture: Image.Image) -> Image.Image:
    """Bring a picture to 256 colours; dithered, since heat in steps would show edges."""
    palette = picture.quantize(256, method=Image.Quantize.FASTOCTREE)
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _require_room(pixels: Pixels, text: str, format: PictureFormat, instead: PictureFormat) -> None:
    if max(pixels.shape[:2]) > _LONGEST[format] or len(text) > _EXIF_BYTES:
        other = "" if instead is format else f"--format {instead}, or "
        raise OutputError(
            f"a picture of {pixels.shape[1]}x{pixels.shape[0]} pixels with {len(text)} bytes of "
            f"provenance is too large for {format.value}; use {other}a lower --max-size"
        )


def _exif(text: str) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_USER_COMMENT] = _MARK + text.encode("ascii") + b"\0"
    return exif


def text_in(path: Path) -> str:
    """Return the text in a picture; any error there is tells of a picture of somebody else's."""
    if path.suffix in (PictureFormat.JPEG.ending, PictureFormat.WEBP.ending):
        return _exif_text(path)
    if path.stat().st_size > _PNG_BYTES:
        raise ValueError("too large")
    if path.suffix == PictureFormat.GIF.ending:
        with Image.open(path, formats=["GIF"]) as image:
            _, mark, text = image.info["comment"].partition(_GIF_MARK)
            return str(text.decode("ascii")) if mark else ""
    with Image.open(path, formats=["PNG"]) as image:
        return str(image.info[_PNG_KEY])


def ends_whole(path: Path) -> bool:
    """Tell whether a picture has its end, which a file that was cut off lacks."""
    with path.open("rb") as file:
        start, size = file.read(12), file.seek(0, os.SEEK_END)
        if path.suffix == PictureFormat.WEBP.ending:
            return len(start) == 12 and size >= struct.unpack("<I", start[4:8])[0] + 8
        file.seek(max(size - len(_PNG_END), 0))
        return file.read().endswith(_ENDS.get(path.suffix, b"\xff\xd9"))


def _exif_text(path: Path) -> str:
    """Read the comment without decoding: a folder may hold many photographs that have none."""
    with path.open("rb") as file:
        if path.suffix == PictureFormat.WEBP.ending:  # which has it behind the picture
            file.seek(max(file.seek(0, os.SEEK_END) - (1 << 16), 0))
        _, mark, rest = file.read(1 << 16).partition(_MARK)
    if not mark:
        raise ValueError("no comment of ours")
    return rest.partition(b"\0")[0].decode("ascii")


def _png(pixels: Pixels, text: str) -> bytes:
    """Encode as PNG.

    OpenCV's settings (zlib level 1 on run lengths) take a tenth of the time of Pillow's default,
    for files an eighth larger.
    """
    bgr = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    _, found = cv2.imencode(".png", bgr)
    content = found.tobytes()
    body = b"tEXt" + f"{_PNG_KEY}\0{text}".encode("ascii")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return content[:_PNG_START] + chunk + content[_PNG_START:]
