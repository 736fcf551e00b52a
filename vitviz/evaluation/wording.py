"""What each number of an evaluation means, in words; computes none of them."""

from __future__ import annotations

from collections.abc import Sequence

from vitviz.evaluation.baselines import CENTRE_SIGMA
from vitviz.evaluation.options import EvaluationOptions
from vitviz.evaluation.perturbation import PERTURBATIONS, score_name
from vitviz.evaluation.scores import ClassScores
from vitviz.models.model import Model

__all__ = ["explain_numbers"]


_TARGETS = {
    "top1": "the one predicted for the untouched image",
    "truth": "the true class",
    "mask": "each class that the image's mask names",
}
_LOCATED = {
    "pointing": "whether the hottest pixel lies on the object; maps are compared with masks on the "
    "pixels that the model sees, bilinearly interpolated",
    "energy": "share of the positive relevance on the object",
    "precision": "average precision of the pixels, ties together",
    "best mIoU": "mean of the object's and the background's IoU at each image's best threshold",
}
_CORRELATION = {
    "correlation": "Spearman's rank correlation of the map with that of the class of the next "
    "highest logit (of top1: of the two best classes); the lower, the more a method is sensitive "
    "to the class, and near 1 its map would be the same for any other"
}
_SPECIFICITY = {
    "specificity": "share of the positive relevance on all objects that is on the one asked for, "
    "in images of several"
}


def explain_numbers(
    model: Model, options: EvaluationOptions, cases: Sequence[ClassScores]
) -> dict[str, str]:
    """Say what each number means, by its title in tables.

    Args:
        model: The model that was measured with.
        options: What was measured, and how.
        cases: What was found; numbers that none of them has are left out.
    """
    perturbation = PERTURBATIONS[options.convention]
    most, least, gain = perturbation.titles
    score = score_name(perturbation, model.score_kind, options.versus)
    right = "true class" if any(case.truth is not None for case in cases) else "class explained"
    accuracy = f"top-1 accuracy, the {right} being right"
    if options.versus is not None:
        accuracy = "share of images whose class explained has the higher logit of the two"
    known = {name for case in cases for scores in case.scores.values() for name in scores}
    return {
        "class": _TARGETS.get(options.target, f"{options.target}, in every image")
        + ("" if options.versus is None else f"; compared with {options.versus}"),
        "removed": perturbation.describe(),
        most: f"{score}, the most relevant going first; area by {perturbation.describe_area()}",
        least: "the same, the least relevant going first (read backwards: the most relevant "
        "coming first)",
        gain: f"{least} less {most}",
        "positive": f"{accuracy}, in the order of {most}",
        "negative": f"the same in the order of {least}",
        **(_LOCATED if "pointing" in known else {}),
        **(_SPECIFICITY if "specificity" in known else {}),
        **(_CORRELATION if "class_correlation" in known else {}),
        "cost": "time of the maps over that of a plain forward pass, each the faster of two runs "
        "on the same batch; median of the batches",
        "random": f"uniform noise on the model's grid, seed {options.seed}",
        "centre": f"a Gaussian at the middle, σ = {CENTRE_SIGMA:g} of each side",
        "intervals": f"95 %, of {options.resamples:,} bootstrap samples of the images, the same "
        f"for all methods, seed {options.seed}",
    }
