"""The residual rule: which additions it concerns, and what the gradients of a and b become."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import linear_oracles
from vitviz.models.linear_backward import LinearizedBackward
from vitviz.models.residuals import BalancedResiduals
from vitviz.options import AttentionRule

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (2, 5, 6)


def _drawn(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class _Addition(nn.Module):
    """Adds two tensors in some way, whatever enters it."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor], *operands: Tensor) -> None:
        super().__init__()
        self._add, self._operands = add, operands

    def forward(self, x: Tensor) -> Tensor:
        return self._add(*(each * 1 for each in self._operands))


A, B, WEIGHTS = (_drawn(*SHAPE, seed=seed) for seed in (2, 3, 4))


def _gradients(
    add: Callable[[Tensor, Tensor], Tensor] = operator.add,
    a: Tensor = A,
    b: Tensor = B,
    *,
    weights: Tensor = WEIGHTS,
    entering: tuple[int, ...] = SHAPE,
    blocks: int = 4,
    place: int = 0,
) -> tuple[Tensor, ...]:
    """Add a and b in one of several blocks; return the gradients of the weighted sum.

    Also hold that the sum is what it is anyway.
    """
    a, b = (each.clone().requires_grad_(True) for each in (a, b))
    layers = [_Addition(add, a, b) if block == place else nn.Identity() for block in range(blocks)]
    with (
        BalancedResiduals(layers).followed() as residuals,
        LinearizedBackward(AttentionRule.VALUE, residuals),
    ):
        for number, layer in enumerate(layers):
            found = layer(torch.zeros(entering))
            if number == place:
                total = found
    with torch.no_grad():
        assert torch.equal(total, add(a * 1, b * 1))
    return torch.autograd.grad(total, [a, b], weights.view_as(total).to(total.dtype))


def _by_hand(a: Tensor = A, b: Tensor = B) -> list[Tensor]:
    return [WEIGHTS.view_as(a) * each for each in linear_oracles.balanced(a, b)]


def _assert_balanced(found: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, _by_hand(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def _assert_plain(found: tuple[Tensor, ...], weights: Tensor = WEIGHTS) -> None:
    assert all(torch.equal(each, weights) for each in found)


def _add_in_place(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


WAYS = {
    "operator": operator.add,
    "in-place": _add_in_place,
    "function": torch.add,
    "function-by-keyword": lambda a, b: torch.add(input=a, other=b),
    "method": lambda a, b: a.add(b),
    "method-by-keyword": lambda a, b: a.add(other=b),
    "method-in-place": lambda a, b: a.add_(b),
    "reflected": lambda a, b: b.__radd__(a),
}


@pytest.mark.parametrize("add", WAYS.values(), ids=WAYS)
def test_each_way_to_add_is_balanced(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    _assert_balanced(_gradients(add))


@pytest.mark.parametrize(
    "add",
    [lambda a, b: torch.add(a, b, alpha=-2), lambda a, b: a.add_(b, alpha=-2)],
    ids=["function", "in-place"],
)
def test_second_operand_counts_with_its_factor(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    of_a, of_b = _gradients(add)
    expected_a, expected_b = _by_hand(A, -2 * B)
    torch.testing.assert_close(of_a, expected_a)
    torch.testing.assert_close(of_b, -2 * expected_b)


def test_both_operands_together_keep_their_relevance() -> None:
    of_a, of_b = _gradients()
    torch.testing.assert_close(A * of_a + B * of_b, (A + B) * WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operands_of_nothing_and_equal_ones(dtype: torch.dtype) -> None:
    a = torch.tensor([[[0.0, 0, 3, 0, -2, 1.5, -4]]], dtype=dtype)
    b = torch.tensor([[[0.0, 2, 0, -2, 2, -1.5, 4]]], dtype=dtype)
    of_a, of_b = _gradients(a=a, b=b, weights=torch.full((1, 1, 7), 5.0), entering=(1, 1, 7))
    expected = torch.tensor([[[5.0, 5, 5, 5, 0, 0, 0]]], dtype=dtype)
    for found in (of_a, of_b):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-30)


def test_half_precision_is_balanced_in_single() -> None:
    a, b, weights = (each.bfloat16() for each in (A, B, WEIGHTS))
    of_a, of_b = _gradients(a=a, b=b, weights=weights)
    for found, share in zip(
        (of_a, of_b), linear_oracles.balanced(a.double(), b.double()), strict=True
    ):
        assert found.dtype == torch.bfloat16
        # But for the last rounding, which is half a unit in the last of eight binary places.
        torch.testing.assert_close(found.double(), weights.double() * share, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("blocks", "balanced"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 3), (11, 8), (12, 9)]
)
def test_first_three_quarters_of_the_blocks_are_balanced(blocks: int, balanced: int) -> None:
    for place in range(blocks):
        found = _gradients(blocks=blocks, place=place)
        (_assert_balanced if place < balanced else _assert_plain)(found)


def test_tokens_on_a_grid_are_balanced_there_and_in_a_row() -> None:
    on_grid = (2, 5, 2, 3)
    _assert_balanced(
        tuple(
            each.view(SHAPE)
            for each in _gradients(a=A.view(on_grid), b=B.view(on_grid), entering=on_grid)
        )
    )
    a, b = A.view(2, 10, 3), B.view(2, 10, 3)
    found = _gradients(a=a, b=b, entering=on_grid)
    _assert_balanced(tuple(each.view(SHAPE) for each in found))


@pytest.mark.parametrize("entering", [(2, 5, 12), (2, 6, 5), (1, 5, 6)])
def test_other_shapes_than_that_of_the_tokens_are_no_residuals(entering: tuple[int, ...]) -> None:
    _assert_plain(_gradients(entering=entering))


def test_rotated_queries_of_a_single_head_are_no_residuals() -> None:
    a, b, weights = (each.unsqueeze(1) for each in (A, B, WEIGHTS))
    _assert_plain(_gradients(a=a, b=b, weights=weights), weights)


def test_a_constant_is_no_branch() -> None:
    (of_a,) = _gradients_of_first(B)
    assert torch.equal(of_a, WEIGHTS)
    (of_a,) = _gradients_of_first(2.0)
    assert torch.equal(of_a, WEIGHTS)


def _gradients_of_first(other: object) -> tuple[Tensor, ...]:
    a = A.clone().requires_grad_(True)
    block = _Addition(lambda x: x + other, a)
    with (
        BalancedResiduals([block, nn.Identity()]).followed() as residuals,
        LinearizedBackward(AttentionRule.VALUE, residuals),
    ):
        total = block(torch.zeros(SHAPE))
    return torch.autograd.grad(total, [a], WEIGHTS)


def test_additions_outside_of_blocks_are_plain_also_after_an_error() -> None:
    class Faulty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

    a, b = (each.clone().requires_grad_(True) for each in (A, B))
    block = Faulty()
    with (
        BalancedResiduals([block, nn.Identity()]).followed() as residuals,
        LinearizedBackward(AttentionRule.VALUE, residuals),
    ):
        with pytest.raises(RuntimeError, match="on purpose"):
            block(torch.zeros(SHAPE))
        total = a * 1 + b * 1
    _assert_plain(torch.autograd.grad(total, [a, b], WEIGHTS))
    assert not block._forward_pre_hooks
    assert not block._forward_hooks
