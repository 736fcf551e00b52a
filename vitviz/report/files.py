"""The files of a report: their names, and which of them are ours; never what the page shows."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vitviz.errors import OutputError
from vitviz.runs.provenance import JPEG_MARK, is_own_jpeg
from vitviz.runs.writing import prepare_folder, write_own

__all__ = [
    "FILES",
    "GENERATOR",
    "PAGE",
    "SCRIPT_START",
    "Picture",
    "is_own",
    "picture_mark",
    "prepare",
    "put",
    "put_picture",
]

PAGE = "report.html"
FILES = "report-files"
"""Folder beside the page: a script for each map, a picture and a thumbnail for each image."""

GENERATOR = '<meta name="generator" content="vitviz">'
SCRIPT_START = b"vitvizMap("

Pixels = NDArray[np.uint8]

_THUMBNAIL = 360  # pixels, the longest side
_PICTURE = 1024  # likewise: more than a window shows
_QUALITY = {"picture": 85, "thumbnail": 80}
_BEGINNING = 1024  # bytes that tell whose a file is


def prepare(folder: Path) -> None:
    """Make sure, before any work, that a report can be written.

    Raises:
        OutputError: Something that vitviz did not write is in its place, or nothing can be there.
    """
    page = folder / PAGE
    if (page.exists() or page.is_symlink()) and not is_own(page):
        raise OutputError(
            f"{page} already exists and was not written by vitviz; move it, or use another folder"
        )
    prepare_folder(folder / FILES)


def is_own(path: Path) -> bool:
    """Tell whether vitviz wrote a file of a report; neither links nor other kinds are its own."""
    if path.is_symlink() or not path.is_file():
        return False
    if path.suffix == ".jpg":
        return is_own_jpeg(path)
    try:
        with path.open("rb") as file:
            start = file.read(_BEGINNING)
    except OSError:
        return False
    if path.suffix == ".html":
        return GENERATOR.encode() in start
    return start.startswith((SCRIPT_START, b'{"vitviz"'))


def put(folder: Path, name: str, content: bytes) -> Path:
    """Put one file of a report in its place, whole or not at all.

    Raises:
        OutputError: It cannot be.
    """
    write_own(folder / name, content, is_own)
    return folder / name


class Picture:
    """Where the picture of an image and its thumbnail are.

    Attributes:
        picture: Its name under ``FILES``.
        thumbnail: Likewise.
    """

    def __init__(self, source_id: str) -> None:
        """Name them after the digest of the image's path."""
        self.picture = f"{source_id}.jpg"
        self.thumbnail = f"{source_id}.small.jpg"


def put_picture(folder: Path, source_id: str, pixels: Pixels, digest: str) -> None:
    """Keep the picture of an image and its thumbnail, unless those are there.

    Args:
        folder: Of the page.
        source_id: Digest of the image's path.
        pixels: (height, width, 3) RGB.
        digest: Of the image's bytes.

    Raises:
        OutputError: They cannot be written.
    """
    names, place = Picture(source_id), folder / FILES
    picture = _shrunk(pixels, _PICTURE)
    mark = f"{digest} {picture.shape[0]} {picture.shape[1]}"
    if all(picture_mark(place / name) == mark for name in (names.picture, names.thumbnail)):
        return
    small = _shrunk(picture, _THUMBNAIL)
    put(place, names.picture, _jpeg(picture, _QUALITY["picture"], mark))
    put(place, names.thumbnail, _jpeg(small, _QUALITY["thumbnail"], mark))


def picture_mark(path: Path) -> str | None:
    """Return the digest of the image that a kept picture is of, and the picture's height and width.

    None where vitviz did not write it.
    """
    if path.is_symlink() or not is_own_jpeg(path):
        return None
    with path.open("rb") as file:
        head = file.read(256)
    start = head.index(JPEG_MARK)
    (length,) = struct.unpack_from(">H", head, start - 2)
    return head[start + len(JPEG_MARK) : start - 2 + length].decode("ascii", "replace").strip()


def _shrunk(pixels: Pixels, longest: int) -> Pixels:
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    # Down to a half, no pixel is passed over by the quicker one.
    way = cv2.INTER_LINEAR if scale >= 0.5 else cv2.INTER_AREA
    return np.asarray(cv2.resize(pixels, size, interpolation=way), dtype=np.uint8)


def _jpeg(pixels: Pixels, quality: int, mark: str) -> bytes:
    """Encode (height, width, 3) RGB as JPEG with a comment that says whose and of what it is."""
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    content = encoded.tobytes()
    # Behind JFIF's own segment, which must come first.
    first = 4 + struct.unpack_from(">H", content, 4)[0] if content[2:4] == b"\xff\xe0" else 2
    comment = JPEG_MARK + b" " + mark.encode("ascii")
    segment = b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment
    return content[:first] + segment + content[first:]
