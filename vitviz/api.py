"""What Python users call: the methods as functions of a model and images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from vitviz.explanation import Explanation
from vitviz.models import Model
from vitviz.options import Fit, HeadFusion, Method, MethodOptions, PictureOptions
from vitviz.pipeline import explain

__all__ = ["grad_rollout", "rollout"]

Images = Iterable[str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]]


def rollout(
    model: Model,
    images: Images,
    *,
    discard: float = 0.9,
    head_fusion: HeadFusion | str = HeadFusion.MAX,
    start_layer: int = 0,
    fit: Fit | str = Fit.SQUASH,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
) -> list[Explanation]:
    """Compute attention rollout, which knows no class (Abnar & Zuidema 2020, arXiv 2005.00928).

    Args:
        model: From ``load_model``; it is left as it was.
        images: Paths, Pillow images or arrays (height, width, 3) of uint8.
        discard: Share of the lowest fused attention set to 0, per image and block, in [0, 1).
        head_fusion: How heads become one map: ``mean``, ``max`` or ``min``.
        start_layer: Blocks before this one are left out.
        fit: ``squash``, ``crop`` or ``native``.
        batch_size: Images run at once; None: chosen by the number of tokens.
        pictures: How the maps draw themselves; None: as by default.

    Returns:
        One explanation an image.

    Raises:
        VitvizError: An option or an image is not usable.
    """
    options = MethodOptions(
        method=Method.ROLLOUT,
        discard=discard,
        start_layer=start_layer,
        head_fusion=HeadFusion(head_fusion),
    )
    return explain(model, images, options, fit=Fit(fit), batch_size=batch_size, pictures=pictures)


def grad_rollout(
    model: Model,
    images: Images,
    *,
    classes: int | str | Iterable[int | str] = ("top1",),
    discard: float = 0.9,
    start_layer: int = 0,
    fit: Fit | str = Fit.SQUASH,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
) -> list[Explanation]:
    """Compute rollout of attention weighted with the gradient of a class's logit.

    The method is J. Gildenblat's ("Exploring Explainability for Vision Transformers", 2020), with
    gradients with respect to the probabilities of the same block.

    Args:
        model: From ``load_model``; it is left as it was.
        images: As for ``rollout``.
        classes: An index, a label (``"tabby"``), ``"top1"`` or ``"topK"``, or several of these.
        discard: As for ``rollout``.
        start_layer: As for ``rollout``.
        fit: As for ``rollout``.
        batch_size: As for ``rollout``.
        pictures: As for ``rollout``.

    Returns:
        One explanation for each image and class, image by image.

    Raises:
        VitvizError: An option or an image is not usable.
    """
    wanted = (classes,) if isinstance(classes, (int, str)) else classes
    options = MethodOptions(
        method=Method.GRAD_ROLLOUT,
        discard=discard,
        start_layer=start_layer,
        classes=tuple(map(str, wanted)),
    )
    return explain(model, images, options, fit=Fit(fit), batch_size=batch_size, pictures=pictures)
