"""Heat → colours."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from vitviz.options import Colormap

__all__ = ["color_heat", "in_grey"]


Pixels = NDArray[np.uint8]
Heat = NDArray[np.float32]

_REDBLUE = (  # deep at once on both sides of the middle, so that weak evidence is seen
    *((5, 70, 190), (20, 95, 215), (60, 130, 235), (150, 190, 252), (247, 247, 247)),
    *((255, 178, 152), (245, 95, 70), (225, 40, 40), (190, 0, 20)),
)
_REDBLUE_AT = (0, 6, 10, 14, 16, 18, 22, 26, 32)  # of 32
_LEVELS = 255 * 16 + 1  # of heat: the middle is one, OpenCV's 256 are among them


def color_heat(heat: Heat, colormap: Colormap) -> Pixels:
    """Colour heat (height, width) as RGB; what the model did not see is black."""
    seen = np.isfinite(heat)
    levels = np.rint(np.where(seen, heat, 0) * (_LEVELS - 1)).astype(np.uint16)
    colors = np.take(_color_table(colormap), levels, axis=0)
    colors[~seen] = 0
    return np.asarray(colors, dtype=np.uint8)


def in_grey(picture: Pixels) -> Pixels:
    """Take the colours out of a picture (height, width, 3)."""
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(grey, dtype=np.uint8)


@lru_cache
def _color_table(colormap: Colormap) -> Pixels:
    """Return the RGB colours (levels, 3) of a colormap, from the first to the last.

    OpenCV has 256 of them. Between these, colours are interpolated, so that no rounding of
    relevance shows as a step of colour.
    """
    if colormap is Colormap.REDBLUE:
        anchors, at = np.array(_REDBLUE, dtype=np.uint8), np.array(_REDBLUE_AT) / 32
    else:
        ramp = np.arange(256, dtype=np.uint8).reshape(256, 1)
        table = cv2.applyColorMap(ramp, getattr(cv2, f"COLORMAP_{colormap.value.upper()}"))
        anchors, at = cv2.cvtColor(table, cv2.COLOR_BGR2RGB)[:, 0], np.arange(256) / 255
    heat = np.linspace(0, 1, _LEVELS)
    channels = [np.interp(heat, at, values) for values in anchors.T]
    return np.asarray(np.rint(np.stack(channels, axis=-1)), dtype=np.uint8)
