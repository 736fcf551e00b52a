"""Images ready for a model: what it sees, and what people see."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitviz.errors import ImageError
from vitviz.images.decoding import Decoded, ImageFile, decode, in_our_words, upright_rgb
from vitviz.images.fitting import GAP, InputTransform, Region
from vitviz.images.remarks import Remark
from vitviz.images.sources import Source
from vitviz.images.values import in_bytes, stored_in

__all__ = ["ImageSample", "load_sample", "sample_of"]


Pixels = NDArray[np.uint8]

_SPARE = 4  # times the side that the model sees: decoded to less, its pixels would change visibly


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageSample:
    """A decoded image: what the model sees, and what people see.

    Attributes:
        source: Where it comes from.
        digest: SHA-256 of the file's bytes (of its pixels, if it never was a file).
        pixels: (height, width, 3) RGB, what the model sees.
        region: Where on the picture the pixels lie.
        picture: (height, width, 3) RGB, the original upright, at most ``max_size`` long.
        size: (height, width) of the original upright.
        remarks: What people should know of it.
    """

    source: Source
    digest: str
    pixels: Pixels
    region: Region
    picture: Pixels
    size: tuple[int, int]
    remarks: tuple[Remark, ...] = ()

    def __repr__(self) -> str:
        """Say which image it is, without its pixels."""
        seen = "×".join(map(str, self.pixels.shape[:2]))
        return f"<ImageSample {self.source.name}, {self.size[0]}×{self.size[1]}, seen at {seen}>"


def load_sample(file: ImageFile, frame: InputTransform, max_size: int) -> ImageSample:
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
        decoded = decode(file.content, enough, room, frame.values)
        image, size = decoded.image, _picture_size(decoded.size, max_size)
        if image.height < size[0] or image.width < size[1]:
            image = decode(file.content, large, room, frame.values).image
        return _sample(file.source, file.digest, decoded, frame, _scaled(image, size))


def sample_of(
    image: Image.Image | NDArray[Any], name: str, frame: InputTransform, max_size: int
) -> ImageSample:
    """Fit an image that is already in memory.

    Args:
        image: A Pillow image, or an array (height, width[, 3]) of any numbers, floats from 0 to 1,
            or (height, width, 4) of uint8.
        name: What to call it.
        frame: How to fit it.
        max_size: Longest side of its picture.

    Raises:
        ImageError: It is none, cannot be decoded, or hardly anything would be seen of it.
    """
    rgb, remarks = _upright(image, name, frame)
    decoded = Decoded(image=rgb, size=(rgb.height, rgb.width), remarks=remarks)
    source, digest = Source(path=Path(name), key=name), hashlib.sha256(rgb.tobytes()).hexdigest()
    picture = _scaled(rgb, _picture_size(decoded.size, max_size))
    return _sample(source, digest, decoded, frame, picture)


def _upright(
    image: Image.Image | NDArray[Any], name: str, frame: InputTransform
) -> tuple[Image.Image, tuple[Remark, ...]]:
    """Bring an image in memory to RGB, as it is looked at, and say what is lost by it."""
    lost: tuple[Remark, ...] = ()
    stored, values = None, frame.values
    try:
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if _has_wide_colors(array):
                (array, lost), values = in_bytes(array, values), None
            stored = stored_in(array)
            image = Image.fromarray(array)
        if not image.width or not image.height:
            raise ImageError("has no pixels")
        with in_our_words():
            rgb, remarks = upright_rgb(image, values, stored)
    except (TypeError, ValueError) as error:
        found = "" if isinstance(image, Image.Image) else f", and got {np.shape(image)}"
        raise ImageError(
            f"{name}: expected (height, width, 3) of uint8, or of floats in [0, 1]{found}: {error}"
        ) from error
    except ImageError as error:
        raise ImageError(f"{name} {error}") from error
    return rgb, (*lost, *remarks)


def _has_wide_colors(array: NDArray[Any]) -> bool:
    """Tell whether an array is of three colours in other numbers than Pillow takes."""
    is_rgb = array.ndim == 3 and array.shape[2] == 3 and array.size > 0
    return is_rgb and array.dtype.kind in "uif" and array.dtype != np.uint8


def _sample(
    source: Source,
    digest: str,
    decoded: Decoded,
    frame: InputTransform,
    picture: Image.Image,
) -> ImageSample:
    fitted, region = frame.apply(decoded.image, decoded.size)
    return ImageSample(
        source=source,
        digest=digest,
        pixels=np.asarray(fitted),
        region=region,
        picture=np.asarray(picture),
        size=decoded.size,
        remarks=decoded.remarks,
    )


def _picture_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return the (height, width) of the picture of an image (height, width)."""
    scale = min(longest / max(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image down to (height, width)."""
    if size == (image.height, image.width):
        return image
    return image.resize((size[1], size[0]), Image.Resampling.HAMMING, reducing_gap=GAP)
