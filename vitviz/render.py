"""Relevance grid → picture, on the geometry of its image; decides nothing about methods."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vitviz.images import Region
from vitviz.options import Colormap

__all__ = [
    "FLAT",
    "color_heat",
    "contact_sheet",
    "contrast",
    "in_grey",
    "normalize",
    "overlay",
    "panel",
    "place_heat",
    "shrink_to_cell",
]

Pixels = NDArray[np.uint8]
Heat = NDArray[np.float32]

FLAT = 1e-5
"""A range of at most this share of the largest magnitude counts as constant."""

_REDBLUE = (  # C. Brewer's RdBu from its end, without the dark ones, colorbrewer2.org
    *((33, 102, 172), (67, 147, 195), (146, 197, 222), (209, 229, 240), (247, 247, 247)),
    *((253, 219, 199), (244, 165, 130), (214, 96, 77), (178, 24, 43)),
)
_LEVELS = 255 * 16 + 1  # of heat: the middle is one, OpenCV's 256 are among them
_GAP = 8  # pixels between the pictures of a panel
_SHEET_GAP = 2  # pixels between the pictures of a contact sheet
_HEADER = 22  # pixels for the numbers of its blocks and heads
_LEAST_CELL = 8  # pixels, however many there are


def normalize(relevance: NDArray[Any], *, signed: bool = False) -> Heat:
    """Scale relevance to [0, 1] by its minimum and maximum; a constant map gives no heat.

    Args:
        relevance: (rows, cols).
        signed: Whether 0 has a meaning: it goes to ½, and the largest magnitude to 0 or 1.
    """
    values = np.asarray(relevance, dtype=np.float32)
    if contrast(values) <= FLAT:
        return np.full_like(values, 0.5 if signed else 0)
    low, high = float(values.min()), float(values.max())
    if signed:
        high = max(-low, high)
        low = -high
    return np.asarray((values - low) / (high - low), dtype=np.float32)


def contrast(relevance: NDArray[Any]) -> float:
    """Return the range of a map as a share of its largest magnitude; 0 for a map of zeros."""
    low, high = float(relevance.min()), float(relevance.max())
    largest = max(abs(low), abs(high))
    return (high - low) / largest if largest else 0.0


def place_heat(
    relevance: NDArray[Any], region: Region, size: tuple[int, int], *, signed: bool = False
) -> Heat:
    """Interpolate a grid over the region of a picture that the model saw.

    Args:
        relevance: (rows, cols).
        region: Where the model looked.
        size: (height, width) of the picture.
        signed: As for ``normalize``.

    Returns:
        (height, width) in [0, 1]; NaN where the model saw nothing.
    """
    heat = np.full(size, np.nan, dtype=np.float32)
    seen = heat[region.pixels(size)]
    heat_of_cells = normalize(relevance, signed=signed)
    # A cubic is rounder, but overshoots: beside what speaks for a class, into what speaks against.
    interpolation = cv2.INTER_LINEAR if signed else cv2.INTER_CUBIC
    grown = cv2.resize(heat_of_cells, (seen.shape[1], seen.shape[0]), interpolation=interpolation)
    np.clip(grown, 0, 1, out=seen)
    return heat


def color_heat(heat: Heat, colormap: Colormap) -> Pixels:
    """Colour heat (height, width) as RGB; what the model did not see is black."""
    seen = np.isfinite(heat)
    levels = np.rint(np.where(seen, heat, 0) * (_LEVELS - 1)).astype(np.uint16)
    colors = np.take(_color_table(colormap), levels, axis=0)
    colors[~seen] = 0
    return np.asarray(colors, dtype=np.uint8)


def overlay(picture: Pixels, heat: Heat, colormap: Colormap, alpha: float) -> Pixels:
    """Blend coloured heat over a picture; what the model did not see stays as it is."""
    blended = cv2.addWeighted(picture, 1 - alpha, color_heat(heat, colormap), alpha, 0)
    unseen = np.isnan(heat)
    blended[unseen] = picture[unseen]
    return np.asarray(blended, dtype=np.uint8)


def in_grey(picture: Pixels) -> Pixels:
    """Take the colours out of a picture (height, width, 3)."""
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(grey, dtype=np.uint8)


def panel(pictures: list[Pixels], caption: str) -> Pixels:
    """Set pictures of one size side by side under a caption."""
    height, width = pictures[0].shape[:2]
    size = max(12, min(width // 16, 28))
    font = ImageFont.load_default(size)
    band = size * 2
    sheet = Image.new(
        "RGB", (len(pictures) * (width + _GAP) - _GAP, height + band), (255, 255, 255)
    )
    ImageDraw.Draw(sheet).text((size // 2, band // 2), caption, (30, 30, 30), font, anchor="lm")
    for position, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (position * (width + _GAP), band))
    return np.asarray(sheet)


def shrink_to_cell(picture: Pixels, blocks: int, heads: int, longest: int) -> Pixels:
    """Shrink a picture so that a contact sheet of it has a longest side of so many pixels."""
    height, width = picture.shape[:2]
    room = longest - _HEADER
    scale = min(
        (room - blocks * _SHEET_GAP) / (blocks * height),
        (room - heads * _SHEET_GAP) / (heads * width),
        1.0,
    )
    size = (max(int(width * scale), _LEAST_CELL), max(int(height * scale), _LEAST_CELL))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def contact_sheet(cells: list[list[Pixels]]) -> Pixels:
    """Set pictures of one size in a table, blocks downwards and heads to the right, with numbers.

    Args:
        cells: One picture for each head of each block.
    """
    height, width = (side + _SHEET_GAP for side in cells[0][0].shape[:2])
    size = (_HEADER + len(cells[0]) * width, _HEADER + len(cells) * height)
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for head in range(len(cells[0])):
        place = (_HEADER + head * width + width // 2, _HEADER // 2)
        draw.text(place, f"head {head}" if width > 50 else f"{head}", (90, 90, 90), font, "mm")
    for block, pictures in enumerate(cells):
        top = _HEADER + block * height
        draw.text((_HEADER // 2, top + height // 2), f"{block}", (90, 90, 90), font, "mm")
        for head, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (_HEADER + head * width, top))
    return np.asarray(sheet)


@lru_cache
def _color_table(colormap: Colormap) -> Pixels:
    """Return the RGB colours (levels, 3) of a colormap, from the first to the last.

    OpenCV has 256 of them. Between these, colours are interpolated, so that no rounding of
    relevance shows as a step of colour.
    """
    if colormap is Colormap.REDBLUE:
        anchors = np.array(_REDBLUE, dtype=np.uint8)
    else:
        ramp = np.arange(256, dtype=np.uint8).reshape(256, 1)
        table = cv2.applyColorMap(ramp, getattr(cv2, f"COLORMAP_{colormap.value.upper()}"))
        anchors = cv2.cvtColor(table, cv2.COLOR_BGR2RGB)[:, 0]
    places = np.linspace(0, len(anchors) - 1, _LEVELS)
    channels = [np.interp(places, np.arange(len(anchors)), values) for values in anchors.T]
    return np.asarray(np.rint(np.stack(channels, axis=-1)), dtype=np.uint8)
