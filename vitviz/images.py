"""Finding images, decoding them, fitting them to a model, and where on them the model looked."""

from __future__ import annotations

import glob
import hashlib
import io
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vitviz.errors import ImageError, SourceError
from vitviz.options import Fit

__all__ = [
    "SUFFIXES",
    "Frame",
    "ImageFile",
    "ImageSample",
    "Region",
    "Source",
    "find_sources",
    "identity",
    "load_sample",
    "native_size",
    "read_file",
    "sample_of",
]

Pixels = NDArray[np.uint8]

SUFFIXES = frozenset(
    (".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg")
    + (".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")
)
"""Endings that make a file in a folder an image; a file named by itself may have any."""

_SPARE = 4  # times the side that the model sees: decoded to less, its pixels would change visibly
_GAP = 3.0  # images six times too large are halved first: it moves photographs by 1/255
_TURNED = (5, 6, 7, 8)  # orientations that swap height and width
_RESIZED_PIXELS = 1 << 25  # up to here, a crop resizes the whole image first, as timm does
_STRIP_PIXELS = 1 << 21  # so much of an image is brought to RGB at once, in small memory
_LARGE_PIXELS = 1 << 25  # from here on, images are decoded one at a time, not one in each thread
_FILE_BYTES = 1 << 30  # more than the largest picture that is not refused would fill
_ALONE = threading.RLock()  # held by the thread that has a large image in memory
_UNSAFE = {"EPS": "would run a program", "FITS": "may unpack to any size"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image to explain.

    Attributes:
        path: Where it is, as the user may open it.
        key: Its relative path under the output folder, with "/" between the parts.
    """

    path: Path
    key: str


@dataclass(frozen=True, kw_only=True)
class Region:
    """The part of an image that the model saw, as shares of its width and height in [0, 1]."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    def pixels(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Return the (rows, cols) that the region covers on a picture of this (height, width)."""
        height, width = size
        return _span(self.top, self.bottom, height), _span(self.left, self.right, width)

    def box(self, image: Image.Image) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) on an image, in fractions of pixels."""
        width, height = image.size
        return self.left * width, self.top * height, self.right * width, self.bottom * height


@dataclass(frozen=True, kw_only=True)
class Frame:
    """How images are brought to what a model takes.

    Attributes:
        fit: Squash, crop or native.
        size: (height, width) that the model takes.
        patch: (height, width) of a patch.
        resample: Pillow's filter.
        crop_pct: Share of the resized image that a crop keeps.
    """

    fit: Fit
    size: tuple[int, int]
    patch: tuple[int, int]
    resample: Image.Resampling
    crop_pct: float

    def apply(
        self, image: Image.Image, original: tuple[int, int] | None = None
    ) -> tuple[Image.Image, Region]:
        """Fit an image; return what the model sees and where on the image that lies.

        Args:
            image: In any mode that can be resized.
            original: (height, width) of what it is a smaller copy or a mask of, which decides how
                it is fitted; None: its own.
        """
        rows, cols = self.resized(original or (image.height, image.width))
        if self.fit is Fit.CROP:
            fitted, region = self._crop(image, rows, cols)
            return fitted, self._in_patches(region)
        fitted = image.resize((cols, rows), self.resample, reducing_gap=_GAP)
        return fitted, self._in_patches(Region())

    def resized(self, image: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) to which a whole image (height, width) is brought."""
        if self.fit is Fit.SQUASH:
            return self.size
        if self.fit is Fit.NATIVE:
            return native_size(image, self.size, self.patch)
        scale = max(
            math.floor(side / self.crop_pct) / length
            for side, length in zip(self.size, image, strict=True)
        )
        # The side that sets the scale comes out whole; the tiny excess saves it from rounding.
        rows, cols = (
            max(int(length * scale + 1e-6), side)
            for side, length in zip(self.size, image, strict=True)
        )
        return rows, cols

    def _in_patches(self, region: Region) -> Region:
        """Leave out what is less than a patch at the right and at the bottom: no token sees it."""
        if self.fit is Fit.NATIVE:
            return region
        rows, cols = (
            side // patch * patch / side for side, patch in zip(self.size, self.patch, strict=True)
        )
        return replace(
            region,
            right=region.left + (region.right - region.left) * cols,
            bottom=region.top + (region.bottom - region.top) * rows,
        )

    def _crop(self, image: Image.Image, rows: int, cols: int) -> tuple[Image.Image, Region]:
        """Resize and cut out the centre, to the pixel as timm evaluates."""
        height, width = self.size
        top, left = round((rows - height) / 2), round((cols - width) / 2)
        region = Region(
            left=left / cols,
            top=top / rows,
            right=(left + width) / cols,
            bottom=(top + height) / rows,
        )
        if rows * cols > _RESIZED_PIXELS:  # a sliver would grow beyond all bounds
            return image.resize((width, height), self.resample, region.box(image)), region
        resized = image.resize((cols, rows), self.resample)
        return resized.crop((left, top, left + width, top + height)), region


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


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSample:
    """A decoded image: what the model sees, and what people see.

    Attributes:
        source: Where it comes from.
        digest: SHA-256 of the file's bytes (of its pixels, if it never was a file).
        pixels: (height, width, 3) RGB, what the model sees.
        region: Where on the picture the pixels lie.
        picture: (height, width, 3) RGB, the original upright, at most ``max_size`` long.
        size: (height, width) of the original upright.
    """

    source: Source
    digest: str
    pixels: Pixels
    region: Region
    picture: Pixels
    size: tuple[int, int]


def find_sources(
    arguments: Iterable[str | Path], *, skip: Callable[[Path], bool] = lambda path: False
) -> tuple[list[Source], list[str]]:
    """Turn files, folders and globs into images, in order, each file once.

    Args:
        arguments: As typed; a ``Path`` is never a glob. What does not exist is taken for a file
            and fails when it is read.
        skip: Tells of an image found in a folder or by a glob that it is not to be taken.

    Returns:
        The sources, and the arguments that led to no image.

    Raises:
        SourceError: Two files would write the same outputs.
    """
    by_file: dict[str, Source] = {}
    by_key: dict[str, Source] = {}
    fruitless = []
    for argument in arguments:
        found = False
        for path, root in _expand(argument, skip):
            found = True
            if (file := identity(path)) in by_file:
                continue
            source = Source(path=path, key=_key(path, root))
            if other := by_key.get(source.key):
                raise SourceError(
                    f"{other.path} and {path} would both be written as {source.key}; "
                    "explain them in two calls with different --output folders"
                )
            by_file[file] = by_key[source.key] = source
        if not found:
            fruitless.append(str(argument))
    return list(by_file.values()), fruitless


def read_file(source: Source) -> ImageFile:
    """Read an image file, without decoding it.

    Raises:
        ImageError: It cannot be read, is empty, too large, or no regular file.
    """
    try:
        status = source.path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would make us wait for ever
            raise ImageError("is not a regular file")
        if status.st_size > _FILE_BYTES:
            raise ImageError(f"has {status.st_size:,} bytes; expected at most {_FILE_BYTES:,}")
        # A file of no bytes may be one of the kernel's, which can make us wait, too.
        content = source.path.read_bytes() if status.st_size else b""
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ImageError(f"is no name that a file can have: {error}") from error
    if not content:
        raise ImageError("is empty")
    return ImageFile(source=source, content=content, digest=hashlib.sha256(content).hexdigest())


def load_sample(file: ImageFile, frame: Frame, max_size: int) -> ImageSample:
    """Decode and fit an image file.

    A JPEG of many more pixels than are needed is decoded at 1/2, 1/4 or 1/8 of its size. What the
    model sees hangs on the model alone: a picture that needs more is decoded for itself.

    Raises:
        ImageError: It cannot be decoded, or is no image.
    """

    def enough(size: tuple[int, int]) -> tuple[int, int]:
        rows, cols = frame.resized(size)
        return rows * _SPARE, cols * _SPARE

    def large(size: tuple[int, int]) -> tuple[int, int]:
        return _picture_size(size, max_size)

    with ExitStack() as room:
        image, original = _decode(file.content, enough, room)
        size = _picture_size(original, max_size)
        suffices = image.height >= size[0] and image.width >= size[1]
        picture = image if suffices else _decode(file.content, large, room)[0]
        return _sample(file.source, file.digest, image, frame, _scaled(picture, size), original)


def sample_of(
    image: Image.Image | NDArray[Any], name: str, frame: Frame, max_size: int
) -> ImageSample:
    """Fit an image that is already in memory.

    Args:
        image: A Pillow image, or an array (height, width[, 3 or 4]) of uint8.
        name: What to call it.
        frame: How to fit it.
        max_size: Longest side of its picture.

    Raises:
        ImageError: Its mode or shape is none that Pillow knows.
    """
    if not isinstance(image, Image.Image):
        try:
            image = Image.fromarray(np.asarray(image))
        except (TypeError, ValueError) as error:
            raise ImageError(f"{name}: expected (height, width, 3) uint8 RGB: {error}") from error
    if not image.width or not image.height:
        raise ImageError(f"{name} has no pixels")
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    source = Source(path=Path(name), key=name)
    size = (rgb.height, rgb.width)
    picture = _scaled(rgb, _picture_size(size, max_size))
    return _sample(source, hashlib.sha256(rgb.tobytes()).hexdigest(), rgb, frame, picture, size)


def native_size(
    image: tuple[int, int], size: tuple[int, int], patch: tuple[int, int]
) -> tuple[int, int]:
    """Return the (height, width) in whole patches nearest to an image's aspect ratio.

    Args:
        image: (height, width) of the image.
        size: (height, width) of the model's training, whose number of patches is not exceeded.
        patch: (height, width) of a patch.
    """
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    aspect = (image[1] / patch[1]) / (image[0] / patch[0])
    ideal = math.sqrt(patches / aspect)
    candidates = [
        (rows, min(max(cols, 1), patches // rows))
        for rows in {min(max(math.floor(ideal), 1), patches), min(math.ceil(ideal), patches)}
        for cols in {math.floor(rows * aspect), math.ceil(rows * aspect)}
    ]

    def misfit(grid: tuple[int, int]) -> float:
        """Weigh the error in aspect ratio and the patches not used alike."""
        rows, cols = grid
        return abs(math.log(cols / rows / aspect)) + math.log(patches / (rows * cols))

    rows, cols = min(candidates, key=misfit)
    return rows * patch[0], cols * patch[1]


def _expand(argument: str | Path, skip: Callable[[Path], bool]) -> Iterator[tuple[Path, Path]]:
    """Yield the images of one argument, each with the folder that its key is relative to."""
    path = Path(argument)
    if argument == "":
        return
    if os.path.isdir(argument):  # noqa: PTH112 (has an answer for every name)
        yield from _inside(path, _absolute(path).parent, skip)
    elif isinstance(argument, str) and glob.has_magic(argument) and not os.path.lexists(argument):
        root = _fixed_part(path)
        for match in sorted(glob.glob(argument, recursive=True)):  # noqa: PTH207 (any pattern)
            if os.path.isdir(match):  # noqa: PTH112
                if "**" not in argument:  # which has walked into it already
                    yield from _inside(Path(match), root, skip)
            elif _is_image(Path(match)) and not skip(Path(match)):
                yield Path(match), root
    else:
        yield path, _absolute(path).parent


def _inside(folder: Path, root: Path, skip: Callable[[Path], bool]) -> Iterator[tuple[Path, Path]]:
    """Yield the images below a folder in a fixed order; hidden files and folders are passed over.

    Links to folders are not followed, so that loops cannot arise.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(files)):
            if not path.name.startswith(".") and _is_image(path) and not skip(path):
                yield path, root


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def identity(path: Path) -> str:
    """Return what two names of one file have in common."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # no such file can be: its name is all there is
        return str(path)


def _absolute(path: Path) -> Path:
    """Make a path absolute and resolve its "..", without following links."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _fixed_part(pattern: Path) -> Path:
    """Return the folder that a glob starts from: its parts before the first wildcard."""
    fixed = Path()
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        fixed /= part
    return _absolute(fixed)


def _key(path: Path, root: Path) -> str:
    """Name a source relative to the working directory if it lies inside, else to its root."""
    absolute, here = _absolute(path), Path.cwd()
    return absolute.relative_to(here if absolute.is_relative_to(here) else root).as_posix()


def _decode(
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
            upright = _to_rgb(image)
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


def _to_rgb(image: Image.Image) -> Image.Image:
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


def _sample(
    source: Source,
    digest: str,
    image: Image.Image,
    frame: Frame,
    picture: Image.Image,
    size: tuple[int, int],
) -> ImageSample:
    fitted, region = frame.apply(image, size)
    return ImageSample(
        source=source,
        digest=digest,
        pixels=np.asarray(fitted),
        region=region,
        picture=np.asarray(picture),
        size=size,
    )


def _picture_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return the (height, width) of the picture of an image (height, width)."""
    scale = min(longest / max(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image down to (height, width)."""
    if size == (image.height, image.width):
        return image
    return image.resize((size[1], size[0]), Image.Resampling.HAMMING, reducing_gap=_GAP)


def _span(start: float, stop: float, length: int) -> slice:
    """Return the pixels of a stretch, at least one."""
    first = min(round(start * length), length - 1)
    return slice(first, max(round(stop * length), first + 1))
