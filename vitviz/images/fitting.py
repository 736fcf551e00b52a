"""Bringing an image to the size that a model takes, and where on it the model then looks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from PIL import Image

from vitviz.options import Fit, ValueRange

__all__ = ["InputTransform", "GAP", "Region", "native_size"]

GAP = 3.0  # images six times too large are halved first: it moves photographs by 1/255
_RESIZED_PIXELS = 1 << 25  # up to here, a crop resizes the whole image first, as timm does


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
class InputTransform:
    """How images are brought to what a model takes.

    Attributes:
        fit: Squash, crop or native.
        size: (height, width) that the model takes.
        patch: (height, width) of a patch.
        resample: Pillow's filter.
        crop_pct: Share of the resized image that a crop keeps.
        values: Which values become black and white; None: by the range of their type.
    """

    fit: Fit
    size: tuple[int, int]
    patch: tuple[int, int]
    resample: Image.Resampling
    crop_pct: float
    values: ValueRange | None = None

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
        fitted = image.resize((cols, rows), self.resample, reducing_gap=GAP)
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


def _span(start: float, stop: float, length: int) -> slice:
    """Return the pixels of a stretch, at least one."""
    first = min(round(start * length), length - 1)
    return slice(first, max(round(stop * length), first + 1))
