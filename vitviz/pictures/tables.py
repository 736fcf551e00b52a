"""Pictures in a table, with titles and colour bars; knows nothing of what they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitviz.options import Colormap
from vitviz.pictures.colors import color_heat
from vitviz.pictures.lettering import FAINT, INK, write

__all__ = ["GAP", "Cell", "ColorBar", "in_rows", "picture_table"]

Pixels = NDArray[np.uint8]

GAP = 8  # pixels between the pictures of a table
_PAPER = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class ColorBar:
    """What colours mean.

    Attributes:
        colormap: The colours.
        low: What the first one stands for, in words or as a number.
        high: What the last one stands for.
        unit: Of both.
    """

    colormap: Colormap
    low: str
    high: str
    unit: str

    @staticmethod
    def height(size: int) -> int:
        """Return how high it is with letters of this size, in pixels."""
        return GAP + max(size // 2, 4) + size * 3 // 2

    def draw(self, width: int, size: int) -> Image.Image:
        """Draw it with its words below, in letters of this size, in pixels."""
        heat = np.tile(np.linspace(0, 1, width, dtype=np.float32), (max(size // 2, 4), 1))
        bar = Image.fromarray(color_heat(heat, self.colormap))
        sheet = Image.new("RGB", (width, ColorBar.height(size)), _PAPER)
        sheet.paste(bar, (0, GAP))
        draw, line = ImageDraw.Draw(sheet), GAP + bar.height + size * 3 // 4
        side, edge = width // 4, GAP // 2
        write(draw, (edge, line), self.low, size=size, width=side, anchor="lm", ink=FAINT)
        write(draw, (width - edge, line), self.high, size=size, width=side, anchor="rm", ink=FAINT)
        middle = (width // 2, line)
        write(draw, middle, self.unit, size=size, width=width // 2, anchor="mm", ink=FAINT)
        return sheet


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """A picture of a table.

    Attributes:
        picture: (height, width, 3).
        title: Above it.
        bar: Below it.
    """

    picture: Pixels
    title: str = ""
    bar: ColorBar | None = None


def in_rows(cells: Sequence[Cell], across: int) -> list[list[Cell]]:
    """Set cells of one size in rows of so many, the last filled up with blank ones.

    Args:
        cells: At least one.
        across: How many stand side by side; all of them, if they are fewer.
    """
    across = min(across, len(cells))
    blank = Cell(picture=np.full_like(cells[0].picture, 255))
    filled = [*cells, *[blank] * (-len(cells) % across)]
    return [filled[start : start + across] for start in range(0, len(filled), across)]


def picture_table(
    rows: Sequence[Sequence[Cell]], *, title: str, subtitle: str = "", names: Sequence[str] = ()
) -> Pixels:
    """Set pictures of one size in a table.

    Args:
        rows: As many cells each.
        title: Of them all.
        subtitle: Below it, smaller.
        names: Of the rows, above each; none: they have no names.

    Returns:
        (height, width, 3).
    """
    height, width = rows[0][0].picture.shape[:2]
    size = max(12, min(width // 16, 28))
    small = max(11, size * 3 // 4)
    total = len(rows[0]) * (width + GAP) - GAP
    parts = [_line(title, size, total)]
    if subtitle:
        parts.append(_line(subtitle, small, total, ink=FAINT))
    for number, row in enumerate(rows):
        if names:
            parts.append(_line(names[number], size, total))
        parts.append(_row(row, (height, width), small))
    sheet = Image.new("RGB", (total, sum(part.height for part in parts)), _PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return np.asarray(sheet)


def _line(text: str, size: int, width: int, ink: tuple[int, int, int] = INK) -> Image.Image:
    line = Image.new("RGB", (width, size * 7 // 4), _PAPER)
    place = (GAP, line.height // 2)
    write(ImageDraw.Draw(line), place, text, size=size, width=width - 2 * GAP, ink=ink)
    return line


def _row(cells: Sequence[Cell], shape: tuple[int, int], size: int) -> Image.Image:
    height, width = shape
    band = size * 7 // 4 if any(cell.title for cell in cells) else 0
    foot = ColorBar.height(size) if any(cell.bar for cell in cells) else 0
    sheet = Image.new("RGB", (len(cells) * (width + GAP) - GAP, band + height + foot), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for position, cell in enumerate(cells):
        left = position * (width + GAP)
        middle = (left + width // 2, band // 2)
        write(draw, middle, cell.title, size=size, width=width, anchor="mm", ink=FAINT)
        sheet.paste(Image.fromarray(cell.picture), (left, band))
        if cell.bar:
            sheet.paste(cell.bar.draw(width, size), (left, band + height))
    return sheet
