"""What Python users call for patch features: their colours, and where one of them is found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from vitviz.api import explain
from vitviz.explaining.coloring import colored, features_at, reference_at
from vitviz.explaining.explanation import Explanation
from vitviz.methods.features import Features, Similarity
from vitviz.models.model import Model
from vitviz.options import Fit, Foreground, PictureOptions, whole
from vitviz.python_values import Images, Values, images_in, option_value
from vitviz.python_words import in_python_words

__all__ = ["features", "similarity"]


@in_python_words
def features(
    model: Model,
    images: Images,
    *,
    block: int | None = None,
    foreground: Foreground | str = Foreground.AUTO,
    refine: int = 1,
    fit: Fit | str = Fit.SQUASH,
    value_range: Values = None,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
    errors: str = "raise",
) -> list[Explanation]:
    """Compute patch features; pictures of all images have their principal components as colours.

    Args:
        model: From ``load_model``; it is left as it was.
        images: As for ``rollout``.
        block: The block whose tokens are taken, counted from 0; None: the last one.
        foreground: ``auto``: draw only the side of the first component that keeps from the edges
            of images; ``off``: draw all.
        refine: As for ``rollout``.
        fit: As for ``rollout``.
        value_range: As for ``rollout``.
        batch_size: As for ``rollout``.
        pictures: As for ``rollout``.
        errors: As for ``rollout``.

    Returns:
        For each image, an explanation whose ``relevance`` is (channels, rows, cols): what leaves
        the block, behind the model's last normalisation.

    Raises:
        VitvizError: An option or an image is not usable.
    """
    method = Features(
        block=option_value("block", int | None, block),
        foreground=Foreground(foreground),
        refine=whole("refine", refine),
    )
    found = explain(
        *(model, images, method),
        pictures=pictures,
        fit=Fit(fit),
        value_range=value_range,
        batch_size=batch_size,
        errors=errors,
    )
    return colored(method, found)


@in_python_words
def similarity(
    model: Model,
    image: str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any],
    patch: Sequence[int],
    to: Images = (),
    *,
    block: int | None = None,
    refine: int = 1,
    fit: Fit | str = Fit.SQUASH,
    value_range: Values = None,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
    errors: str = "raise",
) -> list[Explanation]:
    """Compute the cosine of one patch's features with those of all patches.

    Args:
        model: From ``load_model``; it is left as it was.
        image: The image that the patch is of.
        patch: Its (row, col).
        to: Other images to look for it in.
        block: The block whose tokens are taken, counted from 0; None: the last one.
        refine: As for ``rollout``.
        fit: As for ``rollout``.
        value_range: As for ``rollout``.
        batch_size: As for ``rollout``.
        pictures: As for ``rollout``.
        errors: As for ``rollout``, but the image of the patch must not fail.

    Returns:
        One explanation for the image and for each other one, with cosines as ``relevance``.

    Raises:
        VitvizError: An option or an image is not usable.
    """
    method = Similarity(
        block=option_value("block", int | None, block),
        patch=option_value("patch", tuple[int, int], patch),
        refine=whole("refine", refine),
    )
    run = partial(explain, model, fit=Fit(fit), value_range=value_range)
    (of_image,) = run([image], features_at(method))
    return run(
        *([image, *images_in(to)], reference_at(method, of_image)),
        pictures=pictures,
        batch_size=batch_size,
        errors=errors,
    )
