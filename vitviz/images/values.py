"""Pixel values of any type → 0 … 255, by one rule; opens no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitviz.errors import ImageError
from vitviz.images.remarks import Remark
from vitviz.options import ValueRange

__all__ = ["Scale", "Stored", "in_bytes", "in_strips", "scale_of", "stored_as", "stored_in"]

Values = NDArray[np.floating[Any]]

_STRIP_PIXELS = 1 << 21  # so much of an image is brought to RGB at once, in small memory
_SAMPLE_PIXELS = 1 << 20  # percentiles and shares are those of at most about so many
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _NO_DATA = 258, 262, 339, 42113  # tags of TIFF
_KINDS = {1: "u", 2: "i", 3: "f"}  # numpy's letters for the values of _SAMPLE_FORMAT
_WORDS = {"u": "unsigned integers", "i": "signed integers", "f": "floats"}
_BEYOND, _MOSTLY_BEYOND = 0.01, 0.5  # shares of the pixels
_NARROW = 1 / 8  # of the range: 12 bits in 16 use a sixteenth
_NOTHING = 2 / 255  # of the range: three greys at most


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How an image's values are stored.

    Attributes:
        dtype: Their type, which Pillow's mode may have widened, or taken for another.
        highest: What is white by the rule: 1 for floats, the largest integer of the type.
        inverted: Whether white is 0 instead.
        missing: The value of pixels that have none.
        reduced: Whether Pillow keeps only the upper 8 bits of them.
    """

    dtype: np.dtype[Any]
    highest: float
    inverted: bool = False
    missing: float | None = None
    reduced: bool = False

    @property
    def words(self) -> str:
        """What they are, in words."""
        return f"{8 * self.dtype.itemsize}-bit {_WORDS[self.dtype.kind]}"

    def numbers(self, strip: Image.Image) -> Values:
        """Return the values of a part of the image; NaN where there is none."""
        values = np.asarray(strip.convert("RGB") if self.dtype == np.uint8 else strip)
        if values.dtype.kind != self.dtype.kind and values.itemsize == self.dtype.itemsize:
            values = values.view(self.dtype)  # uint32 as int32, int8 as uint8: the same bytes
        numbers = values.astype(np.float64)
        numbers[~np.isfinite(numbers)] = np.nan
        if self.missing is not None:  # in the type that the pixels have, where 3.4e38 is rounded
            numbers[numbers == float(np.float32(self.missing))] = np.nan
            numbers[numbers == self.missing] = np.nan
        return numbers


def _whole(code: str) -> Stored:
    """Return values that may be anything their type has."""
    kind = np.dtype(code)
    return Stored(dtype=kind, highest=1.0 if kind.kind == "f" else float(np.iinfo(kind).max))


_BYTES = _whole("u1")


def stored_in(array: NDArray[Any]) -> Stored | None:
    """Tell how the values of an array of one band are stored; None where Pillow knows better."""
    wide = array.ndim == 2 and array.dtype.kind in "uif" and array.dtype != np.uint8
    return _whole(f"{array.dtype.kind}{array.dtype.itemsize}") if wide else None


def stored_as(image: Image.Image) -> Stored:
    """Tell how the values of an image are stored; it need not be decoded yet."""
    if image.format == "TIFF":
        return _stored_in_tiff(image)
    if image.mode == "F":
        return _whole("f4")
    # Pillow brings all wide greys of PNG and PNM to 16 bits, in some versions as int32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _whole("u2")
    if image.mode == "I":
        return _whole("i4")
    wide = any(";16" in str(each[3]) for each in getattr(image, "tile", ()))
    return replace(_BYTES, reduced=wide)


def _stored_in_tiff(image: Image.Image) -> Stored:
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (1,))[0]
    kind = _KINDS.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "u")
    if len(image.getbands()) > 1 or (bits <= 8 and kind == "u"):
        return replace(_BYTES, reduced=bits > 8)
    stored = _whole(f"{kind}{max(bits, 16) // 8 if bits > 8 else 1}")
    return replace(
        stored,
        highest=2.0**bits - 1 if kind == "u" else stored.highest,  # 12 bits end at 4095
        inverted=tags.get(_PHOTOMETRIC) == 0,  # which Pillow does for 8 bits alone
        missing=_number(tags.get(_NO_DATA)),
    )


def _number(text: Any) -> float | None:
    try:
        return float(str(text).strip("\0 "))
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Which values of an image become black and white.

    Attributes:
        stored: How they are stored.
        low: What becomes black.
        high: What becomes white.
        remarks: What is lost by it.
    """

    stored: Stored
    low: float
    high: float
    remarks: tuple[Remark, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether values become others at all."""
        return self.stored.dtype != np.uint8 or (self.low, self.high) != (0, 255)

    def apply(self, strip: Image.Image) -> Image.Image:
        """Bring a part of the image to 8 bits; pixels without a value become black."""
        if self.stored.dtype != np.uint8:
            return Image.fromarray(self._levels(self.stored.numbers(strip)))
        bands = np.array(strip.convert("RGBA" if strip.has_transparency_data else "RGB"))
        bands[..., :3] = self._levels(bands[..., :3].astype(np.float64))
        return Image.fromarray(bands)

    def _levels(self, values: Values) -> NDArray[np.uint8]:
        # Halves, so that no difference overflows.
        half = self.high / 2 - self.low / 2
        shares = np.clip((values / 2 - self.low / 2) / half, 0, 1)
        if self.stored.inverted:
            shares = 1 - shares
        return np.rint(np.nan_to_num(shares, nan=0) * 255).astype(np.uint8)


def scale_of(image: Image.Image, stored: Stored, wanted: ValueRange | None) -> Scale | None:
    """Choose which values become black and white; None where 8 bits stay as they are.

    Args:
        image: The image, decoded.
        stored: How its values were stored.
        wanted: What was asked for; None: from 0 to the highest value of the type, 1 for floats.

    Raises:
        ImageError: Hardly anything of the image would be left.
    """
    if wanted is None and stored == _BYTES:
        return None
    if wanted is not None and stored.reduced:
        raise ImageError(
            "has colours of 16 bits, of which Pillow keeps the upper 8, so that --value-range "
            "cannot be applied; convert it to 8 bits, or to grey of 16"
        )
    found = _Found.of(image, stored)
    low, high = found.ends(wanted) if wanted else (0.0, stored.highest)
    remarks = found.remarks(low, high, wanted)
    return Scale(stored=stored, low=low, high=high, remarks=tuple(remarks))


def in_bytes(
    colors: NDArray[Any], wanted: ValueRange | None
) -> tuple[NDArray[np.uint8], tuple[Remark, ...]]:
    """Bring an array of colours of any numbers to 8 bits, by the rule for greys.

    Args:
        colors: (height, width, 3).
        wanted: As for ``scale_of``; the ends are those of all three colours.

    Returns:
        (height, width, 3), and what is lost by it.

    Raises:
        ImageError: Hardly anything of the image would be left.
        TypeError: Pillow knows no such numbers.
    """
    height, width, bands = colors.shape
    if colors.dtype in (np.float16, np.float64):
        colors = colors.astype(np.float32)
    side_by_side = Image.fromarray(np.ascontiguousarray(colors).reshape(height, width * bands))
    scale = scale_of(side_by_side, _whole(colors.dtype.str[1:]), wanted)
    assert scale is not None  # what is no byte is scaled
    return np.asarray(scale.apply(side_by_side)).reshape(colors.shape), scale.remarks


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """The values found in an image: the ends, a sample in order, and how they are stored."""

    stored: Stored
    lowest: float
    highest: float
    sample: Values
    missing: bool

    @classmethod
    def of(cls, image: Image.Image, stored: Stored) -> _Found:
        """Look through an image."""
        step = max(1, round((image.width * image.height / _SAMPLE_PIXELS) ** 0.5))
        lowest, highest, missing, parts = np.inf, -np.inf, False, []
        for _, strip in _strips(image):
            numbers = stored.numbers(strip)
            known = numbers[~np.isnan(numbers)]
            missing |= len(known) < numbers.size
            lowest = min(lowest, float(known.min(initial=np.inf)))
            highest = max(highest, float(known.max(initial=-np.inf)))
            some = numbers[::step, ::step].ravel()
            parts.append(some[~np.isnan(some)])
        sample = np.sort(np.concatenate(parts))
        if not len(sample):
            raise ImageError("has no pixel with a value: all are NaN, infinite or no data")
        return cls(
            stored=stored, lowest=lowest, highest=highest, sample=sample, missing=bool(missing)
        )

    def ends(self, wanted: ValueRange) -> tuple[float, float]:
        """Return what is asked for in values."""
        if not wanted.percentiles:
            return wanted.low, wanted.high
        low, high = (self._percentile(each) for each in (wanted.low, wanted.high))
        if low >= high:
            raise ImageError(
                f"has the same value, {low:g}, at both ends of --value-range {wanted}; it has "
                f"values {self._words}: give percentiles farther apart, or --value-range LOW:HIGH"
            )
        return low, high

    def _percentile(self, percent: float) -> float:
        if percent in (0, 100):
            return self.highest if percent else self.lowest
        return float(np.percentile(self.sample, percent))

    @property
    def _words(self) -> str:
        return f"from {self.lowest:g} to {self.highest:g}"

    def remarks(self, low: float, high: float, wanted: ValueRange | None) -> Iterator[Remark]:
        """Yield what is lost between these ends.

        Raises:
            ImageError: Nearly everything is.
        """
        spread = self._share(self.highest, low, high) - self._share(self.lowest, low, high)
        ends = np.searchsorted(self.sample, low), np.searchsorted(self.sample, high, side="right")
        beyond = 0.0 if wanted and wanted.percentiles else 1 - (ends[1] - ends[0]) / self._size
        # Who names the ends may well cut off much, as of a CT all but a window.
        most, some = (1.0, _MOSTLY_BEYOND) if wanted else (_MOSTLY_BEYOND, _BEYOND)
        varied = self.highest > self.lowest
        what = f"{self.stored.words} {self._words}, where {low:g} is black and {high:g} white"
        if beyond > most or (varied and spread <= _NOTHING and not self.stored.reduced):
            raise ImageError(
                f"has {what}: hardly anything would be seen; try --value-range "
                f"{self.lowest:g}:{self.highest:g}, or percentiles such as 1%:99%"
            )
        cure = f"{what}; --value-range sets the ends, or percentiles such as 1%:99%"
        if self.stored.reduced:
            cure = "16-bit colours nearly all alike in the upper 8 bits; convert it to 8 bits"
        if self.missing:
            yield Remark("pixels without a value", "NaN, infinite or no data; drawn black")
        if beyond > some:
            yield Remark("pixel values beyond the ends of their range", cure)
        robust = np.percentile(self.sample, (1, 99))
        if self._share(robust[1], low, high) - self._share(robust[0], low, high) <= _NARROW:
            yield Remark("pixel values that use almost nothing of their range", cure)

    @property
    def _size(self) -> int:
        return len(self.sample)

    @staticmethod
    def _share(value: float, low: float, high: float) -> float:
        return min(max((value / 2 - low / 2) / (high / 2 - low / 2), 0.0), 1.0)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row of each strip of an image, and the strip."""
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def in_strips(convert: Callable[[Image.Image], Image.Image], image: Image.Image) -> Image.Image:
    """Convert an image to RGB strip by strip: on the way, pixels take many times their memory."""
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb
