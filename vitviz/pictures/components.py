"""Principal components of patch features as colours, the same for all images of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["COLORS", "ColorSpace", "Patches", "patches_of", "principal_components", "spread"]

Floats = NDArray[np.float64]
Features = NDArray[np.float32]

COLORS = 3
_IMAGES = 64  # of a run that colours are fitted on
_PATCHES = 1 << 14  # of them all, some 100 MB of a large model
_RANGE = (1.0, 99.0)  # percentiles that become 0 and 1: few patches must not take all colours
_LEAST = 0.02  # share of the patches on either side, or there is nothing to split


@dataclass(frozen=True, kw_only=True, eq=False)
class Patches:
    """Patches that colours are fitted on.

    Attributes:
        features: (patches, channels).
        at_edge: (patches), whether each lies at the edge of its image.
    """

    features: Features
    at_edge: NDArray[np.bool_]


def spread(count: int) -> list[int]:
    """Return the positions of those of so many images that colours are fitted on."""
    places = np.linspace(0, count - 1, min(count, _IMAGES)).round()
    return [int(place) for place in places]


def patches_of(features: Features, images: int) -> Patches:
    """Take patches of an image, evenly spread.

    Args:
        features: (channels, rows, cols).
        images: How many images share the patches that are kept.
    """
    channels, rows, cols = features.shape
    at_edge = np.ones((rows, cols), dtype=np.bool_)
    at_edge[1:-1, 1:-1] = False
    kept = min(rows * cols, max(_PATCHES // images, 1))
    chosen = np.linspace(0, rows * cols - 1, kept).round().astype(int)
    flat = features.reshape(channels, -1).T
    return Patches(features=flat[chosen], at_edge=at_edge.reshape(-1)[chosen])


def principal_components(patches: Features, count: int) -> tuple[Floats, Floats]:
    """Compute the mean and the first principal components of patches.

    The entry of largest magnitude of each component is positive, since no sign is better.

    Args:
        patches: (patches, channels).
        count: How many components; those beyond the number of channels are 0.

    Returns:
        The mean (channels) and the components (count, channels), of length 1.
    """
    mean = patches.mean(axis=0, dtype=np.float64)
    centred = patches - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    found = vectors.T[::-1][:count]
    largest = np.take_along_axis(found, np.abs(found).argmax(axis=1)[:, None], axis=1)
    components = np.zeros((count, patches.shape[1]))
    components[: len(found)] = found * np.where(largest < 0, -1.0, 1.0)
    return mean, components


@dataclass(frozen=True, kw_only=True, eq=False)
class ColorSpace:
    """How features become colours.

    Attributes:
        mean: (channels), of the patches that are drawn.
        components: (3, channels), for red, green and blue.
        low: (3), what becomes 0.
        high: (3), what becomes 1.
        split: (channels) and a bound: the foreground is where their product is above it; None:
            all is drawn.
    """

    mean: Floats
    components: Floats
    low: Floats
    high: Floats
    split: tuple[Floats, float] | None = None

    @classmethod
    def fit(cls, patches: Iterable[Patches], *, foreground: bool) -> ColorSpace:
        """Find the colours of patches.

        Args:
            patches: Of each image.
            foreground: Whether to split them by their first component.
        """
        given = list(patches)
        drawn = np.concatenate([each.features for each in given])
        split = None
        if foreground:
            split = _split(drawn, np.concatenate([each.at_edge for each in given]))
        if split is not None:
            drawn = drawn[drawn @ split[0] > split[1]]
        mean, components = principal_components(drawn, COLORS)
        low, high = np.percentile((drawn - mean) @ components.T, _RANGE, axis=0)
        return cls(mean=mean, components=components, low=low, high=high, split=split)

    def colors(self, features: Features) -> NDArray[np.float32]:
        """Return the colours of features (channels, rows, cols).

        Returns:
            (rows, cols, 4) in [0, 1]: red, green, blue, and 1 for what is foreground, whose
            background is 0 in all.
        """
        pixels = np.moveaxis(features, 0, -1)
        values = (pixels - self.mean) @ self.components.T
        extent = self.high - self.low
        flat = extent <= 1e-12
        scaled = np.where(flat, 0.5, (values - self.low) / np.where(flat, 1, extent))
        shown = np.ones(pixels.shape[:2], dtype=np.bool_)
        if self.split is not None:
            shown = pixels @ self.split[0] > self.split[1]
        colors = np.dstack([scaled.clip(0, 1), np.ones_like(shown)])
        return np.asarray(colors * shown[..., None], dtype=np.float32)


def _split(patches: Features, at_edge: NDArray[np.bool_]) -> tuple[Floats, float] | None:
    """Find a direction and a bound that part the foreground from the background.

    The bound on the first component is Otsu's. The foreground is the side that keeps from the
    edges of images; None where nearly all patches are on one side.
    """
    _, (direction,) = principal_components(patches, 1)
    values = patches @ direction
    low, high = np.percentile(values, _RANGE)
    if high <= low:
        return None
    levels = np.rint((values.clip(low, high) - low) / (high - low) * 255).astype(np.uint8)
    level, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    bound = low + (level + 0.5) / 255 * (high - low)
    above = values > bound
    if not _LEAST < above.mean() < 1 - _LEAST:
        return None
    inside = ~at_edge
    if at_edge.any() and inside.any() and above[at_edge].mean() > above[inside].mean():
        return -direction, -bound
    return direction, bound
