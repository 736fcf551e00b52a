"""Painted scenes: shaded shapes on cluttered backdrops, with masks; never touches a model.

A scene is composed in unit coordinates (row, col in [0, 1]) and painted at any size, so the same
seed gives the same picture in 96 pixels and in 960. Only shape tells the classes apart: colours,
textures and shading are shared by objects, distractors and backdrop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.demo_model import CLASSES
from tests.demo_model.painting import Canvas, Palette, draw_backdrop, draw_light, draw_surface
from tests.demo_model.shapes import SCRAPS, SHAPES, Outline, stroke

__all__ = ["HELD_OUT", "Scene", "SceneObject", "SceneStyle", "as_input", "paint_scene"]

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
HELD_OUT = 0
"""The stream of seeds that training never draws from."""

_TILT = 0.4  # most that an object leans to either side, in radians


@dataclass(frozen=True, kw_only=True)
class SceneStyle:
    """What a scene may contain; the defaults are the full difficulty.

    Attributes:
        max_objects: Most objects in a scene, at least one.
        radius: Range of object radii, as shares of the side.
        clutter: Amount of distractors and texture, in [0, 1].
    """

    max_objects: int = 3
    radius: tuple[float, float] = (0.155, 0.235)
    clutter: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        class_index: Index into `CLASSES`.
        center: (row, col), as shares of the side.
        radius: Radius of the disc that holds the object, as a share of the side.
    """

    class_index: int
    center: tuple[float, float]
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A painted scene.

    Attributes:
        image: RGB pixels (size, size, 3).
        mask: (size, size), 0 on the backdrop, class index + 1 on the visible part of an object.
        objects: What was painted, in painting order.
    """

    image: Pixels
    mask: Pixels
    objects: tuple[SceneObject, ...]

    @property
    def labels(self) -> Floats:
        """Multi-hot class vector (classes,) of zeros and ones."""
        labels = np.zeros(len(CLASSES), np.float32)
        labels[[item.class_index for item in self.objects]] = 1
        return labels


FULL = SceneStyle()


def paint_scene(
    seed: int, *, size: int = 384, style: SceneStyle = FULL, stream: int = HELD_OUT
) -> Scene:
    """Paint the scene of one seed.

    Args:
        seed: Non-negative number of the scene.
        size: Side in pixels; it changes the resolution, not the composition.
        style: What the scene may contain.
        stream: Family of seeds; scenes of two streams have nothing in common.

    Returns:
        The scene; the same arguments always give the same one.
    """
    rng = np.random.default_rng((stream, seed))
    palette = Palette.draw(rng)
    canvas = Canvas(draw_backdrop(rng, palette, size, style.clutter), draw_light(rng))
    for _ in range(round(style.clutter * rng.uniform(5, 14))):
        canvas.paint(_distractor(rng), draw_surface(rng, palette), label=0)
    objects = _compose(rng, style)
    for item in objects:
        outline = _posed(rng, SHAPES[item.class_index](rng), item)
        canvas.paint(outline, draw_surface(rng, palette), label=item.class_index + 1)
    for _ in range(round(style.clutter * rng.uniform(0, 2.5))):
        canvas.paint(_twig(rng), draw_surface(rng, palette), label=0, most_hidden=0.12)
    return Scene(image=canvas.image(), mask=canvas.mask, objects=objects)


def as_input(image: Pixels, size: int) -> Pixels:
    """Resize an RGB image (height, width, 3) to what a model sees, (size, size, 3)."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


# Composition: what goes where, in unit coordinates.


def _compose(rng: np.random.Generator, style: SceneStyle) -> tuple[SceneObject, ...]:
    count = int(rng.integers(1, style.max_objects + 1))
    objects: list[SceneObject] = []
    for class_index in rng.choice(len(CLASSES), count, replace=False):
        radius = rng.uniform(*style.radius)
        center = _free_spot(rng, radius, objects)
        objects.append(SceneObject(class_index=int(class_index), center=center, radius=radius))
    return tuple(objects)


def _free_spot(
    rng: np.random.Generator, radius: float, objects: Sequence[SceneObject]
) -> tuple[float, float]:
    """Return the first of 32 random centres with room, or else the roomiest."""
    spots = rng.uniform(radius, 1 - radius, (32, 2))
    room = np.full(len(spots), np.inf)
    for other in objects:
        distance = np.linalg.norm(spots - other.center, axis=1)
        room = np.minimum(room, distance / (radius + other.radius))
    enough = room > 0.85  # outlines seldom fill their disc, so some of these overlap
    row, col = spots[np.argmax(enough) if enough.any() else np.argmax(room)]
    return float(row), float(col)


def _posed(rng: np.random.Generator, outline: Outline, item: SceneObject) -> Outline:
    """Stretch, tilt and move an outline to an object's place, in (x, y) shares of the side."""
    return _placed(outline, item.center, item.radius, rng.uniform(-_TILT, _TILT), _stretch(rng))


def _distractor(rng: np.random.Generator) -> Outline:
    outline = SCRAPS[rng.integers(len(SCRAPS))](rng)
    row, col = rng.uniform(0, 1, 2)
    return _placed(outline, (row, col), rng.uniform(0.03, 0.1), rng.uniform(0, 6.3), _stretch(rng))


def _twig(rng: np.random.Generator) -> Outline:
    row, col = rng.uniform(0.05, 0.95, 2)
    outline = [stroke(np.array([(-1.0, 0.0), (1.0, 0.0)]), rng.uniform(0.06, 0.1))]
    return _placed(outline, (row, col), rng.uniform(0.08, 0.2), rng.uniform(0, 6.3), 1.0)


def _stretch(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.88, 1.12))


def _placed(
    outline: Outline, center: tuple[float, float], radius: float, angle: float, stretch: float
) -> Outline:
    cosine, sine = np.cos(angle), np.sin(angle)
    pose = radius * np.array([[cosine, -sine], [sine, cosine]]) @ np.diag([stretch, 1 / stretch])
    return [contour @ pose.T + center[::-1] for contour in outline]
