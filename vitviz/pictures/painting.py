"""Colours of patches → a picture, or an overlay on one; knows nothing of where they are from."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from vitviz.images.fitting import Region

__all__ = ["paint"]

Pixels = NDArray[np.uint8]


def paint(colors: NDArray[np.float32], region: Region, picture: Pixels, alpha: float) -> Pixels:
    """Blend the colours of patches over a picture.

    Args:
        colors: (rows, cols, 4) in [0, 1]: red, green, blue, and how much of a patch is drawn, by
            which the others are multiplied.
        region: Where the model looked.
        picture: (height, width, 3).
        alpha: Weight of the colours; 1: the background and what the model did not see are black.
    """
    beneath = np.zeros_like(picture) if alpha == 1 else picture
    painted = beneath.copy()
    place = region.pixels(picture.shape[:2])
    seen = beneath[place].astype(np.float32)
    size = (seen.shape[1], seen.shape[0])
    # Linear: a cubic overshoots, into colours that no patch has.
    grown = cv2.resize(colors, size, interpolation=cv2.INTER_LINEAR)
    blended = seen * (1 - alpha * grown[..., 3:]) + alpha * 255 * grown[..., :3]
    painted[place] = np.rint(blended.clip(0, 255)).astype(np.uint8)
    return painted
