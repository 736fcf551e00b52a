"""Choices that several rooms share: enums and frozen dataclasses, checked once, without torch."""

from __future__ import annotations

import difflib
import math
import operator
from dataclasses import dataclass
from enum import Enum

from vitviz.errors import OptionError

__all__ = [
    "AttentionRule",
    "Colormap",
    "Convention",
    "Fit",
    "Foreground",
    "HeadFusion",
    "Outliers",
    "OutputKind",
    "PictureFormat",
    "PictureOptions",
    "Precision",
    "ResidualRule",
    "Saved",
    "Scale",
    "Unit",
    "ValueRange",
    "Word",
    "real",
    "require_counts",
    "whole",
]


class Word(str, Enum):
    """An enum whose members are the words that a user types."""

    def __str__(self) -> str:
        """Return the word itself."""
        return str(self.value)

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise OptionError(cls.refusal(value))

    @classmethod
    def refusal(cls, value: object) -> str:
        """Say that a value is none of the words, and which one may be meant."""
        near = difflib.get_close_matches(str(value).lower(), cls, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{value!r} is not one of {', '.join(cls)}{hint}"


class HeadFusion(Word):
    """How the heads of one block become one map."""

    MEAN = "mean"
    MAX = "max"
    MIN = "min"


class AttentionRule(Word):
    """How relevance passes attention on its way back in ``evidence``."""

    VALUE = "value"
    SHARED = "shared"


class ResidualRule(Word):
    """How evidence passes residual additions on its way back."""

    PLAIN = "plain"
    BALANCED = "balanced"


class Fit(Word):
    """How an image of any shape is brought to what the model takes."""

    SQUASH = "squash"
    CROP = "crop"
    NATIVE = "native"


class Foreground(Word):
    """Whether features are split into foreground and background."""

    AUTO = "auto"
    OFF = "off"


class Precision(Word):
    """The numbers that a model computes with; relevance is float32 in any case."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Convention(Word):
    """How faithfulness is measured: what is taken away, how much of it, and how it is summed up."""

    VITVIZ = "vitviz"
    CHEFER2021 = "chefer2021"
    SRG = "srg"


class PictureFormat(Word):
    """How pictures are stored."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    GIF = "gif"

    @property
    def ending(self) -> str:
        """How names of such files end."""
        return ".jpg" if self is PictureFormat.JPEG else f".{self}"


class OutputKind(Word):
    """What is written for each map."""

    OVERLAY = "overlay"
    HEATMAP = "heatmap"
    PANEL = "panel"
    GRAY = "gray"
    NPY = "npy"

    def ending(self, format: PictureFormat = PictureFormat.PNG) -> str:
        """Return how names of such files end: no two kinds alike, else maps would overwrite."""
        if self is OutputKind.NPY:
            return ".npy"
        kind = "" if self is OutputKind.OVERLAY else f".{self}"
        return kind + self.stored_as(format).ending

    def stored_as(self, format: PictureFormat) -> PictureFormat:
        """Return the format of such pictures: the numbers of ``gray`` are never lossy."""
        return PictureFormat.PNG if self is OutputKind.GRAY else format


class Saved(Word):
    """What is kept of each map: files of a kind, the numbers in a table, or neither."""

    OVERLAY = "overlay"
    HEATMAP = "heatmap"
    PANEL = "panel"
    GRAY = "gray"
    NPY = "npy"
    TABLE = "table"
    NONE = "none"


class Colormap(Word):
    """Colour tables: OpenCV's, and one for maps with a sign, blue over white to red."""

    REDBLUE = "redblue"
    TURBO = "turbo"
    JET = "jet"
    HOT = "hot"
    VIRIDIS = "viridis"
    PLASMA = "plasma"
    INFERNO = "inferno"
    MAGMA = "magma"
    CIVIDIS = "cividis"
    PARULA = "parula"
    BONE = "bone"


class Outliers(Word):
    """What pictures do with patch tokens of outlying norm, whose heat is of no place."""

    MARK = "mark"
    MUTE = "mute"
    SHOW = "show"


class Unit(Word):
    """What the numbers of a colour bar count."""

    AVERAGE = "times average"
    LOGIT = "logit"
    COSINE = "cosine"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is drawn coldest and hottest in all pictures, in the unit of the method.

    Attributes:
        low: What is drawn coldest.
        high: What is drawn hottest.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        """Check that they are in order; raises ``OptionError``."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise OptionError(f"--scale is {self}; {_SCALE_HINT}")

    @classmethod
    def ensure(cls, given: object) -> Scale | None:
        """Read "0:10" or a pair of numbers; "image", None and scales stay what they mean.

        Raises:
            OptionError: It is none of these.
        """
        if given is None or isinstance(given, Scale):
            return given
        if isinstance(given, str) and given == "image":
            return None
        try:
            low, high = map(float, given.split(":") if isinstance(given, str) else given)  # type: ignore[call-overload]
        except (TypeError, ValueError):
            raise OptionError(f"--scale is {given!r}; {_SCALE_HINT}") from None
        return cls(low=low, high=high)

    def __str__(self) -> str:
        """Write it as it is typed."""
        return f"{self.low:g}:{self.high:g}"


_SCALE_HINT = "give image, or LOW:HIGH with LOW below HIGH, as 0:10"


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How maps become files.

    Attributes:
        kinds: What to write for each map.
        colormap: Table from relevance to colour; None: the one for the method.
        alpha: Weight of the hottest colour in an overlay, in [0, 1]; less heat has less.
        max_size: Longest side of the pictures, in pixels.
        scale: What is drawn coldest and hottest, "0:10", (0, 10) or a ``Scale``; None or "image":
            the least and the most of each map.
        format: How pictures are stored.
        outliers: Whether patches whose tokens are outliers get a frame, are left out of what
            decides on the colours (and get a frame where they are beyond), or are shown like all
            others.
    """

    kinds: tuple[OutputKind, ...] = (OutputKind.OVERLAY,)
    colormap: Colormap | None = None
    alpha: float = 0.75
    max_size: int = 1024
    scale: Scale | str | tuple[float, float] | None = None
    format: PictureFormat = PictureFormat.PNG
    outliers: Outliers = Outliers.MUTE

    def __post_init__(self) -> None:
        """Check the ranges; raises ``OptionError``."""
        for name, value in {  # Python users have words for enums, and NumPy's numbers
            "kinds": tuple(map(OutputKind, self.kinds)),
            "colormap": self.colormap and Colormap(self.colormap),
            "format": PictureFormat(self.format),
            "outliers": Outliers(self.outliers),
            "alpha": real("--alpha", self.alpha),
            "max_size": whole("--max-size", self.max_size),
            "scale": Scale.ensure(self.scale),
        }.items():
            object.__setattr__(self, name, value)
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"--alpha is {self.alpha:g}; give the weight of the heat from 0 to 1")
        if self.max_size < 1:
            raise OptionError(f"--max-size is {self.max_size}; give a side of at least 1 pixel")

    def table(self, default: Colormap) -> Colormap:
        """Return the colour table for maps of a method that has a default of its own."""
        return self.colormap or default

    @property
    def extent(self) -> tuple[float, float] | None:
        """What is drawn coldest and hottest; None where each map decides."""
        scale = Scale.ensure(self.scale)
        return None if scale is None else (scale.low, scale.high)

    def to_record(self, kind: OutputKind, default: Colormap) -> dict[str, str | float]:
        """Return the options that shape a file of this kind, for records and provenance."""
        if kind is OutputKind.NPY:
            return {}
        options: dict[str, str | float] = {
            "max_size": self.max_size,
            "scale": str(self.scale or "image"),
            "outliers": self.outliers.value,
        }
        if kind is not OutputKind.GRAY:
            options["colormap"] = self.table(default).value
            options["format"] = self.format.value
        if kind not in (OutputKind.HEATMAP, OutputKind.GRAY):
            options["alpha"] = self.alpha
        return options


@dataclass(frozen=True, kw_only=True)
class ValueRange:
    """Which values of pixels become black and white, in place of the range of their type.

    Attributes:
        low: What becomes black.
        high: What becomes white.
        percentiles: Whether these are percentiles of each image's values, in [0, 100].
    """

    low: float
    high: float
    percentiles: bool = False

    def __post_init__(self) -> None:
        """Check the ends.

        Raises:
            OptionError: They are not in order, or no percentiles.
        """
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        within = not self.percentiles or (self.low >= 0 and self.high <= 100)
        if not (finite and within and self.low < self.high):
            raise OptionError(f"--value-range is {self}; {_RANGE_HINT}")

    @classmethod
    def ensure(cls, given: object) -> ValueRange | None:
        """Read "0:4095", "1%:99%" or a pair of numbers; None and ranges stay what they are.

        Raises:
            OptionError: It is none of these.
        """
        if given is None or isinstance(given, ValueRange):
            return given
        if isinstance(given, (tuple, list)) and len(given) == 2:
            given = f"{given[0]}:{given[1]}"
        ends = str(given).split(":")
        percentiles = all(end.strip().endswith("%") for end in ends)
        try:
            low, high = (float(end.strip().removesuffix("%" * percentiles)) for end in ends)
        except ValueError:
            raise OptionError(f"--value-range is {given!r}; {_RANGE_HINT}") from None
        return cls(low=low, high=high, percentiles=percentiles)

    @staticmethod
    def to_record(given: ValueRange | None) -> dict[str, str]:
        """Return the option for records, which leave it out where none is given."""
        return {} if given is None else {"value_range": str(given)}

    def __str__(self) -> str:
        """Write it as it is typed."""
        unit = "%" if self.percentiles else ""
        low, high = (repr(float(end)).removesuffix(".0") for end in (self.low, self.high))
        return f"{low}{unit}:{high}{unit}"


_RANGE_HINT = (
    "give LOW:HIGH with LOW below HIGH, as 0:4095, or percentiles of each image, as 1%:99%"
)


def whole(name: str, value: object) -> int:
    """Read a whole number, of whatever kind of number Python users have: NumPy's, a tensor, 2.0.

    Raises:
        OptionError: It is none.
    """
    if not isinstance(value, (bool, str, bytes)):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            number = real(name, value)
        if number.is_integer():
            return int(number)
    raise OptionError(f"{name} is {value!r}; give a whole number")


def real(name: str, value: object) -> float:
    """Read a number, of whatever kind.

    Raises:
        OptionError: It is none.
    """
    if not isinstance(value, (bool, str, bytes)):
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    raise OptionError(f"{name} is {value!r}; give a number")


def require_counts(batch_size: int | None, workers: int | None) -> None:
    """Make sure that counts, where they are given, are counts.

    Raises:
        OptionError: One is below 1.
    """
    for name, count in (("--batch-size", batch_size), ("--workers", workers)):
        if count is not None and count < 1:
            raise OptionError(f"{name} is {count}; give a number from 1 up, or auto")
