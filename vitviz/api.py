"""What Python users call: the methods as functions of a model and images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitviz.errors import OptionError
from vitviz.evaluation.measuring import examine
from vitviz.evaluation.summary import Evaluation, summarize
from vitviz.evaluation.tasks import AnnotatedImage, annotated_images
from vitviz.explaining.explanation import Explanation
from vitviz.images.sources import Source
from vitviz.models.model import Model
from vitviz.options import (
    AttentionRule,
    Convention,
    EvaluationOptions,
    Fit,
    HeadFusion,
    Method,
    MethodOptions,
    PictureOptions,
)
from vitviz.runs.pipeline import explain, require_inputs

__all__ = [
    "Classes",
    "Images",
    "attention",
    "evaluate",
    "evidence",
    "grad_rollout",
    "relevance",
    "rollout",
]


Images = Iterable[str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]]
Classes = int | str | Iterable[int | str]


def rollout(
    model: Model,
    images: Images,
    *,
    discard: float = 0.9,
    head_fusion: HeadFusion | str = HeadFusion.MAX,
    start_layer: int = 0,
    refine: int = 1,
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
        refine: How many times finer than patches maps are, from refine² shifts of each image.
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
        refine=refine,
        head_fusion=HeadFusion(head_fusion),
    )
    return explain(model, images, options, fit=Fit(fit), batch_size=batch_size, pictures=pictures)


def grad_rollout(
    model: Model,
    images: Images,
    *,
    classes: Classes = ("top1",),
    discard: float = 0.9,
    start_layer: int = 0,
    refine: int = 1,
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
        refine: As for ``rollout``.
        fit: As for ``rollout``.
        batch_size: As for ``rollout``.
        pictures: As for ``rollout``.

    Returns:
        One explanation for each image and class, image by image.

    Raises:
        VitvizError: An option or an image is not usable.
    """
    options = MethodOptions(
        method=Method.GRAD_ROLLOUT,
        discard=discard,
        start_layer=start_layer,
        refine=refine,
        classes=_words(classes),
    )
    return explain(model, images, options, fit=Fit(fit), batch_size=batch_size, pictures=pictures)


def relevance(
    model: Model,
    images: Images,
    *,
    classes: Classes = ("top1",),
    classic: bool = False,
    start_layer: int | None = None,
    refine: int = 1,
    fit: Fit | str = Fit.SQUASH,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
) -> list[Explanation]:
    """Compute gradient relevance with a linearised backward pass and weighed values.

    Each block adds mean over heads of relu(A ⊙ ∂y/∂A), its columns multiplied by what the value
    of a token can move: see ``propagation.gradient_relevance`` and ``linearization``.

    Args:
        model: From ``load_model``; it is left as it was.
        images: As for ``rollout``.
        classes: As for ``grad_rollout``.
        classic: Exactly Chefer, Gur & Wolf 2021 (arXiv 2103.15679) instead: true gradients, all
            blocks, no weighing, read out as the model's head does.
        start_layer: Blocks before this one are left out; None: if not classic, the average of what
            each block gives as the first, as shares of its sum.
        refine: As for ``rollout``.
        fit: As for ``rollout``.
        batch_size: As for ``rollout``.
        pictures: As for ``rollout``.

    Returns:
        One explanation for each image and class, image by image.

    Raises:
        VitvizError: An option or an image is not usable.
    """
    options = MethodOptions(
        method=Method.RELEVANCE,
        classes=_words(classes),
        classic=classic,
        start_layer=start_layer,
        refine=refine,
    )
    return explain(model, images, options, fit=Fit(fit), batch_size=batch_size, pictures=pictures)


def evidence(
    model: Model,
    images: Images,
    *,
    classes: Classes = ("top1",),
    rule: AttentionRule | str = AttentionRule.VALUE,
    refine: int = 1,
    fit: Fit | str = Fit.SQUASH,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
) -> list[Explanation]:
    """Compute signed evidence for a class: x ⊙ ∂y/∂x at all blocks, with a linearised backward.

    Args:
        model: From ``load_model``; it is left as it was.
        images: As for ``rollout``.
        classes: As for ``grad_rollout``.
        rule: How evidence passes attention: ``value`` or ``shared``; see ``linearization``.
        refine: As for ``rollout``.
        fit: As for ``rollout``.
        batch_size: As for ``rollout``.
        pictures: As for ``rollout``.

    Returns:
        One explanation for each image and class, image by image; relevance above 0 speaks for the
        class, below 0 against it.

    Raises:
        VitvizError: An option or an image is not usable.
    """
    options = MethodOptions(
        method=Method.EVIDENCE,
        classes=_words(classes),
        rule=AttentionRule(rule),
        refine=refine,
    )
    return explain(model, images, options, fit=Fit(fit), batch_size=batch_size, pictures=pictures)


def attention(
    model: Model,
    images: Images,
    *,
    query: tuple[int, int] | None = None,
    refine: int = 1,
    fit: Fit | str = Fit.SQUASH,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
) -> list[Explanation]:
    """Return raw attention, blocks and heads apart; it draws itself as a contact sheet.

    Args:
        model: From ``load_model``; it is left as it was.
        images: As for ``rollout``.
        query: (row, col) of the patch whose attention is wanted; None: the tokens that the
            model's head reads.
        refine: As for ``rollout``.
        fit: As for ``rollout``.
        batch_size: As for ``rollout``.
        pictures: As for ``rollout``.

    Returns:
        One explanation an image, its relevance (blocks, heads, rows, cols).

    Raises:
        VitvizError: An option or an image is not usable.
    """
    options = MethodOptions(method=Method.ATTENTION, query=query, refine=refine)
    return explain(model, images, options, fit=Fit(fit), batch_size=batch_size, pictures=pictures)


def evaluate(
    model: Model,
    images: Images,
    *,
    methods: Iterable[str] = (),
    masks: str | os.PathLike[str] | Sequence[Any] | None = None,
    target: int | str = "top1",
    truth: Sequence[int] | None = None,
    convention: Convention | str = Convention.VITVIZ,
    fit: Fit | str = Fit.SQUASH,
    batch_size: int | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Evaluation:
    """Measure methods side by side, always with a random map and a centred one.

    Args:
        model: From ``load_model``; it is left as it was.
        images: As for ``rollout``.
        methods: Names of ``options.VARIANTS``, ``@2`` after one for maps twice as fine; none: all
            that suit the model.
        masks: A folder with PNGs of the images' names, or one mask an image: an array (height,
            width) of integers, 0 for the background, a path, or None.
        target: The class that maps explain: an index, a label, ``"top1"``, ``"truth"``, or
            ``"mask"`` for each class that an image's mask names (its values are class indices + 1).
        truth: The true class of each image.
        convention: ``vitviz`` or ``chefer2021``; see ``perturbation.PERTURBATIONS``.
        fit: As for ``rollout``.
        batch_size: As for ``rollout``.
        seed: Of the random map and of the bootstrap.
        resamples: Bootstrap samples behind the intervals.

    Returns:
        The methods side by side; images that failed are named in its ``failed``.

    Raises:
        VitvizError: An option is not usable.
    """
    options = EvaluationOptions(
        methods=tuple(methods),
        target=str(target),
        convention=Convention(convention),
        fit=Fit(fit),
        batch_size=batch_size,
        seed=seed,
        resamples=resamples,
    )
    require_inputs(model, images)
    subjects = _subjects(images, masks, truth)
    return summarize(model, options, list(examine(model, subjects, options)))


def _subjects(
    images: Images,
    masks: str | os.PathLike[str] | Sequence[Any] | None,
    truth: Sequence[int] | None,
) -> list[AnnotatedImage]:
    """Put together what is known about each image."""
    given = list(images)
    if isinstance(masks, (str, os.PathLike)):
        found = annotated_images(map(_source, range(len(given)), given), masks=Path(masks))
        of_each: list[Any] = [subject.mask for subject in found]
    else:
        found = annotated_images(map(_source, range(len(given)), given))
        of_each = [None] * len(given) if masks is None else list(masks)
    classes = [None] * len(given) if truth is None else list(truth)
    if not len(given) == len(of_each) == len(classes):
        raise OptionError(
            f"{len(given)} images, {len(of_each)} masks, {len(classes)} true classes: give one of "
            "each an image"
        )
    return [
        replace(
            subject,
            image=None if isinstance(image, (str, os.PathLike)) else image,
            mask=Path(mask) if isinstance(mask, (str, os.PathLike)) else mask,
            truth=None if true_class is None else int(true_class),
        )
        for subject, image, mask, true_class in zip(found, given, of_each, classes, strict=True)
    ]


def _source(number: int, image: Any) -> Source:
    """Name an image, by its path if it has one."""
    if not isinstance(image, (str, os.PathLike)):
        return Source(path=Path(f"image {number}"), key=f"image {number}")
    path = Path(image)
    whole = Path(os.path.abspath(path))  # noqa: PTH100 (".." is taken out, links stay)
    return Source(path=path, key=whole.relative_to(whole.anchor).as_posix())


def _words(classes: Classes) -> tuple[str, ...]:
    """Return class requests as they would be typed."""
    wanted = (classes,) if isinstance(classes, (int, str)) else classes
    return tuple(map(str, wanted))
