"""Words on pictures: fonts, and text that fits its room; knows nothing of what it says."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from PIL import ImageDraw, ImageFont

__all__ = ["FAINT", "INK", "font_of", "write"]

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, FAINT = (30, 30, 30), (90, 90, 90)
_CUT = "…"


@lru_cache
def font_of(size: int) -> Font:
    """Return Pillow's own font; what it has no letter for is drawn as a box."""
    return ImageFont.load_default(size)


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    *,
    size: int,
    width: int,
    anchor: str = "lm",
    ink: tuple[int, int, int] = INK,
) -> None:
    """Write one line, cut off where its room ends.

    Args:
        draw: What to write on.
        place: (x, y), in pixels.
        text: The line.
        size: Of the letters, in pixels.
        width: Of the room.
        anchor: Which point of the text lies there, as Pillow names them.
        ink: RGB.
    """
    font, text = font_of(size), _without_accents(text)
    if draw.textlength(text, font) > width:
        kept = len(text)
        while kept and draw.textlength(text[:kept] + _CUT, font) > width:
            kept -= 1
        text = text[:kept] + _CUT if kept else ""
    draw.text(place, text, ink, font, anchor=anchor)


def _without_accents(text: str) -> str:
    """Take off what the font has no letters for."""
    apart = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in apart if not unicodedata.combining(letter))
