"""Muon's steps, against the polar factor that they approximate (computed by SVD, in float64)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.demo_model.muon import Muon

pytestmark = pytest.mark.usefixtures("one_thread")

Matrix = NDArray[np.float64]
SHAPES = [(8, 8), (6, 20), (20, 6), (48, 2)]


def gradient(rows: int, cols: int, seed: int) -> Tensor:
    """Draw a gradient none of whose directions is faint: five iterations do not lift those."""
    left, _, right = np.linalg.svd(np.random.default_rng(seed).normal(size=(rows, cols)), False)
    strengths = np.linspace(1, 0.2, min(rows, cols))
    return torch.tensor((left * strengths) @ right, dtype=torch.float32)


def move(gradients: Sequence[Tensor], start: Tensor | None = None, **settings: float) -> Tensor:
    """Return what a parameter is after a step for each of its gradients."""
    parameter = (torch.zeros_like(gradients[0]) if start is None else start).clone()
    optimizer = Muon([parameter], **{"lr": 1.0, "weight_decay": 0.0, **settings})
    for each in gradients:
        parameter.grad = each
        optimizer.step()
    return parameter


def turned(update: Tensor, direction: Tensor) -> Matrix:
    """Return an update in the singular vectors of a direction, its scale taken off."""
    left, _, right = np.linalg.svd(direction.double().numpy(), full_matrices=False)
    plain: Matrix = left.T @ update.double().numpy() @ right.T
    return plain / (0.2 * max(update.shape) ** 0.5)


def assert_nearly_one_in_every_direction(update: Tensor, direction: Tensor) -> None:
    found = turned(update, direction)
    strengths = np.diag(found)
    assert strengths.min() > 0.65
    assert strengths.max() < 1.25
    assert np.abs(found - np.diag(strengths)).max() < 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_is_the_nearly_orthogonal_factor_of_the_gradient(shape: tuple[int, int]) -> None:
    direction = gradient(*shape, seed=1)
    assert_nearly_one_in_every_direction(-move([direction]), direction)


@pytest.mark.parametrize("size", [8, 32, 128])
def test_entries_of_a_step_are_as_large_as_adams_at_any_size(size: int) -> None:
    step = move([gradient(size, size, seed=2)])
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_strength_of_the_gradient_does_not_matter() -> None:
    direction = gradient(6, 20, seed=3)
    assert torch.allclose(move([direction]), move([1e3 * direction]), atol=1e-5)


def test_queries_keys_and_values_are_three_matrices() -> None:
    parts = [gradient(8, 8, seed=seed) * 10.0**seed for seed in (0, 1, 2)]
    together = move([torch.cat(parts)])
    assert torch.allclose(together, torch.cat([move([part]) for part in parts]), atol=1e-5)


def test_momentum_is_nesterovs() -> None:
    first, second = gradient(8, 8, seed=4), gradient(8, 8, seed=5)
    # Jordan's formula: the buffer B = μB + G is followed a step ahead, G + μB.
    buffer = 0.9 * first + second
    step = move([first, second], momentum=0.9) - move([first], momentum=0.9)
    found = turned(-step, second + 0.9 * buffer)
    assert np.abs(found - np.diag(np.diag(found))).max() < 1e-3
    assert np.diag(found).min() > 0.3


def test_learning_rate_scales_the_step() -> None:
    direction = gradient(8, 8, seed=6)
    assert torch.allclose(move([direction], lr=0.01), 0.01 * move([direction]), atol=1e-7)


def test_decay_is_apart_from_the_gradient() -> None:
    start, still = gradient(8, 8, seed=7), torch.zeros(8, 8)
    decayed = move([still], start, lr=0.1, weight_decay=0.5)
    assert torch.allclose(decayed, 0.95 * start)


def test_matrices_of_one_shape_do_not_touch_each_other() -> None:
    gradients = [gradient(6, 20, seed=8), gradient(20, 6, seed=9), gradient(6, 20, seed=10)]
    parameters = [torch.zeros_like(each) for each in gradients]
    for parameter, each in zip(parameters, gradients, strict=True):
        parameter.grad = each
    Muon(parameters, lr=1.0, weight_decay=0.0).step()
    for parameter, each in zip(parameters, gradients, strict=True):
        assert torch.allclose(parameter, move([each]), atol=1e-5)


def test_matrix_without_a_gradient_stays() -> None:
    start = gradient(8, 8, seed=11)
    parameters = [start.clone(), start.clone()]
    parameters[0].grad = gradient(8, 8, seed=12)
    Muon(parameters, lr=1.0).step()
    assert not torch.equal(parameters[0], start)
    assert torch.equal(parameters[1], start)
