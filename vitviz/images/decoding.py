"""Image files → upright RGB pixels, guarded against files that are not what they say."""

from __future__ import annotations

import hashlib
import io
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vitviz.errors import ImageError
from vitviz.images.sources import Source

__all__ = ["ImageFile", "decode", "read_file", "require_readable", "to_rgb"]

_TURNED = (5, 6, 7, 8)  # orientations that swap height and width
_STRIP_PIXELS = 1 << 21  # so much of an image is brought to RGB at once, in small memory
_LARGE_PIXELS = 1 << 25  # from here on, images are decoded one at a time, not one in each thread
_FILE_BYTES = 1 << 30  # more than the largest picture that is not refused would fill
_ALONE = threading.RLock()  # held by the thread that has a large image in memory
_UNSAFE = {"EPS": "would run a program", "FITS": "may unpack to any size"}


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFile:
    """The bytes of an image file.

    Attributes:
        source: Where it is.
        content: All of it.
        digest: SHA-256 of the content.
    """

    source: Source
    content: bytes
    digest: str


def require_readable(source: Source) -> int:
    """Make sure that an image file can be opened, without reading it.

    Returns:
        Its size in bytes.

    Raises:
        ImageError: It cannot, is too large, or no regular file.
    """
    try:
        status = source.path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would make us wait for ever
            raise ImageError("is not a regular file")
        if status.st_size > _FILE_BYTES:
            raise ImageError(f"has {status.st_size:,} bytes; expected at most {_FILE_BYTES:,}")
        source.path.open("rb").close()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ImageError(f"is no name that a file can have: {error}") from error
    return status.st_size


def read_file(source: Source) -> ImageFile:
    """Read an image file, without decoding it.

    Raises:
        ImageError: It cannot be read, is empty, too large, or no regular file.
    """
    size = require_readable(source)
    try:
        # A file of no bytes may be one of the kernel's, which can make us wait, too.
        content = source.path.read_bytes() if size else b""
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    if not content:
        raise ImageError("is empty")
    return ImageFile(source=source, content=content, digest=hashlib.sha256(content).hexdigest())


def decode(
    content: bytes, enough: Callable[[tuple[int, int]], tuple[int, int]], room: ExitStack
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image, upright and RGB.

    Args:
        content: Of its file.
        enough: Of the image's (height, width), tells how many pixels it needs to be decoded at.
        room: Closed when the image is no longer needed; until then no other large one is decoded.

    Returns:
        The image, and its (height, width) in the file.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format in _UNSAFE:
                raise ImageError(f"is {image.format}, which {_UNSAFE[image.format]}: refused")
            original = _reduce(image, enough)
            if image.width * image.height > _LARGE_PIXELS:
                room.enter_context(_ALONE)
            ImageOps.exif_transpose(image, in_place=True)
            upright = to_rgb(image)
            return upright, original or (upright.height, upright.width)
    except Image.DecompressionBombError as error:
        raise ImageError(f"is refused, for it may be a decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("is no image that Pillow can read") from error
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # damaged files make decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"cannot be decoded: {reason}") from error


def _reduce(
    image: Image.Image, enough: Callable[[tuple[int, int]], tuple[int, int]]
) -> tuple[int, int] | None:
    """Let a JPEG that is not yet decoded come out smaller; return its upright (height, width)."""
    if image.format not in ("JPEG", "MPO"):
        return None
    turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    size = (image.width, image.height) if turned else (image.height, image.width)
    rows, cols = enough(size)
    image.draft(None, (rows, cols) if turned else (cols, rows))
    return size


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring any mode to RGB: 16 bits scaled down, transparency laid over white."""
    image.load()
    if image.mode.startswith(("I", "F")):
        scale = _wide_scale(image)
        return _in_strips(lambda strip: _from_wide_range(strip, scale), image)
    if image.has_transparency_data:
        return _in_strips(_over_white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row of each strip of an image, and the strip."""
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_strips(convert: Callable[[Image.Image], Image.Image], image: Image.Image) -> Image.Image:
    """Convert an image to RGB strip by strip: on the way, pixels take many times their memory."""
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _wide_scale(image: Image.Image) -> float:
    """Choose what brings wide values to 0 … 255: floats up to 1 by that, integers by 16 bits'."""
    highest = max(_finite(strip).max(initial=0) for _, strip in _strips(image))
    if image.mode == "F":
        return 255 if highest <= 1 else 1
    return 1 / 257 if highest > 255 or image.mode.startswith("I;16") else 1


def _from_wide_range(image: Image.Image, scale: float) -> Image.Image:
    values = np.clip(_finite(image), 0, 255 / scale) * scale  # this way round nothing overflows
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def _finite(image: Image.Image) -> NDArray[np.float32]:
    return np.nan_to_num(np.asarray(image).astype(np.float32), copy=False)
