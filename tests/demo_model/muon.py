"""The Muon optimiser for stacks of equal matrices; knows nothing of models.

A momentum step is replaced by the nearest orthogonal matrix, so that every direction of a weight
matrix learns at one pace (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). A small
transformer trained from nothing leaves its first plateau several times sooner than with AdamW.
PyTorch's own version works in bfloat16, one matrix at a time, which is slow on a processor.
"""

# Not torch.optim.Muon: it came with torch 2.9, older ones are supported, and trained with it the
# bundled model would have other weights than it has.

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

__all__ = ["Muon"]

_QUINTIC = (3.4445, -4.775, 2.0315)  # pulls every singular value into about [0.7, 1.2]
_STEPS = 5


class Muon(Optimizer):
    """Muon for two-dimensional weights, in float32."""

    def __init__(
        self,
        matrices: Iterable[Tensor],
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        """Take charge of some parameters.

        Args:
            matrices: Parameters of two axes; one three times as tall as wide counts as three
                square blocks (query, key, value).
            lr: Learning rate, on the scale of AdamW's.
            momentum: Share of the running mean that a step keeps.
            weight_decay: Decoupled decay, times the learning rate.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(matrices, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._move(matrices, group["lr"], group["momentum"], group["weight_decay"])

    def _move(self, matrices: list[Tensor], rate: float, momentum: float, decay: float) -> None:
        gradients = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
        state = self.state[matrices[0]]
        mean = state.setdefault("mean", torch.zeros_like(gradients))
        mean.lerp_(gradients, 1 - momentum)
        updates = _orthogonal(gradients.lerp(mean, momentum))
        for matrix, update in zip(matrices, updates, strict=True):
            matrix.mul_(1 - rate * decay).sub_(update, alpha=rate)


def _orthogonal(stack: Tensor) -> Tensor:
    """Return the nearly orthogonal factors of matrices (count, rows, cols), in Adam's scale."""
    count, rows, cols = stack.shape
    blocks = 3 if rows == 3 * cols else 1
    x = stack.reshape(count * blocks, rows // blocks, cols)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _QUINTIC[0] * x + (_QUINTIC[1] * gram + _QUINTIC[2] * gram @ gram) @ x
    x = x.mT if tall else x
    scale = 0.2 * max(x.shape[1:]) ** 0.5  # entries of about 0.2, as in a step of Adam
    return torch.mul(x, scale).reshape(count, rows, cols)
