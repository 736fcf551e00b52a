"""Pictures for people: overlays and contact sheets."""

from __future__ import annotations

from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitviz.images.fitting import Region
from vitviz.options import Colormap
from vitviz.pictures.colors import color_heat, in_grey
from vitviz.pictures.lettering import FAINT, INK, write
from vitviz.pictures.tables import ColorBar

__all__ = ["contact_sheet", "mark", "overlay", "shrink_to_cell"]


Pixels = NDArray[np.uint8]
Heat = NDArray[np.float32]
_SHEET_GAP = 2  # pixels between the pictures of a contact sheet
_LETTERS = 11  # pixels, the size of its letters
_LINE, _MARGIN = 22, 36  # pixels for its title, the numbers of its heads, and those of its blocks
_FOOT = ColorBar.height(_LETTERS)
_LEAST_CELL = 8  # pixels, however many there are
_FRAME = ((255, 255, 255), (30, 30, 30))  # white outside, dark inside: seen on any ground
_UNSEEN = 0.4  # of the brightness is left to what the model did not see


def overlay(
    picture: Pixels, heat: Heat, colormap: Colormap, alpha: float, *, signed: bool = False
) -> Pixels:
    """Blend coloured heat over a picture in grey, the more of it the hotter it is.

    The weight of the colour is alpha·s·(2 − s), s being the heat h, or |2h − 1| of heat with a
    sign, so that the picture shows where there is none, and all colour is heat. What the model did
    not see is dimmed.

    Args:
        picture: (height, width, 3).
        heat: (height, width) in [0, 1]; NaN where the model saw nothing.
        colormap: Its colours.
        alpha: The weight of the hottest.
        signed: Whether ½ is no heat.
    """
    grey, unseen = in_grey(picture), np.isnan(heat)
    strength = np.abs(2 * heat - 1) if signed else heat
    weight = alpha * strength * (2 - strength)
    weight[unseen] = 1 - _UNSEEN
    colors = color_heat(heat, colormap)  # black where nothing was seen
    return np.asarray(cv2.blendLinear(colors, grey, weight, 1 - weight), dtype=np.uint8)


def mark(picture: Pixels, places: NDArray[np.bool_], region: Region) -> Pixels:
    """Draw a frame around places (rows, cols) of a region of a picture."""
    marked = picture.copy()
    seen = marked[region.pixels(picture.shape[:2])]
    edges = [
        np.linspace(0, side, count + 1).round().astype(int)
        for side, count in zip(seen.shape[:2], places.shape, strict=True)
    ]
    for row, col in np.argwhere(places):
        cell = seen[edges[0][row] : edges[0][row + 1], edges[1][col] : edges[1][col + 1]]
        for inset, ink in enumerate(_FRAME):
            inner = cell[inset : len(cell) - inset, inset : cell.shape[1] - inset]
            inner[[0, -1]] = ink
            inner[:, [0, -1]] = ink
    return marked


def shrink_to_cell(picture: Pixels, blocks: int, heads: int, longest: int) -> Pixels:
    """Shrink a picture so that a contact sheet of it has a longest side of so many pixels."""
    height, width = picture.shape[:2]
    scale = min(
        (longest - 2 * _LINE - _FOOT - blocks * _SHEET_GAP) / (blocks * height),
        (longest - _MARGIN - heads * _SHEET_GAP) / (heads * width),
        1.0,
    )
    size = (max(int(width * scale), _LEAST_CELL), max(int(height * scale), _LEAST_CELL))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def contact_sheet(cells: list[list[Pixels]], title: str, bar: ColorBar) -> Pixels:
    """Set pictures of one size in a table, blocks downwards and heads to the right, with numbers.

    Args:
        cells: One picture for each head of each block.
        title: Of the sheet.
        bar: What the colours of all mean.
    """
    height, width = (side + _SHEET_GAP for side in cells[0][0].shape[:2])
    across, down = _MARGIN + len(cells[0]) * width, 2 * _LINE + len(cells) * height
    sheet = Image.new("RGB", (across, down + _FOOT), (255, 255, 255))
    note = partial(write, ImageDraw.Draw(sheet), size=_LETTERS, anchor="mm", ink=FAINT)
    note((4, _LINE // 2), title, width=across - 8, anchor="lm", ink=INK)
    note((_MARGIN // 2, _LINE * 3 // 2), "block", width=_MARGIN)
    for head in range(len(cells[0])):
        place = (_MARGIN + head * width + width // 2, _LINE * 3 // 2)
        note(place, f"head {head}" if width > 50 else f"{head}", width=width)
    for block, pictures in enumerate(cells):
        top = 2 * _LINE + block * height
        note((_MARGIN // 2, top + height // 2), f"{block}", width=_MARGIN)
        for head, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (_MARGIN + head * width, top))
    sheet.paste(bar.draw(across - _MARGIN, _LETTERS), (_MARGIN, down))
    return np.asarray(sheet)
