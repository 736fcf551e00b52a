"""Relevance grid → heat on the geometry of its image; decides nothing about methods."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitviz.images.fitting import Region
from vitviz.pictures.interpolation import interpolate

__all__ = ["FLAT", "contrast", "normalize", "place_heat"]

Heat = NDArray[np.float32]

FLAT = 1e-5
"""A range of at most this share of the largest magnitude counts as constant."""


def normalize(
    relevance: NDArray[Any], *, signed: bool = False, extent: tuple[float, float] | None = None
) -> Heat:
    """Scale relevance to [0, 1] by its minimum and maximum; a constant map gives no heat.

    Args:
        relevance: (rows, cols).
        signed: Whether 0 has a meaning: it goes to ½, and the largest magnitude to 0 or 1.
        extent: What goes to 0 and to 1, in place of the minimum and the maximum.
    """
    values = np.asarray(relevance, dtype=np.float32)
    if extent is not None and extent[0] < extent[1]:
        return ((values - extent[0]) / (extent[1] - extent[0])).clip(0, 1)
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
    relevance: NDArray[Any],
    region: Region,
    size: tuple[int, int],
    *,
    signed: bool = False,
    extent: tuple[float, float] | None = None,
) -> Heat:
    """Interpolate a grid over the region of a picture that the model saw.

    Args:
        relevance: (rows, cols).
        region: Where the model looked.
        size: (height, width) of the picture.
        signed: As for ``normalize``.
        extent: As for ``normalize``.

    Returns:
        (height, width) in [0, 1]; NaN where the model saw nothing.
    """
    heat = np.full(size, np.nan, dtype=np.float32)
    seen = heat[region.pixels(size)]
    cells = normalize(relevance, signed=signed, extent=extent)
    # Rounding of the last digit must not leave the colours.
    np.clip(interpolate(cells, seen.shape), 0, 1, out=seen)
    return heat
