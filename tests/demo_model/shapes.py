"""Outlines of the eight classes and of the scraps that distract from them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Outline", "SCRAPS", "SHAPES", "stroke"]

Outline = list[NDArray[np.float64]]
"""Closed contours (points, 2) of (x, y) in the unit disc; a second contour cuts a hole."""


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
    return [stroke(path, 0.125)]


SHAPES: tuple[Callable[[np.random.Generator], Outline], ...] = (
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
    return [stroke(np.array([(-1.0, 0.0), (1.0, 0.0)]), rng.uniform(0.12, 0.3))]


def _arc(rng: np.random.Generator) -> Outline:
    return [stroke(_circle(1.0, 0, rng.uniform(1.2, 2.2)) - (0.5, 0.5), rng.uniform(0.14, 0.24))]


def _half_disc(rng: np.random.Generator) -> Outline:
    return [_circle(0.9, 0, rng.uniform(2.4, 3.3))]


def _elbow(rng: np.random.Generator) -> Outline:
    return [stroke(np.array([(-0.8, -0.8), (-0.8, 0.6), (rng.uniform(0, 0.7), 0.6)]), 0.22)]


def _zigzag(rng: np.random.Generator) -> Outline:
    count = int(rng.integers(3, 6))
    x = np.linspace(-1, 1, count)
    return [stroke(np.stack([x, 0.4 * (-1.0) ** np.arange(count)], axis=1), 0.17)]


SCRAPS = (_blob, _rod, _arc, _half_disc, _elbow, _zigzag)


def stroke(path: NDArray[np.float64], half_width: float) -> NDArray[np.float64]:
    """Return the outline of a path (points, 2) drawn with a pen."""
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = half_width * np.stack([-along[:, 1], along[:, 0]], axis=1)
    return np.concatenate([path + across, (path - across)[::-1]])
