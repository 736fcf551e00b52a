"""The attention of one call: queries, keys and values, and any part of its probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitviz.errors import CaptureError

__all__ = [
    "Attention",
    "AttentionRecord",
    "MaterializedAttention",
    "SdpaArguments",
    "at_least_float32",
    "chunks",
]

_CHUNK_ENTRIES = 1 << 20  # attention entries of all heads held at once: stays in cache


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

    def value_gradients(self, gradient: Tensor) -> Tensor:
        """Compute ∂y/∂V = Aᵀ·∂y/∂O, A being constant.

        Args:
            gradient: ∂y/∂O for the whole batch, (batch, heads, queries, value_dim).

        Returns:
            (batch, key_heads, keys, value_dim), in the gradient's precision.
        """
        batch, heads, queries, keys = self.shape
        wide = at_least_float32(gradient)  # of many rows, half precision would lose the last ones
        found = wide.new_zeros(batch, heads, keys, gradient.shape[-1])
        for images, row_chunks in chunks(self.shape, slice(0, queries)):
            for rows in row_chunks:
                passed = self.probabilities(images, rows).transpose(2, 3)
                if self.bias is not None:  # a query that sees no key passes nothing on, as in torch
                    passed = passed.nan_to_num(nan=0)
                found[images] += passed @ wide[images, :, rows]
        heads_together = found.view(batch, self.key.shape[1], -1, *found.shape[2:]).sum(dim=2)
        return heads_together.to(gradient.dtype)

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


@dataclass(frozen=True, eq=False)
class SdpaArguments:
    """The arguments of ``scaled_dot_product_attention``, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def record(
        self, *, value: Tensor | None = None, output: Tensor | None = None
    ) -> AttentionRecord:
        """Keep what is needed to compute any part of the probabilities."""
        return AttentionRecord(
            query=self.query.detach().contiguous(),
            key=self.key.detach().contiguous(),
            value=value,
            output=output,
            bias=self._bias(),
            scale=self.query.shape[-1] ** -0.5 if self.scale is None else self.scale,
        )

    def _bias(self) -> Tensor | None:
        """Turn a mask of any form into a bias on the scores."""
        mask = self.attn_mask
        if self.is_causal:
            shape = self.query.shape[-2], self.key.shape[-2]
            mask = torch.ones(shape, dtype=torch.bool, device=self.query.device).tril()
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            bias = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
            return bias.masked_fill(~mask, float("-inf"))
        return mask.detach()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision, in which probabilities would not sum to 1; leave all else."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def chunks(
    shape: tuple[int, ...], wanted: slice, threads: int = 1
) -> Iterator[tuple[slice, list[slice]]]:
    """Split the wanted rows of a batch's attention into pieces that stay in cache.

    Args:
        shape: (batch, heads, queries, keys).
        wanted: Which queries.
        threads: How many work on the queries of some images.

    Yields:
        Some images, and all wanted queries in pieces.
    """
    batch, heads, _, keys = shape
    queries = wanted.stop - wanted.start
    images = max(1, _CHUNK_ENTRIES // (heads * queries * keys))
    rows = max(1, min(math.ceil(queries / threads), _CHUNK_ENTRIES // (heads * keys)))
    for start in range(0, batch, images):
        yield (
            slice(start, min(start + images, batch)),
            [
                slice(row, min(row + rows, wanted.stop))
                for row in range(wanted.start, wanted.stop, rows)
            ],
        )


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
