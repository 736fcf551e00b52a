"""The demo model's figures on scenes that training never saw; changes nothing.

Run it with ``python -m tests.demo_model.evaluate``. The maps are the ones that vitviz gives
anybody.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tests.demo_model import CLASSES
from tests.demo_model.scenes import Scene, paint_scene
from vitviz.api import grad_rollout, rollout
from vitviz.explaining.explanation import Explanation
from vitviz.models.model import Model, load_model

__all__ = ["FIRST_SEED", "Figures", "measure"]

_THRESHOLD = 0.5  # from this score on, a class counts as named

FIRST_SEED = 10_000
"""First of the seeds that no training and no choice of its settings has seen."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured, each a share in [0, 1] unless said otherwise.

    Attributes:
        exact: Scenes whose labels are all right at threshold 0.5.
        asked: Grad-rollouts whose hottest patch touches the object asked for.
        other: Grad-rollouts whose hottest patch touches another object only.
        energy: Energy of plain rollout on the objects over their share of the area, a factor.
        scenes: Number of scenes behind ``exact`` and ``energy``.
        maps: Number of grad-rollouts, one for each class present in scenes of several objects.
    """

    exact: float
    asked: float
    other: float
    energy: float
    scenes: int
    maps: int


def measure(model: Model, scenes: Sequence[Scene]) -> Figures:
    """Measure a model on scenes.

    Args:
        model: The demo model.
        scenes: Scenes that it was not trained on.

    Returns:
        The figures.
    """
    plain = rollout(model, [scene.image for scene in scenes])
    pointings = [
        _pointing(found.relevance, scene.mask, class_index)
        for class_index in range(len(CLASSES))
        for scene, found in _maps_of_class(model, scenes, class_index)
    ]
    asked, other = np.mean(pointings, axis=0) if pointings else (0.0, 0.0)
    pairs = list(zip(plain, scenes, strict=True))
    return Figures(
        exact=float(np.mean([_exact(found, scene) for found, scene in pairs])),
        asked=float(asked),
        other=float(other),
        energy=float(np.mean([_energy(found.relevance, scene.mask) for found, scene in pairs])),
        scenes=len(scenes),
        maps=len(pointings),
    )


def _maps_of_class(
    model: Model, scenes: Sequence[Scene], class_index: int
) -> list[tuple[Scene, Explanation]]:
    """Explain one class in all scenes of several objects that show it."""
    showing = [
        scene
        for scene in scenes
        if scene.labels[class_index] and np.count_nonzero(scene.labels) > 1
    ]
    images = [scene.image for scene in showing]
    return list(zip(showing, grad_rollout(model, images, classes=[class_index]), strict=True))


def _exact(found: Explanation, scene: Scene) -> bool:
    named = {each.class_index for each in found.predictions if each.score > _THRESHOLD}
    return named == set(np.flatnonzero(scene.labels))


def _pointing(
    relevance: NDArray[np.float32], mask: NDArray[np.uint8], class_index: int
) -> tuple[bool, bool]:
    """Tell whether the hottest patch overlaps the object asked for, else another one."""
    row, col = np.unravel_index(relevance.argmax(), relevance.shape)
    patch = mask.shape[0] // relevance.shape[0]
    cell = mask[row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
    asked = bool((cell == class_index + 1).any())
    return asked, not asked and bool(cell.any())


def _energy(relevance: NDArray[np.float32], mask: NDArray[np.uint8]) -> float:
    """Return the share of relevance on objects over their share of the area."""
    rows, cols = relevance.shape
    patch = mask.shape[0] // rows
    area = (mask > 0).reshape(rows, patch, cols, patch).mean(axis=(1, 3))
    if not relevance.any():  # no heat: all patches count alike
        return 1.0
    return float((relevance * area).sum() / relevance.sum() / area.mean())


def _show(figures: Figures) -> None:
    table = Table("Figure", "Value", title="Demo model on unseen scenes")
    table.add_row(f"all labels right ({figures.scenes} scenes)", f"{figures.exact:.1%}")
    table.add_row(f"grad-rollout points at the class ({figures.maps} maps)", f"{figures.asked:.1%}")
    table.add_row("grad-rollout points at another object", f"{figures.other:.1%}")
    table.add_row("rollout: energy on objects / area", f"{figures.energy:.2f}")
    Console().print(table)


def main() -> None:
    """Print the figures of the bundled weights, or of others."""
    parser = argparse.ArgumentParser(description="Measure the demo model on unseen scenes.")
    parser.add_argument(
        "--weights", type=Path, help="safetensors file; the bundled one if left out"
    )
    parser.add_argument("--scenes", type=int, default=500, help="number of scenes")
    parser.add_argument("--first", type=int, default=FIRST_SEED, help="seed of the first scene")
    options = parser.parse_args()
    model = load_model("demo", weights=options.weights)
    _show(measure(model, [paint_scene(options.first + index) for index in range(options.scenes)]))


if __name__ == "__main__":
    main()
