"""Pictures for people: overlays, panels under a caption, contact sheets."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vitviz.options import Colormap
from vitviz.pictures.colors import color_heat, in_grey

__all__ = ["GAP", "contact_sheet", "overlay", "panel", "shrink_to_cell"]


Pixels = NDArray[np.uint8]
Heat = NDArray[np.float32]
GAP = 8  # pixels between the pictures of a panel
_SHEET_GAP = 2  # pixels between the pictures of a contact sheet
_HEADER = 22  # pixels for the numbers of its blocks and heads
_LEAST_CELL = 8  # pixels, however many there are
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


def panel(pictures: list[Pixels], caption: str) -> Pixels:
    """Set pictures of one size side by side under a caption."""
    height, width = pictures[0].shape[:2]
    size = max(12, min(width // 16, 28))
    font = ImageFont.load_default(size)
    band = size * 2
    sheet = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height + band), (255, 255, 255))
    ImageDraw.Draw(sheet).text((size // 2, band // 2), caption, (30, 30, 30), font, anchor="lm")
    for position, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (position * (width + GAP), band))
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
