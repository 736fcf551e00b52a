"""Maps that know nothing of the image, which every method must beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

__all__ = ["BASELINES", "CENTRE_SIGMA"]


Floats = NDArray[np.floating]
Grid = tuple[int, int]

CENTRE_SIGMA = 0.25
"""Of the centre's Gaussian, as a share of each side of the grid."""


def _random(grid: Grid, generator: np.random.Generator) -> Floats:
    """Draw each cell's relevance by lot."""
    return generator.random(grid)


def _centre(grid: Grid, generator: np.random.Generator) -> Floats:
    """Return a Gaussian around the middle."""
    rows, cols = (
        np.exp(-((((np.arange(side) + 0.5) / side - 0.5) / CENTRE_SIGMA) ** 2) / 2) for side in grid
    )
    return np.outer(rows, cols)


BASELINES: Mapping[str, Callable[[Grid, np.random.Generator], Floats]] = MappingProxyType(
    {"random": _random, "centre": _centre}
)
"""Maps that know nothing of the image: of a grid (rows, cols) and a generator."""
