"""A block's heads fused into one map, some images and queries at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitviz.models.attention import Attention, MaterializedAttention
from vitviz.options import HeadFusion

__all__ = ["Fusion", "fuse_heads", "fuse_positive", "fuse_positive_gradient", "fuse_with_gradient"]


Fusion = Callable[[slice, slice], Tensor]
"""One block's attention for some images and queries: (images, maps, queries, keys).

The mean over the maps is the fused attention F. There is one map where heads are fused entry by
entry; mean fusion leaves the heads apart, since a mean of products is cheaper than a mean of maps.
"""


def fuse_heads(record: Attention, head_fusion: HeadFusion, heads: slice = slice(None)) -> Fusion:
    """Fuse a block's heads, or some of them, by mean, max or min."""

    def fuse(images: slice, queries: slice) -> Tensor:
        attention = record.probabilities(images, queries)[:, heads]
        if isinstance(record, MaterializedAttention):
            attention = attention.clamp_(min=0)  # talking heads can go below: nothing is gathered
        if head_fusion is HeadFusion.MEAN:
            return attention
        reduce = torch.amax if head_fusion is HeadFusion.MAX else torch.amin
        return reduce(attention, dim=1, keepdim=True)

    return fuse


def fuse_with_gradient(
    record: Attention, output_gradient: Tensor, heads: slice = slice(None)
) -> Fusion:
    """Fuse a block's heads by relu(mean over heads of A ⊙ ∂y/∂A).

    Args:
        record: The block's attention.
        output_gradient: ∂y/∂O of the same block, shaped as ``record.output``.
        heads: Which heads take part.
    """

    def fuse(images: slice, queries: slice) -> Tensor:
        weighted = record.probabilities(images, queries)
        weighted *= record.probability_gradients(output_gradient, images, queries)
        # The mean first: heads that speak against the class weigh against those that speak for it.
        return weighted[:, heads].mean(dim=1, keepdim=True).relu_()

    return fuse


def fuse_positive(record: Attention, output_gradient: Tensor) -> Fusion:
    """Fuse a block's heads by mean over heads of relu(A ⊙ ∂y/∂A); as ``fuse_with_gradient``."""

    def fuse(images: slice, queries: slice) -> Tensor:
        weighted = record.probabilities(images, queries)
        weighted *= record.probability_gradients(output_gradient, images, queries)
        return weighted.relu_()  # before the mean over heads, so that none cancels another

    return fuse


def fuse_positive_gradient(record: Attention, output_gradient: Tensor) -> Fusion:
    """Fuse a block's heads by mean over heads of relu(∂y/∂A); as ``fuse_with_gradient``."""

    def fuse(images: slice, queries: slice) -> Tensor:
        return record.probability_gradients(output_gradient, images, queries).relu()

    return fuse
