"""Numbers that say how good a map is, and how sure they are; plain arrays, no model, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Bootstrap",
    "Column",
    "Floats",
    "Interval",
    "Mask",
    "area_under",
    "average_precision",
    "best_miou",
    "bootstrap",
    "energy_inside",
    "pointing_game",
    "rank_correlation",
    "specificity",
]


Floats = NDArray[np.floating]
Mask = NDArray[np.bool_]
Column = int | tuple[int, ...]

_LEVEL = 0.95


def area_under(curve: ArrayLike, shares: ArrayLike) -> Floats:
    """Return the area under curves by the trapezoidal rule, Σ (x₍ᵢ₊₁₎ − xᵢ)(yᵢ + y₍ᵢ₊₁₎)/2.

    Args:
        curve: (..., points), y.
        shares: (points), x, ascending.
    """
    heights, widths = np.asarray(curve, dtype=float), np.diff(np.asarray(shares, dtype=float))
    return np.asarray(((heights[..., 1:] + heights[..., :-1]) / 2) @ widths)


def pointing_game(relevance: Floats, mask: Mask) -> float:
    """Tell whether the hottest pixel lies on the object: 1 or 0.

    Without the tolerance of 15 pixels of Zhang et al. 2016 (arXiv 1608.00507). Of several hottest
    pixels, the share that lies on it: what one of them drawn by lot scores on average.

    Args:
        relevance: (height, width).
        mask: (height, width), true on the object.
    """
    return float(mask[relevance == relevance.max()].mean())


def energy_inside(relevance: Floats, mask: Mask, within: Mask | None = None) -> float:
    """Return the share of the positive relevance that lies on the object, Σ_mask r⁺ / Σ r⁺.

    The energy-based pointing game of Wang et al. 2020 (Score-CAM, arXiv 1910.01279). A map that is
    positive nowhere says nothing, and scores as one that is the same everywhere: the object's
    share of the area.

    Args:
        relevance: (height, width); negative values count as none.
        mask: (height, width), true on the object.
        within: (height, width), the pixels that count; all if left out.
    """
    counted = np.ones_like(mask) if within is None else within
    positive = np.clip(relevance, 0, None, dtype=float) * counted
    if not positive.any():
        positive = counted.astype(float)
    return float(positive[mask].sum() / positive.sum())


def specificity(relevance: Floats, asked: Mask, objects: Mask) -> float:
    """Return the share of the positive relevance on the objects that falls on the one asked for.

    Args:
        relevance: (height, width); negative values count as none.
        asked: (height, width), true on the object that the map was asked for, which is one of
            the objects.
        objects: (height, width), true on all objects.
    """
    return energy_inside(relevance, asked, within=objects)


def rank_correlation(one: Floats, other: Floats) -> float:
    """Return Spearman's rank correlation of two maps, in [-1, 1]; NaN if one is constant.

    The correlation of the cells' ranks, equal cells having the mean of theirs (Spearman 1904).

    Args:
        one: (rows, cols).
        other: The same.
    """
    ranks = np.stack([_ranks(one), _ranks(other)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred**2).sum(axis=1))
    return float(centred[0] @ centred[1] / norms.prod()) if norms.all() else np.nan


def _ranks(values: Floats) -> Floats:
    """Rank values from 1 up; equal ones get the mean of the ranks that they take together."""
    _, place, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place.ravel()])


def average_precision(relevance: Floats, mask: Mask) -> float:
    """Return the average precision of the pixels, Σ (Rₙ − Rₙ₋₁) Pₙ over the map's values.

    Recall R and precision P of the pixels at or above each value that the map has; pixels of one
    value come together, so that their order is of no account (as in scikit-learn, not
    interpolated).

    Args:
        relevance: (height, width).
        mask: (height, width), true on the object, somewhere.
    """
    picked, right = _cuts(relevance, mask)
    steps = np.diff(right, prepend=0) / right[-1]
    return float((steps * right / picked).sum())


def best_miou(relevance: Floats, mask: Mask) -> float:
    """Return the best mean of the object's and the background's IoU over all thresholds.

    The object is predicted where the map is at or above the threshold, which runs over all values
    of the map and one above them; it is chosen for each image, so this is what the map could give
    if one knew. An IoU of nothing with nothing is 1.

    Args:
        relevance: (height, width).
        mask: (height, width), true on the object.
    """
    picked, right = (np.concatenate([[0], counts]) for counts in _cuts(relevance, mask))
    union = picked + right[-1] - right
    background, everything = mask.size - union, mask.size - right
    return float((_ratio(right, union) + _ratio(background, everything)).max() / 2)


def _cuts(relevance: Floats, mask: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count at each value of a map, from the highest, the pixels picked, and those on the object.

    Returns:
        Two (values): pixels at or above the value, and those of them on the object.
    """
    values = relevance.ravel()
    order = np.argsort(values)[::-1]
    ranked = values[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    return last + 1, np.cumsum(mask.ravel()[order], dtype=np.int64)[last]


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> Floats:
    """Divide counts; nothing of nothing is 1."""
    return np.divide(part, whole, out=np.ones(len(whole)), where=whole > 0)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and where it may lie.

    Attributes:
        mean: Of the sample.
        low: Lower end of the 95 % interval; NaN where a single image has a value.
        high: Its upper end.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Bootstrap:
    """Means of columns, and what they were in samples drawn again.

    Attributes:
        means: (columns...).
        replicates: (columns..., resamples), NaN where a resample has no value.
    """

    means: Floats
    replicates: Floats

    def interval(self, column: Column) -> Interval:
        """Return a column's mean and percentile interval."""
        return self._interval(self.means[column], self.replicates[column])

    def difference(self, column: Column, reference: Column) -> Interval:
        """Return a column's mean less another's, both of the same resamples."""
        mean = self.means[column] - self.means[reference]
        return self._interval(mean, self.replicates[column] - self.replicates[reference])

    def _interval(self, mean: np.floating, replicates: Floats) -> Interval:
        known = replicates[np.isfinite(replicates)]
        tail = (1 - _LEVEL) / 2
        low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
        return Interval(mean=float(mean), low=float(low), high=float(high))


def bootstrap(
    values: ArrayLike, images: Sequence[int], *, resamples: int = 2000, seed: int = 0
) -> Bootstrap:
    """Estimate means and how sure they are, by drawing the images again with replacement.

    The percentile bootstrap (Efron & Tibshirani 1993, chapter 13). Each resample serves all
    columns, so that columns are compared on the same images; the values of one image, which
    depend on each other, come and go together. Of few images (less than 30, say), intervals are
    somewhat too narrow.

    Args:
        values: (cases, columns...); NaN where a case has no value.
        images: (cases), the image of each case.
        resamples: Samples drawn.
        seed: Of the drawing.
    """
    table = np.asarray(values, dtype=float)
    _, image = np.unique(np.asarray(images, dtype=int), return_inverse=True)
    count = int(image.max(initial=-1)) + 1
    known = np.isfinite(table)
    sums, counts = np.zeros((2, count, *table.shape[1:]))
    np.add.at(sums, image, np.where(known, table, 0))
    np.add.at(counts, image, known)
    generator = np.random.default_rng(seed)
    draws = [
        np.bincount(generator.integers(count, size=count), minlength=count)
        for _ in range(resamples if count else 0)
    ]
    replicates = np.empty((*table.shape[1:], len(draws)))
    for number, draw in enumerate(draws):
        replicates[..., number] = _weighted(draw, sums, counts)
    replicates[(counts > 0).sum(axis=0) < 2] = np.nan  # of a single image nothing can be said
    return Bootstrap(means=_weighted(np.ones(count), sums, counts), replicates=replicates)


def _weighted(weights: NDArray[np.number], sums: Floats, counts: Floats) -> Floats:
    """Return means over weighted images, NaN where there is no value."""
    total, number = np.tensordot(weights, sums, 1), np.tensordot(weights, counts, 1)
    means = np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)
    return np.asarray(means)
