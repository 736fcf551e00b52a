"""Image files → upright RGB pixels, guarded against files that are not what they say."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from vitviz.errors import ImageError
from vitviz.images.metadata import orientation_of, without_metadata
from vitviz.images.opening import has_frames, open_image
from vitviz.images.remarks import Remark
from vitviz.images.sources import Source
from vitviz.images.values import Scale, Stored, in_strips, scale_of, stored_as
from vitviz.options import ValueRange

__all__ = [
    "Decoded",
    "ImageFile",
    "decode",
    "in_our_words",
    "read_file",
    "require_readable",
    "upright_rgb",
]

_TURNS = {  # what undoes each orientation of EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # orientations that swap height and width
_LARGE_PIXELS = 1 << 25  # from here on, images are decoded one at a time, not one in each thread
_FILE_BYTES = 1 << 30  # more than the largest picture that is not refused would fill
_ALONE = threading.RLock()  # held by the thread that has a large image in memory
_UNSAFE = {"EPS": "would run a program", "FITS": "may unpack to any size"}
_EXTRA_SAMPLES = 338  # the tag of TIFF that says what a fourth band is
_FRAMES = Remark("several frames or pages", "only the first one of each is explained")
_NO_ALPHA = Remark(
    "a fourth band that is not declared as transparency", "left out; the other three are taken"
)


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

    What is no local file is taken for readable: to ask costs as much as to read.

    Returns:
        Its size in bytes; 0 for what is no local file.

    Raises:
        ImageError: It cannot, is too large, or no regular file.
    """
    if source.origin is not None:
        return 0
    try:
        status = source.path.stat()
        if stat.S_ISDIR(status.st_mode):  # may be here because it could not be looked into
            os.scandir(source.path).close()
        if not stat.S_ISREG(status.st_mode):  # a pipe would make us wait for ever
            raise ImageError("is not a regular file")
        if status.st_size > _FILE_BYTES:
            raise _too_large(status.st_size)
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
    content = _content(source) if source.origin is None else source.origin.read()
    if not content:
        raise ImageError("is empty")
    if len(content) > _FILE_BYTES:
        raise _too_large(len(content))
    return ImageFile(source=source, content=content, digest=hashlib.sha256(content).hexdigest())


def _content(source: Source) -> bytes:
    size = require_readable(source)
    try:
        # A file of no bytes may be one of the kernel's, which can make us wait, too.
        return source.path.read_bytes() if size else b""
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error


def _too_large(size: int) -> ImageError:
    return ImageError(f"has {size:,} bytes; expected at most {_FILE_BYTES:,}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """A decoded image.

    Attributes:
        image: Upright and RGB.
        size: Its (height, width) in the file.
        remarks: What people should know of it.
    """

    image: Image.Image
    size: tuple[int, int]
    remarks: tuple[Remark, ...] = ()


def decode(
    content: bytes,
    enough: Callable[[tuple[int, int]], tuple[int, int]],
    room: ExitStack,
    values: ValueRange | None = None,
) -> Decoded:
    """Decode an image, upright and RGB.

    Args:
        content: Of its file.
        enough: Of the image's (height, width), tells how many pixels it needs to be decoded at.
        room: Closed when the image is no longer needed; until then no other large one is decoded.
        values: Which become black and white; None: by the range of their type.
    """
    try:
        return _decode(content, enough, room, values)
    except ImageError:
        bare = without_metadata(content)  # pixels may be whole where Pillow stumbles over that
        if bare is not None and bare != content:
            with suppress(ImageError):
                return _decode(bare, enough, room, values)
        raise


def _decode(
    content: bytes,
    enough: Callable[[tuple[int, int]], tuple[int, int]],
    room: ExitStack,
    values: ValueRange | None,
) -> Decoded:
    with in_our_words(), open_image(content) as image:
        if image.format in _UNSAFE:
            raise ImageError(f"is {image.format}, which {_UNSAFE[image.format]}: refused")
        original = _reduce(image, enough)
        if image.width * image.height > _LARGE_PIXELS:
            room.enter_context(_ALONE)
        rgb, remarks = upright_rgb(image, values)
        if has_frames(content, image.format):
            remarks = (*remarks, _FRAMES)
        return Decoded(image=rgb, size=original or (rgb.height, rgb.width), remarks=remarks)


@contextmanager
def in_our_words() -> Iterator[None]:
    """Raise as ``ImageError`` whatever Pillow raises while it opens and decodes."""
    try:
        yield
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
    turned = orientation_of(image) in _TURNED
    size = (image.width, image.height) if turned else (image.height, image.width)
    rows, cols = enough(size)
    image.draft(None, (rows, cols) if turned else (cols, rows))
    return size


def upright_rgb(
    image: Image.Image, values: ValueRange | None = None, stored: Stored | None = None
) -> tuple[Image.Image, tuple[Remark, ...]]:
    """Bring an image to RGB, as it is looked at.

    Args:
        image: It need not be decoded yet, and is left as it was but for that.
        values: As for ``decode``.
        stored: How its values are stored; None: as it says itself.

    Raises:
        ImageError: Hardly anything of it would be left in 8 bits.
    """
    # All that decoding forgets is asked before.
    stored, undeclared = stored or stored_as(image), _has_undeclared_band(image)
    upright = _upright(image)
    if undeclared:
        upright = upright.convert("RGB")
    scale = scale_of(upright, stored, values)
    remarks = scale.remarks if scale else ()
    rgb = to_rgb(upright, scale if scale and scale.changes else None)
    return rgb, (*remarks, *([_NO_ALPHA] if undeclared else []))


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    turn = _TURNS.get(orientation_of(image))
    return image if turn is None else image.transpose(turn)


def _has_undeclared_band(image: Image.Image) -> bool:
    """Tell whether Pillow takes a fourth band for alpha of which its TIFF does not say so."""
    tags = getattr(image, "tag_v2", None)
    return image.mode == "RGBA" and tags is not None and not tags.get(_EXTRA_SAMPLES)


def to_rgb(image: Image.Image, scale: Scale | None) -> Image.Image:
    """Bring any mode to RGB: values scaled where asked for, transparency laid over white."""
    if scale:
        return in_strips(lambda strip: _opaque(scale.apply(strip)), image)
    if image.has_transparency_data:
        return in_strips(_opaque, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")
