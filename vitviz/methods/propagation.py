"""Attention rollout as tensor algebra on captured records; knows no model, image or file.

The rollout matrix R = Â_{L−1} ⋯ Â_s is never formed. Only wᵀR is wanted, w being the tokens that
the head reads, so a row vector is carried from the last block down, and each block's fused
attention exists in chunks, one block at a time.

Sources: Abnar & Zuidema 2020 (arXiv 2005.00928) for rollout; the gradient form follows
J. Gildenblat, "Exploring Explainability for Vision Transformers" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vitviz.models.attention import Attention, MaterializedAttention, at_least_float32
from vitviz.options import HeadFusion

__all__ = [
    "Fusion",
    "attention_rollout",
    "fuse_heads",
    "fuse_positive",
    "fuse_with_gradient",
    "gathered_by_heads",
    "gradient_relevance",
    "mean_share",
    "pooled_readout",
    "signed_evidence",
]


Fusion = Callable[[slice, slice], Tensor]
"""One block's attention for some images and queries: (images, maps, queries, keys).

The mean over the maps is the fused attention F. There is one map where heads are fused entry by
entry; mean fusion leaves the heads apart, since a mean of products is cheaper than a mean of maps.
"""

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
    # Of the last block only the rows that are read matter, unless a threshold needs all of them.
    queries = slice(0, tokens) if discard else _support(readout)
    for record, fusion in zip(reversed(records), reversed(fusions), strict=True):
        relevance = torch.cat(
            [
                _through_block(relevance[images], partial(fusion, images), row_chunks, discard)
                for images, row_chunks in _chunks(record.shape, queries)
            ]
        )
        queries = slice(0, tokens)
    return relevance


def gradient_relevance(
    records: Sequence[Attention],
    fusions: Sequence[Fusion],
    start: Tensor,
    *,
    weigh_values: bool,
) -> list[Tensor]:
    """Carry r, r ← r + r·E, from the last block down.

    From block 0 and the head's readout it is one row of R ← R + E·R (Chefer, Gur & Wolf 2021,
    arXiv 2103.15679). Weighing columns by what a value can move follows Wu et al. 2024, "Token
    Transformation Matters" (arXiv 2403.14552).

    Args:
        records: One for each block that takes part, in execution order.
        fusions: E of each of them.
        start: r behind the last block, (batch, tokens).
        weigh_values: Multiply column j of E by ‖W_o v_j‖.

    Returns:
        r in front of each block (batch, tokens), the last block's first.

    Raises:
        CaptureError: Values are to be weighed, and their projection was not seen.
    """
    carried = [start]
    for record, fusion in zip(reversed(records), reversed(fusions), strict=True):
        relevance = carried[-1]
        gathered = torch.zeros_like(relevance)
        for images, row_chunks in _chunks(record.shape, _support(relevance)):
            for rows in row_chunks:
                gathered[images] += _gather(relevance[images, rows], fusion(images, rows))
        carried.append(relevance + (gathered * record.value_norms() if weigh_values else gathered))
    return carried[1:]


def mean_share(relevances: Sequence[Tensor]) -> Tensor:
    """Average relevances (batch, tokens), each as shares of its sum; none where there is none."""
    tiny = torch.finfo(relevances[0].dtype).tiny
    shares = [each / each.sum(dim=1, keepdim=True).clamp(min=tiny) for each in relevances]
    return torch.stack(shares).mean(dim=0)


def gathered_by_heads(records: Sequence[Attention], readout: Tensor) -> Tensor:
    """Compute wᵀA of each head of each block, which is what the tokens that w names attend to.

    Args:
        records: One for each block, in execution order.
        readout: w, (batch, tokens).

    Returns:
        (batch, blocks, heads, tokens).
    """
    blocks = []
    for record in records:
        of_block = [
            sum(
                (
                    (readout[images, None, None, rows] @ record.probabilities(images, rows))
                    for rows in row_chunks
                ),
                start=torch.zeros((), device=readout.device),
            )
            for images, row_chunks in _chunks(record.shape, _support(readout))
        ]
        blocks.append(torch.cat(of_block).squeeze(2))
    return torch.stack(blocks, dim=1)


def signed_evidence(tokens: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Average over block inputs x the evidence Σ over channels of x ⊙ ∂y/∂x, sign kept.

    Of a linear network without biases, the evidence of all tokens sums to y.

    Args:
        tokens: x of each block, (batch, tokens, channels).
        gradients: ∂y/∂x of each.

    Returns:
        (batch, tokens).
    """
    evidence = [
        (at_least_float32(each.detach()) * at_least_float32(gradient)).sum(dim=-1)
        for each, gradient in zip(tokens, gradients, strict=True)
    ]
    return torch.stack(evidence).mean(dim=0)


def fuse_heads(record: Attention, head_fusion: HeadFusion) -> Fusion:
    """Fuse a block's heads by mean, max or min."""

    def fuse(images: slice, queries: slice) -> Tensor:
        attention = record.probabilities(images, queries)
        if isinstance(record, MaterializedAttention):
            attention = attention.clamp_(min=0)  # talking heads can go below: nothing is gathered
        if head_fusion is HeadFusion.MEAN:
            return attention
        reduce = torch.amax if head_fusion is HeadFusion.MAX else torch.amin
        return reduce(attention, dim=1, keepdim=True)

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
        return weighted.mean(dim=1, keepdim=True).relu_()

    return fuse


def fuse_positive(record: Attention, output_gradient: Tensor) -> Fusion:
    """Fuse a block's heads by mean over heads of relu(A ⊙ ∂y/∂A); as ``fuse_with_gradient``."""

    def fuse(images: slice, queries: slice) -> Tensor:
        weighted = record.probabilities(images, queries)
        weighted *= record.probability_gradients(output_gradient, images, queries)
        return weighted.relu_()

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
    rows = [fusion(slice(None), slice(None)).mean(dim=1).squeeze(1) for fusion in tail]
    own = max(rows[0].shape[-1] - tokens, 0)  # 1 where the query is one of the keys
    kept: Tensor | float = 1.0
    gathered = torch.zeros_like(rows[0][:, own:])
    for row in reversed(rows):
        share = kept / (row.sum(dim=-1, keepdim=True) + own)
        gathered = gathered + share * row[:, own:]
        kept = share * (row[:, :own].sum(dim=-1, keepdim=True) + own)
    gathered = gathered / gathered.sum(dim=-1, keepdim=True)
    return F.pad(gathered, (tokens - gathered.shape[-1], 0))


def _through_block(
    relevance: Tensor, fusion: Callable[[slice], Tensor], row_chunks: list[slice], discard: float
) -> Tensor:
    """Multiply relevance (images, tokens) with one block's Â from the left."""
    carried = torch.zeros_like(relevance)
    if discard:
        # The threshold is taken over the whole map, so for once the whole map is needed.
        whole = torch.cat([_mean(fusion(rows)) for rows in row_chunks], dim=1)
        _discard_lowest(whole, discard)
        row_chunks, fusion = [slice(None)], lambda _: whole.unsqueeze(1)
    for rows in row_chunks:
        maps = fusion(rows)
        # Rows of (F + I)/2 divided by their sums: the halves cancel, the identity adds 1.
        weights = relevance[:, rows] / (_mean(maps.sum(dim=-1)) + 1)
        carried[:, rows] += weights
        carried += _gather(weights, maps)
    return carried


def _gather(weights: Tensor, maps: Tensor) -> Tensor:
    """Multiply weights (images, queries) with the mean of maps (images, maps, queries, keys)."""
    share = (weights / maps.shape[1]).repeat(1, maps.shape[1])
    return torch.bmm(share.unsqueeze(1), maps.flatten(1, 2)).squeeze(1)


def _mean(maps: Tensor) -> Tensor:
    """Average over maps, dimension 1; one map is itself."""
    return maps.squeeze(1) if maps.shape[1] == 1 else maps.mean(dim=1)


def _support(readout: Tensor) -> slice:
    """Return the stretch of tokens outside of which a readout is 0 everywhere; at least one."""
    read = readout.reshape(-1, readout.shape[-1]).any(dim=0).nonzero()
    return slice(int(read.min()), int(read.max()) + 1) if len(read) else slice(0, 1)


def _discard_lowest(fused: Tensor, ratio: float) -> None:
    """Zero the floor(ratio·N²) lowest entries of each image's map (images, N, N), in place.

    In place, since the map is this room's own and the largest thing it holds. Entries equal to
    the first one kept stay: maps with ties (a uniform one, say) keep their symmetry.
    """
    entries = fused.flatten(1)
    # The product is rounded first: 0.29 · 100 is 28.999… in floating point, and means 29.
    # Nor does rounding discard everything: a ratio is below 1.
    count = min(math.floor(round(ratio * entries.shape[1], 6)), entries.shape[1] - 1)
    if not count:
        return
    zero = _zero_by_selection if fused.device.type == "cpu" else _zero_by_topk
    zero(entries, count)


def _zero_by_selection(entries: Tensor, count: int) -> None:
    """Zero the ``count`` lowest of each image's entries (images, N²), on a processor."""
    for image in entries.numpy():
        np.multiply(image, image >= _order_statistic(image, count), out=image)


def _zero_by_topk(entries: Tensor, count: int) -> None:
    """Zero the ``count`` lowest of each image's entries (images, N²), on an accelerator."""
    kept = entries.topk(entries.shape[1] - count, dim=1, sorted=False).values
    entries.masked_fill_(entries < kept.amin(dim=1, keepdim=True), 0)


def _order_statistic(entries: NDArray[Any], index: int) -> Any:
    """Return the entry that has exactly ``index`` entries before it in ascending order.

    A sample tells between which two values it must lie, so that only the few entries between
    them are put in order (Floyd & Rivest 1975, "Expected time bounds for selection"): half the
    time of ``np.partition``, and no copy of the map.
    """
    sample = entries[_sample_positions(entries.size)]
    share = index / entries.size
    # Four standard deviations of how many of the sample lie below.
    reach = 4 * math.sqrt(sample.size * share * (1 - share)) + 1
    first = max(math.floor(share * sample.size - reach), 0)
    last = min(math.ceil(share * sample.size + reach), sample.size - 1)
    sample.partition((first, last))
    low, high = sample[first], sample[last]
    between = entries[(entries >= low) & (entries <= high)]
    rank = index - int(np.count_nonzero(entries < low))
    if not 0 <= rank < between.size:  # an unlucky sample, or entries that are not numbers
        between, rank = entries, index
    return np.partition(between, rank)[rank]


@lru_cache
def _sample_positions(size: int) -> NDArray[np.int64]:
    """Choose which entries stand for all, the same ones each time."""
    chosen = np.random.default_rng(0).integers(size, size=math.ceil(2 * size ** (2 / 3)))
    return np.asarray(chosen, dtype=np.int64)


def _chunks(shape: tuple[int, ...], wanted: slice) -> Iterator[tuple[slice, list[slice]]]:
    """Split the wanted rows of a batch's attention into pieces that stay in cache.

    Args:
        shape: (batch, heads, queries, keys).
        wanted: Which queries.

    Yields:
        Some images, and all wanted queries in pieces.
    """
    batch, heads, _, keys = shape
    queries = wanted.stop - wanted.start
    images = max(1, _CHUNK_ENTRIES // (heads * queries * keys))
    rows = max(1, min(queries, _CHUNK_ENTRIES // (heads * keys)))
    for start in range(0, batch, images):
        yield (
            slice(start, min(start + images, batch)),
            [
                slice(row, min(row + rows, wanted.stop))
                for row in range(wanted.start, wanted.stop, rows)
            ],
        )
