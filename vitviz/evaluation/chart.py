"""Curves as a picture: panels side by side and a legend; knows nothing of what they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Color", "Entry", "Panel", "Point", "draw_chart"]


Color = tuple[int, int, int]
Point = tuple[float, float]

_SCALE = 2  # drawn so much larger and brought to size, so that lines come out smooth
_PANEL = (400, 320)  # (width, height) of the plotted area of a panel
_LEFT, _TOP, _BETWEEN, _BOTTOM = 56, 112, 64, 64
_LEGEND, _ROW = 290, 24  # width of the legend, height of a line in it
_TICK, _LABEL, _HEADING, _TITLE = 12, 13, 16, 19  # sizes of letters
_STEP = 0.2  # between ticks
_DASH, _SPACE = 7, 5

_INK, _SOFT, _GRID, _PAPER = (33, 37, 41), (108, 117, 125), (229, 232, 236), (255, 255, 255)
_MUTED = ((173, 181, 189), (108, 117, 125), (73, 80, 87))
# Okabe and Ito's colours, which people who see colours differently tell apart.
_BRIGHT = (
    *((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167)),
    *((230, 159, 0), (86, 180, 233), (117, 80, 210), (90, 60, 30)),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """Curves in one pair of axes, each axis from 0 to 1 at most.

    Attributes:
        heading: Above it.
        remark: Under the heading.
        label: Of the horizontal axis, which is in per cent.
        curves: Of each entry, x and y (points).
    """

    heading: str
    remark: str
    label: str
    curves: Sequence[tuple[NDArray[np.floating], NDArray[np.floating]]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the legend says of a curve.

    Attributes:
        name: Of what is plotted.
        numbers: One for each panel.
        muted: Whether it is there for comparison only: dashed, in grey.
    """

    name: str
    numbers: tuple[str, ...]
    muted: bool = False


def draw_chart(
    title: str, columns: Sequence[str], entries: Sequence[Entry], panels: Sequence[Panel]
) -> NDArray[np.uint8]:
    """Draw panels side by side, and a legend with numbers at the right.

    Args:
        title: Above all.
        columns: Headings of the legend's numbers.
        entries: What is plotted, in the order of the panels' curves.
        panels: Where.

    Returns:
        (height, width, 3) RGB.
    """
    width = _LEFT + len(panels) * (_PANEL[0] + _BETWEEN) + _LEGEND
    height = _TOP + max(_PANEL[1] + _BOTTOM, (len(entries) + 2) * _ROW)
    canvas = _Canvas(width, height)
    canvas.text((_LEFT, 24), title, _TITLE)
    highest = _round_up(max(_highest(panel) for panel in panels))
    colors = _colors(entries)
    for position, panel in enumerate(panels):
        corner = (_LEFT + position * (_PANEL[0] + _BETWEEN), _TOP)
        _draw_panel(canvas, corner, panel, entries, colors, highest)
    _draw_legend(canvas, (width - _LEGEND - 16, _TOP), columns, entries, colors)
    return canvas.finished()


class _Canvas:
    """A sheet to draw on, in the pixels that it has when it is finished."""

    def __init__(self, width: int, height: int) -> None:
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[Point], color: Color, width: float) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, color, round(width * _SCALE), joint="curve")

    def dot(self, point: Point, color: Color, radius: float) -> None:
        x, y, size = (value * _SCALE for value in (*point, radius))
        self._draw.ellipse((x - size, y - size, x + size, y + size), color)

    def text(
        self, point: Point, text: str, size: int, color: Color = _INK, anchor: str = "ls"
    ) -> None:
        font = ImageFont.load_default(size * _SCALE)
        self._draw.text((point[0] * _SCALE, point[1] * _SCALE), text, color, font, anchor)

    def finished(self) -> NDArray[np.uint8]:
        size = (self._image.width // _SCALE, self._image.height // _SCALE)
        return np.asarray(self._image.resize(size, Image.Resampling.BOX))


def _draw_panel(
    canvas: _Canvas,
    corner: Point,
    panel: Panel,
    entries: Sequence[Entry],
    colors: Sequence[Color],
    highest: float,
) -> None:
    left, top = corner
    width, height = _PANEL
    bottom = top + height
    canvas.text((left, top - 34), panel.heading, _HEADING)
    canvas.text((left, top - 14), panel.remark, _LABEL, _SOFT)
    for number in range(round(highest / _STEP) + 1):
        level = bottom - height * number * _STEP / highest
        canvas.line([(left, level), (left + width, level)], _GRID, 1)
        canvas.text((left - 8, level), f"{number * _STEP:.1f}", _TICK, _SOFT, "rm")
    for number in range(round(1 / _STEP) + 1):
        place = left + width * number * _STEP
        canvas.line([(place, bottom), (place, bottom + 5)], _SOFT, 1)
        canvas.text((place, bottom + 18), f"{100 * number * _STEP:.0f}", _TICK, _SOFT, "mm")
    canvas.line([(left, bottom), (left + width, bottom)], _SOFT, 1)
    canvas.text((left + width / 2, bottom + 42), panel.label, _LABEL, _SOFT, "mm")
    for (x, y), entry, color in zip(panel.curves, entries, colors, strict=True):
        points = [
            (left + width * float(across), bottom - height * float(up) / highest)
            for across, up in zip(x, y, strict=True)
        ]
        _draw_curve(canvas, points, entry, color)


def _draw_curve(canvas: _Canvas, points: Sequence[Point], entry: Entry, color: Color) -> None:
    if entry.muted:
        for dash in _dashes(points):
            canvas.line(dash, color, 2)
        return
    canvas.line(points, color, 2.5)
    for point in points:
        canvas.dot(point, color, 3.5)


def _dashes(points: Sequence[Point]) -> list[list[Point]]:
    """Cut a line into dashes of one length, around its corners."""
    dashes: list[list[Point]] = []
    done = 0.0
    for start, end in pairwise(points):
        length, walked = math.dist(start, end), 0.0
        while walked < length:
            into = (done + walked) % (_DASH + _SPACE)
            stretch = min((_DASH if into < _DASH else _DASH + _SPACE) - into, length - walked)
            if into < _DASH:
                ends = (walked / length, (walked + stretch) / length)
                dashes.append([_between(start, end, share) for share in ends])
            walked += max(stretch, 1e-6)
        done += length
    return dashes


def _between(start: Point, end: Point, share: float) -> Point:
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _draw_legend(
    canvas: _Canvas,
    corner: Point,
    columns: Sequence[str],
    entries: Sequence[Entry],
    colors: Sequence[Color],
) -> None:
    left, top = corner
    right = left + _LEGEND
    edges = [right - 72 * (len(columns) - 1 - position) for position in range(len(columns))]
    for edge, column in zip(edges, columns, strict=True):
        canvas.text((edge, top + 4), column, _TICK, _SOFT, "rm")
    for row, (entry, color) in enumerate(zip(entries, colors, strict=True), start=1):
        level = top + 4 + row * _ROW
        _draw_curve(canvas, [(left, level), (left + 22, level)], entry, color)
        canvas.text((left + 34, level), entry.name, _LABEL, _INK, "lm")
        for edge, number in zip(edges, entry.numbers, strict=True):
            canvas.text((edge, level), number, _LABEL, _INK, "rm")


def _colors(entries: Sequence[Entry]) -> list[Color]:
    """Give each entry a colour of its kind, in order; those that come again come paler."""
    places = {True: 0, False: 0}
    colors = []
    for entry in entries:
        palette = _MUTED if entry.muted else _BRIGHT
        turn, place = divmod(places[entry.muted], len(palette))
        red, green, blue = (255 - (255 - level) // 2**turn for level in palette[place])
        colors.append((red, green, blue))
        places[entry.muted] += 1
    return colors


def _highest(panel: Panel) -> float:
    return max((float(np.max(y)) for _, y in panel.curves if len(y)), default=0.0)


def _round_up(value: float) -> float:
    """Return the tick at or above a value."""
    return max(math.ceil(value / _STEP - 1e-9), 1) * _STEP
