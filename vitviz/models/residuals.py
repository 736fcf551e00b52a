"""The residual rule: of two branches that cancel, the one whose sign the sum has is favoured.

Where the operands of a residual addition have opposite signs, plain gradients hand large relevance
of both signs to the two, and it grows from block to block. The rule bounds it and keeps its sum:
R = x ⊙ ∂y/∂x of both operands together stays that of their sum.

Source: Berend et al. 2026, "The Role of Residual Cancellation in Attribution Instability in Vision
Transformers" (ResLRP), in gradient form with γ = 1. That it is used in the first three quarters of
the blocks alone is a choice of this package: everywhere, maps of different classes become alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitviz.models.hooks import hooked

__all__ = ["ADDITIONS", "BalancedResiduals"]


_GAMMA = 1.0
_WEIGHT = (2 + _GAMMA) / (2 + 2 * _GAMMA)  # of |a + b| in D/(1 + γ); the rest is that of |a − b|
_LESS = 1 / (1 + _GAMMA) - 1  # what q has less than p, as a part of p's
_IN_PLACE = frozenset((Tensor.add_, Tensor.__iadd__))
ADDITIONS = frozenset((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)) | _IN_PLACE
"""The functions of torch that add two tensors, operators among them."""


class BalancedResiduals:
    """Knows the residual additions of the first three quarters of a model's blocks."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        """Choose the blocks.

        Args:
            blocks: All of the model's, in the order in which they run.
        """
        self._blocks = blocks[: 3 * len(blocks) // 4]
        self._of_thread = threading.local()

    @contextmanager
    def followed(self) -> Iterator[BalancedResiduals]:
        """Keep track of which block each thread is in."""
        with hooked(self._hooks()):
            yield self

    def add(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Add, by the rule on the way back if this is a residual addition.

        Args:
            func: One of ``ADDITIONS``.
            args: Its arguments.
            kwargs: The same.
        """
        given = kwargs.copy()
        one = args[0] if args else given.pop("input", None)
        other = args[1] if len(args) > 1 else given.pop("other", None)
        if "out" in given or not self._is_residual(one, other):
            return func(*args, **kwargs)
        total: Tensor = _Balanced.apply(one, other, partial(func, **given))
        return total

    def _hooks(self) -> Iterator[RemovableHandle]:
        for block in self._blocks:
            yield block.register_forward_pre_hook(self._enter)
            yield block.register_forward_hook(self._leave, always_call=True)

    def _enter(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._of_thread.shape = inputs[0].shape

    def _leave(self, block: nn.Module, inputs: object, output: object) -> None:
        self._of_thread.shape = None

    def _is_residual(self, one: object, other: object) -> bool:
        """Tell whether both operands are tokens in a block, and both hang on its input."""
        shape = getattr(self._of_thread, "shape", None)
        if shape is None or not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return False
        if not (one.requires_grad and other.requires_grad and one.shape == other.shape):
            return False
        # Tokens on a grid (batch, rows, cols, channels) may be laid out in a row inside a block.
        return one.shape in (shape, (shape[0], shape[1:-1].numel(), shape[-1]))


class _Balanced(torch.autograd.Function):
    """a + α·b, whose operands share a gradient by the rule."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, add: partial[Tensor]) -> Tensor:
        ctx.alpha = add.keywords.get("alpha", 1)
        in_place = add.func in _IN_PLACE
        ctx.save_for_backward(a.clone() if in_place else a, b)
        if in_place:
            ctx.mark_dirty(a)
        return add(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        of_a, of_b = _share_out(gradient.to(wide), a.to(wide), b.to(wide) * ctx.alpha)
        return of_a.to(a.dtype), of_b.mul_(ctx.alpha).to(b.dtype), None


def _share_out(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a and b, of the gradient g of their sum.

    Where a·b ≥ 0, both are g. Else, p the larger in magnitude and q the other one, that of p is
    g·(1 + γ)·(a + b)/D and that of q g·(a + b)/D, with D = (1 + γ)·p + q.
    """
    total, difference = a + b, (a - b).abs_()
    # So that nothing by nothing is 1: where both operands are 0, the gradient passes.
    size = total.abs().add_(torch.finfo(a.dtype).tiny)
    # Of opposite signs |a − b| is the larger one, and |p| the mean of the two: this is D/(1 + γ).
    # Of equal signs it is |a + b|, so that the share is 1.
    denominator = torch.maximum(difference, size, out=difference).lerp_(size, _WEIGHT)
    shared = size.div_(denominator).mul_(gradient)
    # q is the operand that has not the sign of the sum.
    of_a, of_b = (
        torch.addcmul(shared, shared, is_q, value=_LESS, out=is_q)
        for is_q in (torch.mul(a, total, out=difference).lt_(0), total.mul_(b).lt_(0))
    )
    return of_a, of_b
