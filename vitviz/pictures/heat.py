"""Relevance grid → heat on the geometry of its image; decides nothing about methods."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitviz.images.fitting import Region
from vitviz.options import Unit
from vitviz.pictures.interpolation import interpolate

__all__ = [
    "FLAT",
    "coarser",
    "contrast",
    "finer",
    "in_unit",
    "limits",
    "normalize",
    "place_heat",
    "share_on",
]

Heat = NDArray[np.float32]

FLAT = 1e-5
"""A range of at most this share of the largest magnitude counts as constant."""


def in_unit(relevance: NDArray[Any], unit: Unit) -> Heat:
    """Return relevance (rows, cols) in a unit; on average it is 1 in ``AVERAGE``."""
    values = np.asarray(relevance, dtype=np.float32)
    total = float(values.sum(dtype=np.float64))
    if unit is not Unit.AVERAGE or not total:
        return values
    return np.multiply(values, values.size / total, dtype=np.float32)


def finer(places: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which cells of a grid, as fine or finer, lie in places (rows, cols)."""
    rows, cols = (fine // coarse for fine, coarse in zip(grid, places.shape, strict=True))
    return places.repeat(rows, axis=0).repeat(cols, axis=1)


def coarser(cells: NDArray[np.bool_], grid: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which places of a grid, as coarse or coarser, have one of the cells (rows, cols)."""
    rows, cols = grid
    parts = cells.reshape(rows, cells.shape[0] // rows, cols, cells.shape[1] // cols)
    return np.asarray(parts.any(axis=(1, 3)))


def share_on(relevance: NDArray[Any], places: NDArray[np.bool_]) -> float:
    """Return the share of heat (…, rows, cols) that is on some places; 0 where there is none."""
    sizes = np.abs(relevance, dtype=np.float64)
    total = sizes.sum()
    return float(sizes[..., finer(places, sizes.shape[-2:])].sum() / total) if total else 0.0


def limits(
    values: NDArray[Any], *, signed: bool = False, extent: tuple[float, float] | None = None
) -> tuple[float, float] | None:
    """Return what is drawn coldest and hottest; None for a map that is constant.

    Args:
        values: (rows, cols).
        signed: Whether 0 has a meaning: it is drawn in the middle.
        extent: What is drawn coldest and hottest, in place of the minimum and the maximum.
    """
    low, high = float(values.min()), float(values.max())
    if extent is not None and extent[0] < extent[1]:
        low, high = extent
    elif contrast(values) <= FLAT:
        return None
    largest = max(abs(low), abs(high))
    return (-largest, largest) if signed else (low, high)


def normalize(
    relevance: NDArray[Any], *, signed: bool = False, extent: tuple[float, float] | None = None
) -> Heat:
    """Scale relevance (rows, cols) to [0, 1] by ``limits``; a constant map gives no heat."""
    values = np.asarray(relevance, dtype=np.float32)
    ends = limits(values, signed=signed, extent=extent)
    if ends is None:
        return np.full_like(values, 0.5 if signed else 0)
    return ((values - ends[0]) / (ends[1] - ends[0])).clip(0, 1)


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
        signed: As for ``limits``.
        extent: As for ``limits``.

    Returns:
        (height, width) in [0, 1]; NaN where the model saw nothing.
    """
    heat = np.full(size, np.nan, dtype=np.float32)
    seen = heat[region.pixels(size)]
    cells = normalize(relevance, signed=signed, extent=extent)
    # Rounding of the last digit must not leave the colours.
    np.clip(interpolate(cells, seen.shape), 0, 1, out=seen)
    return heat
