"""One map of one image, with what is needed to draw it and to say what it is about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitviz.errors import printable
from vitviz.images.samples import ImageSample
from vitviz.methods.method import Method
from vitviz.options import Outliers, OutputKind, PictureOptions
from vitviz.pictures.colors import color_heat
from vitviz.pictures.components import ColorSpace, patches_of
from vitviz.pictures.encoding import png
from vitviz.pictures.heat import FLAT, coarser, finer, in_unit, limits, place_heat
from vitviz.pictures.painting import paint
from vitviz.pictures.sheets import contact_sheet, mark, overlay, shrink_to_cell
from vitviz.pictures.tables import Cell, ColorBar, in_rows, picture_table

__all__ = ["Caveat", "Explanation", "Prediction", "Diagnostics"]


_ACROSS = 4  # frames side by side
_CROWDED = 0.5  # share of attention
_MISPLACED = 0.1  # share of the heat
_EVEN = 0.05  # of its largest magnitude
_POWERLESS = 1e-3  # of a logit
_IMPROBABLE = 0.05  # a score


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One of an image's best classes.

    Attributes:
        class_index: Position among the logits.
        class_label: Full description, None when the class has no name.
        score: Probability, by softmax or sigmoid.
    """

    class_index: int
    class_label: str | None
    score: float


class Caveat(Enum):
    """Why a picture may mislead: what it is about, and why that is."""

    FLAT = ("no heat at all", "attention is the same everywhere")
    FLAT_FOR_CLASS = ("no heat at all", "no token supports this class")
    EVEN = ("nearly the same heat everywhere", "the colours exaggerate small differences")
    PREFIX = ("most attention on prefix tokens", "no map shows what they attend to or hold")
    OUTLIERS = ("patch tokens of outlying norm", "heat there does not indicate image location")
    SAME = ("no heat at all", "the class is the one that it is compared with")
    POWERLESS = ("next to no gradient", "what is drawn hardly affects the class")


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Numbers that tell when a map may mislead.

    Attributes:
        prefix_attention: Share of the attention that goes to prefix tokens, which no map shows.
        outlier_tokens: Patch tokens of more than five times the median norm behind the blocks.
        outlier_share: Share of the map's heat that is on these.
        contrast: Range of the map as a share of its largest magnitude.
        gradient_norm_product: ‖x‖·‖∂y/∂x‖ at the last block, in units of the logit y, which is the
            most that the map's tokens could move it; None without a class.
    """

    prefix_attention: float
    outlier_tokens: int
    contrast: float
    gradient_norm_product: float | None
    outlier_share: float = 0.0

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Diagnostics:
        """Read what ``to_record`` wrote; a ``TypeError`` tells of other keys."""
        numbers = dict(record)
        return cls(gradient_norm_product=numbers.pop("leverage"), **numbers)

    def to_record(self) -> dict[str, Any]:
        """Return it as records and files have it."""
        numbers = asdict(self)
        # The key is what records have said from the first version on.
        numbers["leverage"] = numbers.pop("gradient_norm_product")
        return numbers

    def caveats(self) -> list[Caveat]:
        """Say why the picture may mislead; nothing where it need not."""
        about_class, is_flat = self.gradient_norm_product is not None, self.contrast <= FLAT
        found = [
            (is_flat, Caveat.FLAT_FOR_CLASS if about_class else Caveat.FLAT),
            (not is_flat and self.contrast < _EVEN, Caveat.EVEN),
            (self.prefix_attention > _CROWDED, Caveat.PREFIX),
            (self.outlier_share > _MISPLACED, Caveat.OUTLIERS),
        ]
        if not is_flat and self.gradient_norm_product is not None:
            found.append((self.gradient_norm_product < _POWERLESS, Caveat.POWERLESS))
        return [caveat for is_so, caveat in found if is_so]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Explanation:
    """One relevance map.

    Attributes:
        method: How it was computed.
        relevance: float32, before any normalisation, along the method's ``axes``: (rows, cols),
            or (blocks, heads, rows, cols) of raw attention, (channels, rows, cols) of features,
            (frames, rows, cols) of an animation.
        sample: The image.
        model: The model's name.
        request: Name of the class request (``c281``, ``top1``, ``c281-vs-top2``), or of the
            target that stands in its place; None when class-agnostic.
        class_index: The class that it explains; None when class-agnostic.
        class_label: That class's full description, if it has one.
        class_score: That class's score; of a target in its place, what it gave.
        versus_index: The class that it is compared with, the map being of the difference of the
            two logits; None where there is none.
        versus_label: As ``class_label``.
        versus_score: As ``class_score``.
        predictions: The image's five best classes; empty for a model without a head.
        pictures: How to draw it.
        diagnostics: Numbers that tell when it may mislead.
        outliers: (rows, cols) of the patches, which of their tokens are of outlying norm.
        colors: Of features, the colours that all images of a run share; None: fitted on its own.
    """

    method: Method
    relevance: NDArray[np.float32]
    sample: ImageSample
    model: str = ""
    diagnostics: Diagnostics | None = None
    request: str | None = None
    class_index: int | None = None
    class_label: str | None = None
    class_score: float | None = None
    versus_index: int | None = None
    versus_label: str | None = None
    versus_score: float | None = None
    predictions: tuple[Prediction, ...] = ()
    pictures: PictureOptions = PictureOptions()
    outliers: NDArray[np.bool_] | None = None
    colors: ColorSpace | None = None

    @property
    def source(self) -> Path:
        """The path of the image; for one that came without a file, ``image N``, counted from 0."""
        return self.sample.source.path

    def overlay(self) -> Image.Image:
        """Draw the heat over the image in grey."""
        return Image.fromarray(self.draw(OutputKind.OVERLAY))

    def heatmap(self) -> Image.Image:
        """Draw the heat alone."""
        return Image.fromarray(self.draw(OutputKind.HEATMAP))

    def panel(self) -> Image.Image:
        """Draw image, overlay and heat side by side, with titles and a colour bar."""
        return Image.fromarray(self.draw(OutputKind.PANEL))

    def draw(self, kind: OutputKind) -> NDArray[np.uint8]:
        """Draw a picture of any kind: (height, width, 3) RGB, of ``gray`` (height, width).

        Raises:
            OptionError: The map has more than rows and columns, and ``gray`` is of one map.
        """
        if kind is OutputKind.GRAY:
            self.method.require_one_map()
            heat = self._heat(self.relevance, self.sample.picture)
            return np.rint(np.nan_to_num(heat) * 255).astype(np.uint8)
        if self.is_animated:
            return self._draw_frames(kind)
        if kind is OutputKind.PANEL:
            return picture_table([self._cells()], title=self.caption, subtitle=self.details)
        if len(self.method.axes) == 2:
            drawn = self._draw_map(self.relevance, self.sample.picture, kind)
            return mark(drawn, self._framed(), self.sample.region)
        if self.method.axes[0] == "channels":
            return self._draw_features(kind)
        return self._draw_heads(kind, f"{self.caption} · {self.origin}")

    @property
    def is_animated(self) -> bool:
        """Whether it has several maps, one after the other."""
        return self.method.is_animated

    def animation(self, kind: OutputKind) -> list[NDArray[np.uint8]]:
        """Draw the frames of an animation: (height, width, 3) each, with titles and colour bars."""
        return [
            picture_table(
                [frame._cells() if kind is OutputKind.PANEL else [frame.cell(kind, "")]],
                title=f"{self.caption}, {name}",
                subtitle=self.origin,
            )
            for name, frame in self._frames()
        ]

    def _frames(self) -> Iterator[tuple[str, Explanation]]:
        """Yield the name and the map of each frame."""
        for position, relevance in enumerate(self.relevance):
            frame = replace(self, method=self.method.still, relevance=relevance)
            yield self.method.frame_name(position), frame

    def _draw_frames(self, kind: OutputKind) -> NDArray[np.uint8]:
        """Draw all frames side by side, in rows."""
        kind = OutputKind.OVERLAY if kind is OutputKind.PANEL else kind
        rows = in_rows([frame.cell(kind, name) for name, frame in self._frames()], _ACROSS)
        drawn = Image.fromarray(picture_table(rows, title=self.caption, subtitle=self.origin))
        drawn.thumbnail((self.pictures.max_size,) * 2, Image.Resampling.LANCZOS)
        return np.asarray(drawn)

    def cell(self, kind: OutputKind, title: str) -> Cell:
        """Return a picture of a table, with what its colours mean, where they are heat."""
        bar = self.color_bar() if self._has_heat else None
        return Cell(picture=self.draw(kind), title=title, bar=bar)

    @property
    def _has_heat(self) -> bool:
        return self.method.axes[0] != "channels"

    def _cells(self) -> list[Cell]:
        """Return the pictures of a panel."""
        if self.method.axes[0] == "blocks":
            kinds = (OutputKind.OVERLAY, OutputKind.HEATMAP)
            return [Cell(picture=self._draw_heads(kind, kind.value)) for kind in kinds]
        return [
            Cell(picture=self.sample.picture, title="image"),
            Cell(picture=self.draw(OutputKind.OVERLAY), title="overlay"),
            self.cell(OutputKind.HEATMAP, "heat" if self._has_heat else "colours"),
        ]

    def _draw_heads(self, kind: OutputKind, title: str) -> NDArray[np.uint8]:
        """Draw one map for each head of each block."""
        blocks, heads = self.relevance.shape[:2]
        cell = shrink_to_cell(self.sample.picture, blocks, heads, self.pictures.max_size)
        return contact_sheet(
            [[self._draw_map(head, cell, kind) for head in block] for block in self.relevance],
            title,
            self.color_bar(),
        )

    def _draw_features(self, kind: OutputKind) -> NDArray[np.uint8]:
        """Draw features (channels, rows, cols)."""
        space = self.colors or ColorSpace.fit([patches_of(self.relevance, 1)], foreground=False)
        alpha = 1 if kind is OutputKind.HEATMAP else self.pictures.alpha
        return paint(space.colors(self.relevance), self.sample.region, self.sample.picture, alpha)

    def _draw_map(
        self, relevance: NDArray[np.float32], picture: NDArray[np.uint8], kind: OutputKind
    ) -> NDArray[np.uint8]:
        """Draw one map (rows, cols)."""
        heat, table = self._heat(relevance, picture), self.pictures.table(self.method.colormap)
        if kind is OutputKind.HEATMAP:
            return color_heat(heat, table)
        return overlay(picture, heat, table, self.pictures.alpha, signed=self.method.is_signed)

    def _heat(
        self, relevance: NDArray[np.float32], picture: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        """Return the heat of one map on a picture: (height, width) in [0, 1]."""
        return place_heat(
            in_unit(relevance, self.method.unit),
            self.sample.region,
            picture.shape[:2],
            signed=self.method.is_signed,
            extent=self._extent or self._limits(relevance),
        )

    @property
    def _extent(self) -> tuple[float, float] | None:
        """What is drawn coldest and hottest; None where each map decides."""
        return self.pictures.extent or self.method.extent

    def _framed(self) -> NDArray[np.bool_]:
        """Return which patches (rows, cols) are framed: outliers, muted ones beyond the colours."""
        ends = self._limits(self.relevance)
        if self.outliers is None or self.pictures.outliers is Outliers.SHOW or ends is None:
            return np.zeros((1, 1), dtype=np.bool_)
        if self.pictures.outliers is Outliers.MARK:
            return self.outliers
        values = in_unit(self.relevance, self.method.unit)
        beyond = (values < ends[0]) | (values > ends[1])
        return self.outliers & coarser(beyond, self.outliers.shape)

    def _limits(self, relevance: NDArray[np.float32]) -> tuple[float, float] | None:
        """Return what is drawn coldest and hottest; None for a map (rows, cols) without heat."""
        values = in_unit(relevance, self.method.unit)
        if self.outliers is not None and self.pictures.outliers is Outliers.MUTE:
            others = values[~finer(self.outliers, values.shape)]
            values = others if others.size else values
        return limits(values, signed=self.method.is_signed, extent=self._extent)

    @property
    def color_range(self) -> tuple[float, float] | None:
        """What is drawn coldest and hottest, in the unit of the method.

        None for a map without heat, and for one of several heads, each of which has its own.
        """
        return self._extent if len(self.method.axes) > 2 else self._limits(self.relevance)

    def color_bar(self) -> ColorBar:
        """Say what its colours mean, in the unit of the method."""
        table, unit = self.pictures.table(self.method.colormap), self.method.unit.value
        if len(self.method.axes) > 2 and self._extent is None:
            return ColorBar(colormap=table, low="least", high="most", unit="of each head")
        ends = self.color_range
        if ends is None:
            return ColorBar(colormap=table, low="", high="", unit="no heat")
        low, high = _numbers(*ends)
        return ColorBar(colormap=table, low=low, high=high, unit=unit)

    @property
    def origin(self) -> str:
        """The file and the model that it is of."""
        return " · ".join(filter(None, (printable(self.source.name), printable(self.model))))

    @property
    def details(self) -> str:
        """Its origin, and what the frames on it mean, if there are any."""
        is_framed = len(self.method.axes) == 2 and self._framed().any()
        return self.origin + " · framed: patches of outlying norm" * bool(is_framed)

    @property
    def caption(self) -> str:
        """What the map shows, in one line."""
        return ": ".join(filter(None, (self.method.title, self.subject)))

    @property
    def subject(self) -> str:
        """The class that it is about with its score; empty where it is about none."""
        if self.class_index is None:
            return f"{printable(self.request)} ({self.class_score:.3g})" if self.request else ""
        own = _named(self.class_label, self.class_index)
        score = "" if self.class_score is None else f" ({_percentage(self.class_score)})"
        if self.versus_index is None:
            return f"{own}{score}"
        other = _named(self.versus_label, self.versus_index)
        # Of two descriptions, each with its synonyms, a caption has no room.
        own, other = own.partition(",")[0], other.partition(",")[0]
        versus = "" if self.versus_score is None else f" ({_percentage(self.versus_score)})"
        return f"{own}{score} versus {other}{versus}"

    def caveats(self) -> list[Caveat]:
        """Say why the picture may mislead; nothing where it need not."""
        if self.versus_index is not None and self.versus_index == self.class_index:
            return [Caveat.SAME]
        found = self.diagnostics.caveats() if self.diagnostics else []
        if self.method.follows_attention:
            return found
        has_outliers = self.diagnostics is not None and self.diagnostics.outlier_tokens > 0
        return [Caveat.OUTLIERS] if has_outliers else []

    def __repr__(self) -> str:
        """Say what it is of, without its pixels."""
        shape = "×".join(map(str, self.relevance.shape))
        return f"<Explanation of {self.source}: {self.caption}, {shape}>"

    def _repr_png_(self) -> bytes:
        """Show the overlay in a notebook."""
        return png(self.overlay())


def _named(label: str | None, class_index: int) -> str:
    return printable(label or f"class {class_index}")


def _numbers(low: float, high: float) -> tuple[str, str]:
    """Write two numbers with as many decimals as give the larger one three figures."""
    largest = max(abs(low), abs(high))
    decimals = max(2 - math.floor(math.log10(largest)), 0) if largest else 0
    if decimals > 6:
        return f"{low:.2e}", f"{high:.2e}"
    words = (f"{each:.{decimals}f}" for each in (low, high))
    first, second = (word.rstrip("0").rstrip(".") if "." in word else word for word in words)
    return "0" if first == "-0" else first, second


def _percentage(score: float) -> str:
    """Write the score of a class, marked where its map would glow like that of a likely one."""
    share = "<1%" if 0 < score < 0.005 else f"{score:.0%}"
    return f"{share}, improbable" if score < _IMPROBABLE else share
