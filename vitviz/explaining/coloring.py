"""One colour space for the features of many images; reads no files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from vitviz.errors import OptionError
from vitviz.explaining.explanation import Explanation
from vitviz.explaining.grids import Explanations
from vitviz.explaining.samples import Explained
from vitviz.methods.features import Features, Reference, Similarity
from vitviz.options import Foreground
from vitviz.pictures.components import ColorSpace, Patches, patches_of, spread

__all__ = ["colored", "features_at", "fit_colors", "patches_in", "reference_at"]


def fit_colors(method: Features, patches: Iterable[Patches]) -> ColorSpace:
    """Find the colours of features."""
    return ColorSpace.fit(patches, foreground=method.foreground is Foreground.AUTO)


def patches_in(explained: Iterable[object], images: int) -> list[Patches]:
    """Take from each image that is explained, others left out, what colours are fitted on."""
    return [
        patches_of(each.maps[0].relevance, images)
        for each in explained
        if isinstance(each, Explained)
    ]


def colored(method: Features, explanations: Sequence[Explanation]) -> Explanations:
    """Give features that are all there the colours that they share."""
    chosen = spread(len(explanations))
    if not chosen:
        return Explanations()
    patches = [patches_of(explanations[each].relevance, len(chosen)) for each in chosen]
    colors = fit_colors(method, patches)
    return Explanations(replace(each, colors=colors) for each in explanations)


def features_at(method: Similarity) -> Features:
    """Return the method that gives the features that a similarity compares."""
    return Features(block=method.block)


def reference_at(method: Similarity, features: Explanation) -> Similarity:
    """Let a similarity be with its patch of one image.

    Args:
        method: The similarity.
        features: Of the image, by ``features_at``.

    Raises:
        OptionError: The image has no such patch, or its features are 0.
    """
    grid = features.relevance.shape[1:]
    row, col = method.require_patch((grid[0], grid[1]))
    patches = features.relevance.reshape(len(features.relevance), -1).astype(np.float64)
    vector = patches[:, row * grid[1] + col]
    if not vector.any():
        raise OptionError(f"--patch {row},{col} has features that are all 0: no angle to them")
    lengths = np.linalg.norm(patches, axis=0) * np.linalg.norm(vector)
    cosines = vector @ patches / np.where(lengths == 0, 1, lengths)
    reference = Reference(
        digest=features.sample.digest,
        vector=vector.astype(np.float32),
        least=float(cosines.min()),
    )
    return replace(method, reference=reference)
