"""Painted scenes: shaded shapes on cluttered backdrops, with masks; never touches a model.

A scene is composed in unit coordinates (row, col in [0, 1]) and painted at any size, so the same
seed gives the same picture in 96 pixels and in 960. Only shape tells the classes apart: colours,
textures and shading are shared by objects, distractors and backdrop.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitviz.demo import CLASSES

__all__ = ["HELD_OUT", "Scene", "SceneObject", "SceneStyle", "as_input", "paint_scene"]

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Outline = list[NDArray[np.float64]]
"""Closed contours (points, 2) of (x, y) in the unit disc; a second contour cuts a hole."""

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
    palette = _Palette.draw(rng)
    canvas = _Canvas(_backdrop(rng, palette, size, style.clutter), _light(rng))
    for _ in range(round(style.clutter * rng.uniform(5, 14))):
        canvas.paint(_distractor(rng), _surface(rng, palette), label=0)
    objects = _compose(rng, style)
    for item in objects:
        outline = _posed(rng, _SHAPES[item.class_index](rng), item)
        canvas.paint(outline, _surface(rng, palette), label=item.class_index + 1)
    for _ in range(round(style.clutter * rng.uniform(0, 2.5))):
        canvas.paint(_twig(rng), _surface(rng, palette), label=0, most_hidden=0.12)
    return Scene(image=canvas.image(), mask=canvas.mask, objects=objects)


def as_input(image: Pixels, size: int) -> Pixels:
    """Resize an RGB image (height, width, 3) to what a model sees, (size, size, 3)."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


# Outlines of the classes, drawn upright in the unit disc.


def _circle(radius: float, start: float = 0.0, stop: float = 2 * np.pi) -> NDArray[np.float64]:
    angles = np.linspace(start, stop, 64)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(rng: np.random.Generator) -> Outline:
    radii = np.tile([1.0, rng.uniform(0.4, 0.5)], 5)
    angles = np.arange(10) * np.pi / 5
    return [np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)]


def _ring(rng: np.random.Generator) -> Outline:
    return [_circle(0.92), _circle(rng.uniform(0.46, 0.62))]


def _cross(rng: np.random.Generator) -> Outline:
    arm, half = 0.95, rng.uniform(0.23, 0.32)
    corner = np.array([(half, -arm), (half, -half), (arm, -half)])
    turns = [np.array([[0, -1], [1, 0]])] * 3
    corners = [corner]
    for turn in turns:
        corners.append(corners[-1] @ turn.T)
    return [np.concatenate(corners)]


def _heart(rng: np.random.Generator) -> Outline:
    t = np.linspace(0, 2 * np.pi, 72)
    dip = rng.uniform(4.5, 5.5)
    x = 16 * np.sin(t) ** 3
    y = -13 * np.cos(t) + dip * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    return [np.stack([x, y - 2], axis=1) / 16.5]


def _triangle(rng: np.random.Generator) -> Outline:
    angles = np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.12, 0.12, 3)
    return [np.stack([np.sin(angles), -np.cos(angles)], axis=1)]


def _square(rng: np.random.Generator) -> Outline:
    half = rng.uniform(0.7, 0.78)
    return [half * np.array([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)])]


def _moon(rng: np.random.Generator) -> Outline:
    offset, inner = rng.uniform(0.42, 0.55), rng.uniform(0.78, 0.88)
    meet = (1 - inner**2 + offset**2) / (2 * offset)
    outer_angle = np.arccos(meet)
    inner_angle = np.arctan2(np.sqrt(1 - meet**2), meet - offset)
    back = _circle(1.0, outer_angle, 2 * np.pi - outer_angle)
    bite = _circle(inner, 2 * np.pi - inner_angle, inner_angle) + (offset, 0)
    return [(np.concatenate([back, bite]) + (0.2, 0)) * (rng.choice((-1, 1)), 1)]


def _spiral(rng: np.random.Generator) -> Outline:
    turns, start = rng.uniform(1.75, 2.1), rng.uniform(0, 2 * np.pi)
    t = np.sqrt(np.linspace(0, 1, 90))
    angles = rng.choice((-1, 1)) * (start + 2 * np.pi * turns * t)
    radii = 0.06 + 0.8 * t
    path = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    return [_stroke(path, 0.125)]


_SHAPES: tuple[Callable[[np.random.Generator], Outline], ...] = (
    _star,
    _ring,
    _cross,
    _heart,
    _triangle,
    _square,
    _moon,
    _spiral,
)


# Outlines of the distractors: parts and scraps that are no class.


def _blob(rng: np.random.Generator) -> Outline:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    radii = np.full(48, 0.75)
    for harmonic in (2, 3, 4):
        radii += 0.3 / harmonic * rng.uniform(-1, 1) * np.cos(harmonic * angles + rng.uniform(0, 6))
    return [radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)]


def _rod(rng: np.random.Generator) -> Outline:
    return [_stroke(np.array([(-1.0, 0.0), (1.0, 0.0)]), rng.uniform(0.12, 0.3))]


def _arc(rng: np.random.Generator) -> Outline:
    return [_stroke(_circle(1.0, 0, rng.uniform(1.2, 2.2)) - (0.5, 0.5), rng.uniform(0.14, 0.24))]


def _half_disc(rng: np.random.Generator) -> Outline:
    return [_circle(0.9, 0, rng.uniform(2.4, 3.3))]


def _elbow(rng: np.random.Generator) -> Outline:
    return [_stroke(np.array([(-0.8, -0.8), (-0.8, 0.6), (rng.uniform(0, 0.7), 0.6)]), 0.22)]


def _zigzag(rng: np.random.Generator) -> Outline:
    count = int(rng.integers(3, 6))
    x = np.linspace(-1, 1, count)
    return [_stroke(np.stack([x, 0.4 * (-1.0) ** np.arange(count)], axis=1), 0.17)]


_SCRAPS = (_blob, _rod, _arc, _half_disc, _elbow, _zigzag)


def _stroke(path: NDArray[np.float64], half_width: float) -> NDArray[np.float64]:
    """Return the outline of a path (points, 2) drawn with a pen."""
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = half_width * np.stack([-along[:, 1], along[:, 0]], axis=1)
    return np.concatenate([path + across, (path - across)[::-1]])


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
    outline = _SCRAPS[rng.integers(len(_SCRAPS))](rng)
    row, col = rng.uniform(0, 1, 2)
    return _placed(outline, (row, col), rng.uniform(0.03, 0.1), rng.uniform(0, 6.3), _stretch(rng))


def _twig(rng: np.random.Generator) -> Outline:
    row, col = rng.uniform(0.05, 0.95, 2)
    outline = [_stroke(np.array([(-1.0, 0.0), (1.0, 0.0)]), rng.uniform(0.06, 0.1))]
    return _placed(outline, (row, col), rng.uniform(0.08, 0.2), rng.uniform(0, 6.3), 1.0)


def _stretch(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.88, 1.12))


def _placed(
    outline: Outline, center: tuple[float, float], radius: float, angle: float, stretch: float
) -> Outline:
    cosine, sine = np.cos(angle), np.sin(angle)
    pose = radius * np.array([[cosine, -sine], [sine, cosine]]) @ np.diag([stretch, 1 / stretch])
    return [contour @ pose.T + center[::-1] for contour in outline]


# Painting: colours, textures, light.


@dataclass(frozen=True)
class _Palette:
    """Colours (RGB in [0, 1]) and textures of one scene: `ground` is the backdrop's alone."""

    ground: Floats
    paints: Floats
    textures: list[Floats]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Palette":
        hue, dark = rng.random(), rng.random() < 0.6
        value = rng.uniform(0.24, 0.5) if dark else rng.uniform(0.7, 0.92)
        ground = [
            _rgb(hue + rng.normal(0, 0.07), rng.uniform(0.15, 0.5), value + rng.normal(0, 0.06))
            for _ in range(3)
        ]
        # Paints keep away from the backdrop's lightness, or an object could not be seen at all.
        lights = (0.8, 1.0) if dark else (0.3, 0.65)
        hues = hue + rng.uniform(0.15, 0.85, 4)
        paints = [_rgb(h, rng.uniform(0.5, 0.9), rng.uniform(*lights)) for h in hues]
        textures = [_texture(rng, rng.uniform(1, 3), 64) for _ in range(3)]
        return cls(np.array(ground, np.float32), np.array(paints, np.float32), textures)


@dataclass(frozen=True)
class _Surface:
    """How something is painted: two colours run into each other under a texture."""

    colors: Floats
    texture: Floats
    angle: float


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(hue % 1, saturation, min(max(value, 0.08), 1.0))


def _light(rng: np.random.Generator) -> tuple[float, float]:
    """Return the (x, y) direction towards the light, from somewhere above."""
    angle = rng.uniform(-2.4, -0.75)
    return float(np.cos(angle)), float(np.sin(angle))


def _noise(rng: np.random.Generator, cells: int, size: int) -> Floats:
    """Return smooth noise (size, size) around 0, one bump per cell."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    fine = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(fine, np.float32)


def _waves(rng: np.random.Generator, periods: float, size: int) -> Floats:
    """Return plane waves (size, size) in [-1, 1], bent a little."""
    angle = rng.uniform(0, np.pi)
    x = np.linspace(0, 1, size, dtype=np.float32)
    phase = np.cos(angle) * x[None] + np.sin(angle) * x[:, None] + 0.08 * _noise(rng, 4, size)
    return np.asarray(np.sin(2 * np.pi * periods * phase))


def _texture(rng: np.random.Generator, detail: float, size: int) -> Floats:
    """Return a random texture (size, size) around 0: mottles, stripes or checks."""
    kind = rng.integers(3)
    if kind == 0:
        return _noise(rng, int(4 * detail), size)
    if kind == 1:
        return _waves(rng, 1.5 * detail, size)
    return _waves(rng, 1.5 * detail, size) * _waves(rng, 1.5 * detail, size)


def _backdrop(rng: np.random.Generator, palette: _Palette, size: int, clutter: float) -> Floats:
    """Return a textured gradient (size, size, 3) in [0, 1], darker towards the corners."""
    first, second, third = palette.ground
    mix = np.clip(0.5 + 0.6 * _noise(rng, 3, size), 0, 1)[..., None]
    other = np.clip(0.3 + 0.5 * _noise(rng, 5, size), 0, 1)[..., None]
    ground = (first * mix + second * (1 - mix)) * (1 - other) + third * other
    strength = (0.05 + 0.15 * clutter) * rng.uniform(0.3, 1)
    relief = strength * _texture(rng, rng.uniform(3, 9), size) + 0.06 * _noise(rng, 24, size)
    x = np.linspace(-1, 1, size, dtype=np.float32)
    vignette = 1 - rng.uniform(0.05, 0.2) * (x[None] ** 2 + x[:, None] ** 2)
    return np.asarray((ground * ((1 + relief) * vignette)[..., None]).clip(0, 1), np.float32)


def _surface(rng: np.random.Generator, palette: _Palette) -> _Surface:
    pair = palette.paints[rng.choice(len(palette.paints), 2, replace=False)]
    pair[1] = 0.55 * pair[0] + 0.45 * pair[1]
    texture = np.rot90(palette.textures[rng.integers(3)], int(rng.integers(4)))
    return _Surface(pair, rng.uniform(0, 0.16) * texture, rng.uniform(0, 2 * np.pi))


class _Canvas:
    """The picture in the making: colours, labels, and the light that falls on it."""

    def __init__(self, ground: Floats, light: tuple[float, float]) -> None:
        self.colors = ground
        self.mask: Pixels = np.zeros(ground.shape[:2], np.uint8)
        self.light = light

    def image(self) -> Pixels:
        """Return the pixels (size, size, 3) in 8 bits."""
        return np.asarray((self.colors * 255 + 0.5).clip(0, 255), np.uint8)

    def paint(
        self, outline: Outline, surface: _Surface, *, label: int, most_hidden: float = 1.0
    ) -> None:
        """Paint an outline with shadow and bevel, unless it hides too much of an object."""
        points = [contour * len(self.mask) for contour in outline]
        low, high = points[0].min(axis=0), points[0].max(axis=0)
        depth = 0.5 * float(min(high - low))  # pixels from the rim to the middle
        corner = np.maximum(np.floor(low - 0.5 * depth - 2), 0).astype(int)
        end = np.minimum(np.ceil(high + 0.5 * depth + 2), len(self.mask)).astype(int)
        region = slice(corner[1], end[1]), slice(corner[0], end[0])
        cover = _coverage([contour - corner for contour in points], end - corner)
        if self._hides(cover, region, most_hidden):
            return
        self._cast_shadow(cover, region, depth)
        shaded = _shaded(surface, cover, depth, self.light)
        self.colors[region] += cover[..., None] * (shaded - self.colors[region])
        self.mask[region][cover > 0.5] = label

    def _hides(self, cover: Floats, region: tuple[slice, slice], most_hidden: float) -> bool:
        if most_hidden >= 1:
            return False
        whole = np.bincount(self.mask.ravel(), minlength=len(CLASSES) + 1)[1:]
        under = np.bincount(self.mask[region][cover > 0.5], minlength=len(CLASSES) + 1)[1:]
        return bool(np.any(under > most_hidden * whole))

    def _cast_shadow(self, cover: Floats, region: tuple[slice, slice], depth: float) -> None:
        reach = 0.16 * depth
        move = np.array([[1, 0, -reach * self.light[0]], [0, 1, -reach * self.light[1]]])
        height, width = cover.shape
        soft = cv2.GaussianBlur(cover, (0, 0), 0.1 * depth + 0.3)
        shadow = cv2.warpAffine(soft, move, (width, height))
        self.colors[region] *= 1 - 0.5 * shadow[..., None]


def _coverage(contours: Outline, extent: NDArray[np.int_]) -> Floats:
    """Return the share (height, width) of each pixel that lies inside, in [0, 1]."""
    width, height = (int(side) for side in extent)
    cover = np.zeros((height, width), np.uint8)
    # OpenCV counts from pixel centres, in 1/16 pixel.
    fixed = [np.round((contour - 0.5) * 16).astype(np.int32) for contour in contours]
    cv2.fillPoly(cover, fixed, 255, cv2.LINE_AA, shift=4)
    return np.asarray(cover, np.float32) / np.float32(255)


def _shaded(surface: _Surface, cover: Floats, depth: float, light: tuple[float, float]) -> Floats:
    """Return a surface's colours (height, width, 3), its rim bevelled towards the light."""
    height, width = cover.shape
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)
    run = np.cos(surface.angle) * x[None] + np.sin(surface.angle) * y[:, None]
    mix = np.clip(0.5 + 0.6 * run, 0, 1)[..., None]
    texture = cv2.resize(surface.texture, (width, height), interpolation=cv2.INTER_LINEAR)
    bulge = cv2.GaussianBlur(cover, (0, 0), 0.14 * depth + 0.3)
    slope_x, slope_y = (cv2.Sobel(bulge, -1, *order, scale=1 / 8) for order in ((1, 0), (0, 1)))
    lit = -depth * (light[0] * slope_x + light[1] * slope_y)
    tone = 1 + texture + 0.22 * np.clip(lit, -1.5, 1.5)
    gloss = 0.1 * np.clip(lit, 0, 1.5) ** 2
    colors = surface.colors[0] * mix + surface.colors[1] * (1 - mix)
    return np.asarray((colors * tone[..., None] + gloss[..., None]).clip(0, 1), np.float32)
