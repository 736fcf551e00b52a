"""A grid of cells → pixels, without colours that are not in the grid; knows no images."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["interpolate"]

Heat = NDArray[np.float32]


def interpolate(cells: Heat, size: tuple[int, int]) -> Heat:
    """Interpolate a grid by monotone cubics, along the rows first, then down the columns.

    On a line of cells v₀ … vₙ₋₁, pixel p of s lies at x = (p + ½)·n/s − ½; beyond both ends the
    line goes on as v₀ and vₙ₋₁. With dᵢ = vᵢ₊₁ − vᵢ, the slope at a cell is the harmonic mean of
    those on its two sides, mᵢ = 2·dᵢ₋₁·dᵢ / (dᵢ₋₁ + dᵢ) where dᵢ₋₁·dᵢ > 0, else 0. With i = ⌊x⌋
    and t = x − i,

        v(x) = vᵢ + t·(mᵢ + t·(3dᵢ − 2mᵢ − mᵢ₊₁ + t·(mᵢ + mᵢ₊₁ − 2dᵢ)))

    which never leaves [vᵢ, vᵢ₊₁]: a cubic convolution would draw dark rings around hot spots, and
    linear interpolation draws them as crosses. A side of fewer pixels than cells is averaged to
    as many cells first.

    Source: Fritsch & Butland 1984, "A Method for Constructing Local Monotone Piecewise Cubic
    Interpolants", SIAM J. Sci. Stat. Comput. 5(2).

    Args:
        cells: (rows, cols).
        size: (height, width), from 1 up.

    Returns:
        (height, width).
    """
    rows, cols = (min(pair) for pair in zip(cells.shape, size, strict=True))
    if (rows, cols) != cells.shape:
        cells = np.asarray(cv2.resize(cells, (cols, rows), interpolation=cv2.INTER_AREA))
    return _down_columns(_down_columns(cells.T, size[1]).T.copy(), size[0])


def _down_columns(cells: Heat, height: int) -> Heat:
    """Interpolate (rows, cols) to (height, cols)."""
    values = np.pad(cells, ((1, 1), (0, 0)), mode="edge")
    steps = np.diff(values, axis=0)
    slopes = np.zeros_like(values)
    product, sums = steps[:-1] * steps[1:], steps[:-1] + steps[1:]
    np.divide(2 * product, sums, out=slopes[1:-1], where=product > 0)
    square = 3 * steps - 2 * slopes[:-1] - slopes[1:]
    cube = slopes[:-1] + slopes[1:] - 2 * steps
    places = (np.arange(height) + 0.5) * len(cells) / height + 0.5  # the first row is padding
    firsts = np.searchsorted(places, np.arange(len(values)))
    grown = np.empty((height, cells.shape[1]), dtype=np.float32)
    for row, (first, end) in enumerate(pairwise(firsts)):  # a part at a time stays in the cache
        t = (places[first:end, None] - row).astype(np.float32)
        part = np.multiply(t, cube[row], out=grown[first:end])
        for coefficient in (square[row], slopes[row]):
            part += coefficient
            part *= t
        part += values[row]
    return grown
