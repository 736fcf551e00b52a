"""Images without their most or least relevant parts, and what a model still says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitviz.evaluation.metrics import area_under
from vitviz.explaining.batch import predict_batch
from vitviz.models.model import Model
from vitviz.models.preprocessing import Preprocessing
from vitviz.options import Convention

__all__ = [
    "Curves",
    "PERTURBATIONS",
    "Perturbation",
    "Untouched",
    "measure_curves",
    "rank_parts",
    "score_name",
    "seen_size",
    "upsample",
]


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """What is taken away, how much of it, and how the curve is summed up.

    Attributes:
        shares: Of the parts that are removed, ascending; of n parts, ⌊share · n⌋. 0 is the
            untouched image.
        unit: The parts: ``patches`` of the model's grid (a finer map is averaged over each) or
            ``pixels`` of the bilinearly upsampled map.
        fill: What takes their place: ``mean``, the colour that preprocessing makes 0 of, or
            ``black``.
        averaged: Whether the area is divided by the range of shares, to give the mean height.
        score: What the curves are of: the ``probability`` of the class explained or its ``logit``.
        titles: What tables call the area of the order that removes the most relevant parts first,
            that of the order that removes the least relevant first, and the second less the first.
    """

    shares: tuple[float, ...]
    unit: Literal["patches", "pixels"]
    fill: Literal["mean", "black"]
    averaged: bool
    score: Literal["probability", "logit"] = "probability"
    titles: tuple[str, str, str] = ("deletion", "insertion", "difference")

    def describe(self) -> str:
        """Say in words what is removed."""
        shares = ", ".join(f"{100 * share:.0f}" for share in self.shares)
        fill = "0 after normalisation" if self.fill == "mean" else "0 before normalisation"
        return (
            f"{shares} % of the {self.unit} (rounded down), replaced by {self.fill} colour "
            f"({fill}); ties go by the random baseline's order"
        )

    def describe_area(self) -> str:
        """Say in words how curves are summed up."""
        first, last = self.shares[0], self.shares[-1]
        divided = "divided by the range" if self.averaged else "not divided by the range"
        return f"trapezoids from {first:g} to {last:g}, {divided}"

    def area(self, curve: NDArray[np.floating]) -> NDArray[np.floating]:
        """Sum up curves (..., shares)."""
        area = area_under(curve, self.shares)
        return area / (self.shares[-1] - self.shares[0]) if self.averaged else area

    def color(self, preprocessing: Preprocessing) -> Tensor:
        """Return the fill (3), preprocessed."""
        if self.fill == "mean":
            return torch.zeros(3)
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        return (0 - mean) / std  # what becomes of 0 in [0, 1]


_TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

PERTURBATIONS: Mapping[Convention, Perturbation] = MappingProxyType(
    {
        Convention.VITVIZ: Perturbation(shares=_TENTHS, unit="patches", fill="mean", averaged=True),
        # Chefer et al., CVPR 2021 (arXiv 2012.09838): what pertubation_eval_from_hdf5.py in
        # hila-chefer/Transformer-Explainability does. That the area is np.trapz from the untouched
        # image on, and no average, its author says in the repository's issue 31.
        Convention.CHEFER2021: Perturbation(
            shares=(0.0, *_TENTHS), unit="pixels", fill="black", averaged=False
        ),
        # Blücher, Vielhaben & Strodthoff, TMLR 2024 (arXiv 2401.06654): the symmetric relevance
        # gain is the area between the curve of the least influential parts first (LIF) and that of
        # the most influential first (MIF), from the whole image to nothing of it.
        Convention.SRG: Perturbation(
            shares=(0.0, *_TENTHS, 1.0),
            unit="patches",
            fill="mean",
            averaged=True,
            score="logit",
            titles=("MIF", "LIF", "SRG"),
        ),
    }
)
"""What each convention does, exactly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Untouched:
    """A batch before anything is taken away.

    Attributes:
        images: (images, 3, height, width), preprocessed, on the model's device.
        logits: (images, classes), what the model says of them.
        classes: (images), the class explained.
        targets: (images), the class that counts as right.
        versus: (images), the class that the one explained is compared with; None where there is
            none.
        ties: (images, rows, cols) on the model's grid, whose order decides between parts that are
            equally relevant, so that a map that is the same everywhere scores as this one does.
    """

    images: Tensor
    logits: Tensor
    classes: Tensor
    targets: Tensor
    ties: Tensor
    versus: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """What the model says of one image as its parts go, in two orders.

    Attributes:
        score: (orders, shares), the probability of the class explained, of two that of the first
            of them, or its logit, of two their difference; the first order removes the most
            relevant parts first, the second the least relevant.
        accuracy: (orders, shares), 1 where the class of the highest logit is the right one, of
            two where the first has the higher one; of a head with one output, where its sign is
            that of the untouched image.
    """

    score: NDArray[np.float32]
    accuracy: NDArray[np.float32]

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers."""
        return bool(np.isfinite(self.score).all())


def score_name(perturbation: Perturbation, kind: str, versus: str | None) -> str:
    """Say in words what curves are of.

    Args:
        perturbation: Says whether they are of probabilities or logits.
        kind: How the model's probabilities are made.
        versus: The class that the one explained is compared with, as typed.
    """
    if perturbation.score == "logit":
        return f"logit of the class explained{'' if versus is None else f' less that of {versus}'}"
    if versus is None:
        return f"{kind} probability of the class explained"
    return f"probability of the class explained rather than {versus}, of these two"


def seen_size(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of the whole patches of an image; no token sees the rest."""
    height, width = (max(side // each * each, each) for side, each in zip(size, patch, strict=True))
    return min(height, size[0]), min(width, size[1])


def upsample(relevance: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate maps (batch, rows, cols) bilinearly to (batch, height, width).

    Pixels lie at their centres (``align_corners=False``); beyond the outermost cells' centres the
    map goes on as it is there.
    """
    return F.interpolate(relevance[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def rank_parts(relevance: Tensor, ties: Tensor) -> Tensor:
    """Return each part's place (batch, parts), 0 for the most relevant.

    Args:
        relevance: (batch, parts).
        ties: (batch, parts), whose order decides between parts of equal relevance.
    """
    by_ties = ties.argsort(dim=1, descending=True, stable=True)
    order = relevance.gather(1, by_ties).argsort(dim=1, descending=True, stable=True)
    return by_ties.gather(1, order).argsort(dim=1)


def measure_curves(
    model: Model,
    batch: Untouched,
    relevance: Tensor,
    perturbation: Perturbation,
    batch_size: int,
) -> list[Curves]:
    """Take parts of images away by the order of their maps, and ask the model each time.

    Args:
        model: The model; it is left as it was.
        batch: The images.
        relevance: (images, rows, cols), on the CPU.
        perturbation: What to take away.
        batch_size: Perturbed images run at once.

    Returns:
        One for each image.

    Raises:
        MemoryError: The device has too little memory for this batch.
    """
    images = batch.images
    size = seen_size((images.shape[2], images.shape[3]), model.preprocessing.patch)
    grid = batch.ties.shape[1:] if perturbation.unit == "patches" else size
    places = rank_parts(_parts(relevance, grid), _parts(batch.ties, grid)).to(images.device)
    removals = _removals(perturbation, places.shape[1]).to(images.device)
    fill = perturbation.color(model.preprocessing).to(images).view(1, 3, 1, 1)

    def perturbed(numbers: Tensor) -> Tensor:
        image, removal = numbers // len(removals), numbers % len(removals)
        first, last = removals[removal].unbind(1)
        removed = (places[image] >= first[:, None]) & (places[image] < last[:, None])
        return _filled(images[image], removed.view(-1, 1, *grid), size, fill)

    chunks = torch.split(torch.arange(len(images) * len(removals)), batch_size)
    predicted = [predict_batch(model, chunk, perturbed) for chunk in chunks]
    logits = torch.cat(predicted).view(len(images), 2, -1, batch.logits.shape[1])
    if perturbation.shares[0] == 0:
        logits = torch.cat([batch.logits[:, None, None].expand(-1, 2, 1, -1), logits], dim=2)
    return _curves(_scores(model, perturbation, logits, batch), logits, batch)


def _parts(relevance: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Bring maps (batch, rows, cols) to the parts (batch, parts) of a coarser or finer grid."""
    rows, cols = grid
    if rows > relevance.shape[1]:
        return upsample(relevance, (rows, cols)).flatten(1)
    return F.adaptive_avg_pool2d(relevance[:, None], (rows, cols)).flatten(1)


def _removals(perturbation: Perturbation, parts: int) -> Tensor:
    """Return the places (removals, 2), first to last, that go: most relevant first, then least."""
    # Rounded first: 0.7 · 180 is 125.999… in floating point, and means 126.
    counts = [int(round(parts * share, 6)) for share in perturbation.shares if share > 0]
    most, least = [(0, count) for count in counts], [(parts - count, parts) for count in counts]
    return torch.tensor(most + least)


def _filled(images: Tensor, removed: Tensor, size: tuple[int, int], fill: Tensor) -> Tensor:
    """Fill what is removed (batch, 1, rows, cols) of the seen part of images."""
    height, width = size
    mask = F.interpolate(removed.float(), size, mode="nearest-exact") > 0
    mask = F.pad(mask, (0, images.shape[3] - width, 0, images.shape[2] - height))
    return torch.where(mask, fill, images)


def _scores(model: Model, perturbation: Perturbation, logits: Tensor, batch: Untouched) -> Tensor:
    """Return what curves are of (images, orders, shares), of logits with classes behind."""
    of_logits = perturbation.score == "logit"
    if batch.versus is not None:
        margin = _margin(logits, batch.classes, batch.versus)
        return margin if of_logits else margin.sigmoid()
    if of_logits:
        return _of_class(logits, batch.classes)
    scores = logits.sigmoid() if model.multi_label else logits.softmax(dim=-1)
    return _of_class(scores, batch.classes)


def _curves(scores: Tensor, logits: Tensor, batch: Untouched) -> list[Curves]:
    """Put scores (images, orders, shares) and what of logits counts as right together."""
    if batch.versus is not None:
        right = _margin(logits, batch.classes, batch.versus) > 0
    elif logits.shape[3] == 1:  # yes or no, and right is what was said of the whole image
        right = (logits[..., 0] > 0) == (batch.logits.view(-1, 1, 1) > 0)
    else:
        right = logits.argmax(dim=3) == batch.targets.view(-1, 1, 1)
    accuracy = right.float().numpy()
    return [
        Curves(score=score, accuracy=share)
        for score, share in zip(scores.numpy(), accuracy, strict=True)
    ]


def _margin(logits: Tensor, classes: Tensor, others: Tensor) -> Tensor:
    """Return how much higher the logit of one class is than that of another."""
    return _of_class(logits, classes) - _of_class(logits, others)


def _of_class(values: Tensor, classes: Tensor) -> Tensor:
    """Pick a class of each image: (images, orders, shares, classes) → (images, orders, shares)."""
    return values.gather(3, classes.view(-1, 1, 1, 1).expand(*values.shape[:3], 1))[..., 0]
