"""How a scene is painted: colours, textures, light, and the canvas that takes them."""

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tests.demo_model import CLASSES
from tests.demo_model.shapes import Outline

__all__ = ["Canvas", "Palette", "Surface", "draw_backdrop", "draw_light", "draw_surface"]

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Palette:
    """Colours (RGB in [0, 1]) and textures of one scene: `ground` is the backdrop's alone."""

    ground: Floats
    paints: Floats
    textures: list[Floats]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Palette":
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
class Surface:
    """How something is painted: two colours run into each other under a texture."""

    colors: Floats
    texture: Floats
    angle: float


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(hue % 1, saturation, min(max(value, 0.08), 1.0))


def draw_light(rng: np.random.Generator) -> tuple[float, float]:
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


def draw_backdrop(rng: np.random.Generator, palette: Palette, size: int, clutter: float) -> Floats:
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


def draw_surface(rng: np.random.Generator, palette: Palette) -> Surface:
    pair = palette.paints[rng.choice(len(palette.paints), 2, replace=False)]
    pair[1] = 0.55 * pair[0] + 0.45 * pair[1]
    texture = np.rot90(palette.textures[rng.integers(3)], int(rng.integers(4)))
    return Surface(pair, rng.uniform(0, 0.16) * texture, rng.uniform(0, 2 * np.pi))


class Canvas:
    """The picture in the making: colours, labels, and the light that falls on it."""

    def __init__(self, ground: Floats, light: tuple[float, float]) -> None:
        self.colors = ground
        self.mask: Pixels = np.zeros(ground.shape[:2], np.uint8)
        self.light = light

    def image(self) -> Pixels:
        """Return the pixels (size, size, 3) in 8 bits."""
        return np.asarray((self.colors * 255 + 0.5).clip(0, 255), np.uint8)

    def paint(
        self, outline: Outline, surface: Surface, *, label: int, most_hidden: float = 1.0
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


def _shaded(surface: Surface, cover: Floats, depth: float, light: tuple[float, float]) -> Floats:
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
