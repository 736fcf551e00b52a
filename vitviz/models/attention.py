"""The attention of one call: queries, keys and values, and any part of its probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitviz.errors import CaptureError

__all__ = ["Attention", "AttentionRecord", "MaterializedAttention", "at_least_float32"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionRecord:
    """One call of attention: what is needed to compute any part of its probabilities.

    Attributes:
        query: (batch, heads, queries, head_dim).
        key: (batch, key_heads, keys, head_dim); key_heads divides heads.
        value: (batch, key_heads, keys, value_dim); None without a gradient, which alone needs it.
        output: (batch, heads, queries, value_dim), before heads are joined; None unless it can be
            differentiated through.
        bias: Added to the scores, broadcastable to (batch, heads, queries, keys), or None.
        scale: Factor on the scores.
        projection: (channels, heads · value_dim), the matrix that joins the heads of the output;
            None where there is none to be found.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    output: Tensor | None
    bias: Tensor | None
    scale: float
    projection: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the probabilities: (batch, heads, queries, keys)."""
        return (*self.query.shape[:-1], self.key.shape[-2])

    def probabilities(self, images: slice, queries: slice) -> Tensor:
        """Compute attention probabilities for some images and some queries.

        Returns:
            (images, heads, queries, keys), float32 or wider; each row sums to 1.
        """
        query = at_least_float32(self.query[images, :, queries])
        key = self._per_head(self.key[images])
        scores = _products(query, key, self.scale)
        if self.bias is not None:
            scores += self._bias(images, queries)
        return scores.softmax(dim=-1)

    def probability_gradients(self, gradient: Tensor, images: slice, queries: slice) -> Tensor:
        """Compute ∂y/∂A = (∂y/∂O)·Vᵀ per head for some images and some queries.

        Args:
            gradient: ∂y/∂O for the whole batch, shaped as ``output``.
            images: Which images of the batch.
            queries: Which rows.

        Returns:
            (images, heads, queries, keys), the gradient with respect to the probabilities.
        """
        assert self.value is not None
        return _products(
            at_least_float32(gradient[images, :, queries]), self._per_head(self.value[images])
        )

    def value_norms(self) -> Tensor:
        """Compute ‖W_o v_j‖, how much the value of each token j can move the tokens that see it.

        Returns:
            (batch, keys), float32 or wider.
        """
        assert self.value is not None
        return _projected_norms(self._per_head(self.value), self.projection)

    def _per_head(self, shared: Tensor) -> Tensor:
        """Repeat grouped keys or values (images, key_heads, …) so that each head has its own."""
        repeats = self.query.shape[1] // shared.shape[1]
        return at_least_float32(shared.repeat_interleave(repeats, dim=1) if repeats > 1 else shared)

    def _bias(self, images: slice, queries: slice) -> Tensor:
        assert self.bias is not None
        bias = at_least_float32(self.bias)
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
        if bias.shape[0] > 1:
            bias = bias[images]
        return bias[:, :, queries] if bias.shape[2] > 1 else bias


@dataclass(frozen=True, kw_only=True, eq=False)
class MaterializedAttention:
    """Attention that a module computes itself, and mixes between heads after the softmax.

    Attributes:
        attention: (batch, heads, queries, keys), what the values are multiplied with; with
            talking heads its rows need not sum to 1, nor be positive.
        output: The same tensor, where it can be differentiated through; else None.
        value: (batch, heads, keys, value_dim); None where it was not seen.
        projection: As for ``AttentionRecord``.
    """

    attention: Tensor
    output: Tensor | None
    value: Tensor | None = None
    projection: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the attention: (batch, heads, queries, keys)."""
        return tuple(self.attention.shape)

    def probabilities(self, images: slice, queries: slice) -> Tensor:
        """Return the attention of some images and some queries, a copy."""
        return at_least_float32(self.attention[images, :, queries]).clone()

    def probability_gradients(self, gradient: Tensor, images: slice, queries: slice) -> Tensor:
        """Return ∂y/∂A of some images and some queries; the output being A, it is given."""
        return at_least_float32(gradient[images, :, queries])

    def value_norms(self) -> Tensor:
        """Compute ‖W_o v_j‖ (batch, keys), as for ``AttentionRecord``."""
        return _projected_norms(self.value, self.projection)


Attention = AttentionRecord | MaterializedAttention


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision, in which probabilities would not sum to 1; leave all else."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _projected_norms(value: Tensor | None, projection: Tensor | None) -> Tensor:
    """Norm (batch, keys) of values (batch, heads, keys, value_dim) behind a projection."""
    if value is None or projection is None:
        raise CaptureError(
            "found no matrix that attention multiplies its values with (a linear layer, or what "
            "amounts to one), so they cannot be weighed; try relevance --classic, or grad-rollout"
        )
    joined = at_least_float32(value).transpose(1, 2).flatten(2)
    norms: Tensor = F.linear(joined, at_least_float32(projection)).norm(dim=-1)
    return norms


def _products(rows: Tensor, columns: Tensor, scale: float = 1.0) -> Tensor:
    """Multiply (images, heads, m, d) with (images, heads, n, d), transposed, and with a factor."""
    left, right = rows.flatten(0, 1), columns.flatten(0, 1).transpose(1, 2)
    product = torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)
    return product.view(*rows.shape[:2], *product.shape[1:])
