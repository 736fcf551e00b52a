"""Attention rollout as tensor algebra on captured records; knows no model, image or file.

The rollout matrix R = Â_{L−1} ⋯ Â_s is never formed. Only wᵀR is wanted, w being the tokens that
the head reads, so a row vector is carried from the last block down, and each block's fused
attention exists in chunks, one block at a time.

Sources: Abnar & Zuidema 2020 (arXiv 2005.00928) for rollout; the gradient form follows
J. Gildenblat, "Exploring Explainability for Vision Transformers" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitviz.capture import Attention, GivenAttention
from vitviz.options import HeadFusion

__all__ = ["Fusion", "attention_rollout", "fuse_heads", "fuse_with_gradient", "pooled_readout"]

Fusion = Callable[[slice, slice], Tensor]
"""Fused attention of one block for some images and queries: (images, queries, keys)."""

_CHUNK_ENTRIES = 1 << 20  # attention entries of all heads held at once: stays in cache


def attention_rollout(
    records: Sequence[Attention],
    fusions: Sequence[Fusion],
    readout: Tensor,
    *,
    discard: float,
) -> Tensor:
    """Compute wᵀR for a batch, R the product of the blocks' Â = rownorm((F + I)/2).

    Args:
        records: One for each block that takes part, in execution order.
        fusions: The fused attention F of each of them.
        readout: w, (tokens) or (batch, tokens), on the records' device.
        discard: Share of the lowest entries of F set to 0, per image and block.

    Returns:
        (batch, tokens); each row sums to 1.
    """
    batch, _, _, tokens = records[-1].shape
    relevance = readout.expand(batch, tokens)
    for record, fusion in zip(reversed(records), reversed(fusions), strict=True):
        relevance = _through_block(relevance, record, fusion, discard)
    return relevance


def fuse_heads(record: Attention, head_fusion: HeadFusion) -> Fusion:
    """Fuse a block's heads by mean, max or min."""

    def fuse(images: slice, queries: slice) -> Tensor:
        attention = record.probabilities(images, queries)
        if isinstance(record, GivenAttention):
            attention = attention.clamp_(min=0)  # talking heads can go below: nothing is gathered
        if head_fusion is HeadFusion.MEAN:
            return attention.mean(dim=1)
        return attention.amax(dim=1) if head_fusion is HeadFusion.MAX else attention.amin(dim=1)

    return fuse


def fuse_with_gradient(record: Attention, output_gradient: Tensor) -> Fusion:
    """Fuse a block's heads by relu(mean over heads of A ⊙ ∂y/∂A).

    Args:
        record: The block's attention.
        output_gradient: ∂y/∂O of the same block, shaped as ``record.output``.
    """

    def fuse(images: slice, queries: slice) -> Tensor:
        weighted = record.probabilities(images, queries)
        weighted *= record.probability_gradients(output_gradient, images, queries)
        return weighted.mean(dim=1).relu_()

    return fuse


def pooled_readout(tail: Sequence[Fusion], tokens: int) -> Tensor:
    """Compute w of a head that pools by attention: its own attention, fused, divided by its sum.

    Class attention (CaiT) has a tail of several such calls, in which a class token looks at itself
    and all tokens, with a residual connection: their rows are composed as blocks are, and what
    stays on the class token, which no image has entered, is left out.

    Args:
        tail: The fused attention of the calls after the blocks, in order, each of one query.
        tokens: Length of the sequence; prefix tokens that the pooling leaves out weigh 0.

    Returns:
        (batch, tokens), rows sum to 1; NaN where the fused attention is 0 everywhere.
    """
    rows = [fusion(slice(None), slice(None)).squeeze(1) for fusion in tail]
    own = max(rows[0].shape[-1] - tokens, 0)  # 1 where the query is one of the keys
    kept: Tensor | float = 1.0
    gathered = torch.zeros_like(rows[0][:, own:])
    for row in reversed(rows):
        share = kept / (row.sum(dim=-1, keepdim=True) + own)
        gathered = gathered + share * row[:, own:]
        kept = share * (row[:, :own].sum(dim=-1, keepdim=True) + own)
    gathered = gathered / gathered.sum(dim=-1, keepdim=True)
    return F.pad(gathered, (tokens - gathered.shape[-1], 0))


def _through_block(relevance: Tensor, record: Attention, fusion: Fusion, discard: float) -> Tensor:
    """Multiply relevance (batch, tokens) with one block's Â from the left."""
    return torch.cat(
        [
            _through_images(relevance[images], images, fusion, discard, row_chunks)
            for images, row_chunks in _chunks(record.shape)
        ]
    )


def _through_images(
    relevance: Tensor, images: slice, fusion: Fusion, discard: float, row_chunks: list[slice]
) -> Tensor:
    fused_rows: Iterable[tuple[slice, Tensor]] = (
        (rows, fusion(images, rows)) for rows in row_chunks
    )
    if discard:
        # The threshold is taken over the whole map, so for once the whole map is needed.
        whole = torch.cat([fused for _, fused in fused_rows], dim=1)
        _discard_lowest(whole, discard)
        fused_rows = [(slice(None), whole)]
    carried = torch.zeros_like(relevance)
    for rows, fused in fused_rows:
        # Rows of (F + I)/2 divided by their sums: the halves cancel, the identity adds 1.
        weights = relevance[:, rows] / (fused.sum(dim=-1) + 1)
        carried[:, rows] += weights
        carried += (weights.unsqueeze(1) @ fused).squeeze(1)
    return carried


def _discard_lowest(fused: Tensor, ratio: float) -> None:
    """Zero the floor(ratio·N²) lowest entries of each image's map (images, N, N), in place.

    In place, since the map is this room's own and the largest thing it holds. Entries equal to
    the first one kept stay: maps with ties (a uniform one, say) keep their symmetry.
    """
    entries = fused.flatten(1)
    # The product is rounded first: 0.29 · 100 is 28.999… in floating point, and means 29.
    count = math.floor(round(ratio * entries.shape[1], 6))
    if count:
        fused.masked_fill_(fused < _order_statistic(entries, count)[:, None, None], 0)


def _order_statistic(entries: Tensor, index: int) -> Tensor:
    """Return each row's entry that has exactly ``index`` entries before it in ascending order."""
    if entries.device.type == "cpu":  # NumPy selects ten times faster than torch there
        partitioned = np.partition(entries.numpy(), index, axis=1)[:, index]
        return torch.from_numpy(partitioned)
    return entries.topk(entries.shape[1] - index, dim=1, sorted=False).values.amin(dim=1)


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[slice, list[slice]]]:
    """Split a batch's attention (batch, heads, queries, keys) into pieces that stay in cache."""
    batch, heads, queries, keys = shape
    images = max(1, _CHUNK_ENTRIES // (heads * queries * keys))
    rows = max(1, min(queries, _CHUNK_ENTRIES // (heads * keys)))
    for start in range(0, batch, images):
        yield (
            slice(start, min(start + images, batch)),
            [slice(row, min(row + rows, queries)) for row in range(0, queries, rows)],
        )
