"""The sample scenes that come with the project, painted again from their seeds.

Run it with `python -m tests.demo_model.samples sample_images`. The masks go into a hidden folder,
which a run over the samples passes over.
"""

import argparse
import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.demo_model import CLASSES
from tests.demo_model.scenes import Scene, paint_scene

__all__ = ["SEEDS", "write_samples"]

SEEDS = (20001, 20004, 20006, 20018, 20032, 20036, 20044, 20052, 20055, 20057)
"""Held-out seeds, chosen by eye for variety before any model had seen them."""


def write_samples(folder: Path) -> list[Path]:
    """Write the sample scenes and, under the same names, their masks.

    Args:
        folder: Where `scenes` and `scenes/.masks` are made.

    Returns:
        The paths of the scenes.
    """
    scenes, masks = folder / "scenes", folder / "scenes" / ".masks"
    scenes.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    written = []
    for seed in SEEDS:
        scene = paint_scene(seed)
        name = f"{_title(scene)}.png"
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
    """Write the samples into the folder given."""
    parser = argparse.ArgumentParser(description="Paint the sample scenes.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    for path in write_samples(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
