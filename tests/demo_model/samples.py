"""The sample scenes that come with the project, painted again from their seeds, and others.

Run it with `python -m tests.demo_model.samples sample_images`. The masks go into a hidden folder,
which a run over the samples passes over. With `--unseen`, 80 other scenes are painted that no model
has seen.
"""

import argparse
import colorsys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.demo_model import CLASSES
from tests.demo_model.scenes import Scene, paint_scene

__all__ = ["SEEDS", "UNSEEN", "write_samples", "write_scenes"]

SEEDS = (20001, 20004, 20006, 20018, 20032, 20036, 20044, 20052, 20055, 20057)
"""Held-out seeds, chosen by eye for variety before any model had seen them."""

UNSEEN = range(10_000, 10_080)
"""Held-out seeds of scenes to measure with."""


def write_samples(folder: Path) -> list[Path]:
    """Write the sample scenes and, under the same names, their masks.

    Args:
        folder: Where `scenes` and `scenes/.masks` are made.

    Returns:
        The paths of the scenes.
    """
    samples = map(paint_scene, SEEDS)
    return write_scenes(folder, ((_title(scene), scene) for scene in samples))


def write_scenes(folder: Path, named: Iterable[tuple[str, Scene]]) -> list[Path]:
    """Write scenes by their names, as `write_samples` does."""
    scenes, masks = folder / "scenes", folder / "scenes" / ".masks"
    masks.mkdir(parents=True, exist_ok=True)
    written = []
    for title, scene in named:
        name = f"{title}.png"
        Image.fromarray(scene.image).save(scenes / name)
        _indexed(scene).save(masks / name)
        written.append(scenes / name)
    return written


def _title(scene: Scene) -> str:
    return "-".join(CLASSES[index] for index in np.flatnonzero(scene.labels))


def _indexed(scene: Scene) -> Image.Image:
    """Return the mask as a palette image: black backdrop, one colour a class."""
    hues = [colorsys.hsv_to_rgb(index / len(CLASSES), 0.7, 1) for index in range(len(CLASSES))]
    picture = Image.fromarray(scene.mask, mode="P")
    picture.putpalette([0, 0, 0, *(round(255 * part) for hue in hues for part in hue)])
    return picture


def main() -> None:
    """Write the samples, or other scenes, into the folder given."""
    parser = argparse.ArgumentParser(description="Paint the sample scenes.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--unseen", action="store_true", help="paint 80 other scenes")
    options = parser.parse_args()
    if options.unseen:
        unseen = ((str(seed), paint_scene(seed)) for seed in UNSEEN)
        paths = write_scenes(options.folder, unseen)
    else:
        paths = write_samples(options.folder)
    for path in paths:
        print(path)


if __name__ == "__main__":
    main()
