"""What the maps of one class of one image score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vitviz.evaluation.metrics import (
    average_precision,
    best_miou,
    energy_inside,
    pointing_game,
    rank_correlation,
    specificity,
)
from vitviz.evaluation.perturbation import Curves, Perturbation, upsample
from vitviz.evaluation.tasks import Failure, Task, seen
from vitviz.models.model import Model

__all__ = ["ClassScores", "ModelOutput", "failed", "locate"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassScores:
    """One class of one image.

    Attributes:
        class_index: The class that the maps explain.
        class_label: Its name, if it has one.
        versus_index: The class that it is compared with, if any.
        versus_label: Its name, if it has one.
        truth: The image's true class, where it is known; else the class explained counts as right.
        scores: Of each method's map, the metrics by name; without a mask, those that need none.
        curves: What the model says as parts of the image go, (shares) in each of two orders, for
            each method.
        costs: Time of each method's maps over that of a plain forward pass of the same batch.
    """

    class_index: int
    class_label: str | None
    versus_index: int | None
    versus_label: str | None
    truth: int | None
    scores: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Curves]
    costs: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelOutput:
    """What the model gave of a task.

    Attributes:
        task: The task.
        class_index: The class explained.
        versus_index: The class that it is compared with, if any.
        relevance: (rows, cols) by method.
        rivals: The same for the best of the other classes, of methods that explain a class.
        curves: By method.
        costs: By method.
    """

    task: Task
    class_index: int
    versus_index: int | None
    relevance: Mapping[str, Tensor]
    rivals: Mapping[str, Tensor]
    curves: Mapping[str, Curves]
    costs: Mapping[str, float]


def locate(
    model: Model, perturbation: Perturbation, item: ModelOutput | Failure
) -> tuple[Task | Failure, ClassScores | str]:
    """Score the maps of a task, those that have a mask against it too.

    Returns:
        The task, and what was found or why it failed.
    """
    if isinstance(item, Failure):
        return item, item.error
    case = ClassScores(
        class_index=item.class_index,
        class_label=model.labels[item.class_index],
        versus_index=item.versus_index,
        versus_label=None if item.versus_index is None else model.labels[item.versus_index],
        truth=item.task.truth,
        scores={
            name: {
                **_faithfulness(item.curves[name], perturbation),
                **_localisation(model, item.task, relevance),
                **_class_sensitivity(relevance, item.rivals.get(name)),
            }
            for name, relevance in item.relevance.items()
        },
        curves=item.curves,
        costs=item.costs,
    )
    return item.task, case


def _faithfulness(curves: Curves, perturbation: Perturbation) -> dict[str, float]:
    """Sum up curves.

    Deletion is what is left of the score as the most relevant parts go. Insertion at a share
    shows the parts that removing the least relevant ones leaves: the same pictures, read
    backwards, so its area is that of the second order. Positive and negative perturbation are the
    same two orders, in accuracy.
    """
    deletion, insertion = perturbation.area(curves.score).tolist()
    positive, negative = perturbation.area(curves.accuracy).tolist()
    return {
        "deletion": deletion,
        "insertion": insertion,
        "difference": insertion - deletion,
        "positive": positive,
        "negative": negative,
    }


def _localisation(model: Model, task: Task, relevance: Tensor) -> dict[str, float]:
    """Compare a map, interpolated to the pixels that tokens see, with the mask."""
    if task.asked is None:
        return {}
    pixels = upsample(relevance.unsqueeze(0), seen(model, task.sample))[0].numpy()
    scores = {
        "pointing": pointing_game(pixels, task.asked),
        "energy": energy_inside(pixels, task.asked),
        "average_precision": average_precision(pixels, task.asked),
        "best_miou": best_miou(pixels, task.asked),
    }
    if task.objects is not None:
        scores["specificity"] = specificity(pixels, task.asked, task.objects)
    return scores


def _class_sensitivity(relevance: Tensor, rival: Tensor | None) -> dict[str, float]:
    """Compare a map with that of another class; a map of nothing says nothing."""
    if rival is None or not rival.isfinite().all():
        return {}
    correlation = rank_correlation(relevance.numpy(), rival.numpy())
    return {} if math.isnan(correlation) else {"class_correlation": correlation}


def failed(task: Task, error: str) -> Failure:
    """Let a task fail."""
    return Failure(number=task.number, error=error, is_last=task.is_last)
