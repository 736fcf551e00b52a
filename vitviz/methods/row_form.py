"""The row form of rollout: a row vector carried from the last block down; knows no model or file.

The rollout matrix R = Â_{L−1} ⋯ Â_s is never formed. Only wᵀR is wanted, w being the tokens that
the head reads, so a row vector is carried from the last block down, and each block's fused
attention exists in chunks, one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from vitviz.methods.discard import keep_from, lowest_kept
from vitviz.methods.fusion import Fusion
from vitviz.models.attention import Attention, chunks
from vitviz.models.cores import Spread, side_by_side

__all__ = [
    "attention_rollout",
    "gathered",
    "gathered_by_heads",
    "gradient_relevance",
    "pooled_readout",
]


_Fused = Callable[[slice], Tensor]
"""Fused attention (images, maps, queries, keys) of some queries."""

_WORTH_THREADS = 1 << 22  # of an image's block, above which rows are worked on side by side


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
    relevance = readout.expand(batch, tokens)  # wᵀ, to be multiplied with the last Â first
    # Of the last block only the rows that are read matter, unless a threshold needs all of them.
    queries = slice(0, tokens) if discard else _support(readout)
    threads = _threads(records[-1].shape, readout.device)
    room = relevance.new_empty(0)  # for whole maps, which no block shares with another
    with side_by_side(threads) as spread:
        for record, fusion in zip(reversed(records), reversed(fusions), strict=True):
            carried = []
            for images, row_chunks in chunks(record.shape, queries, threads):
                maps: _Fused = partial(fusion, images)
                if discard:
                    size = images.stop - images.start, tokens, tokens
                    room = room if len(room) >= size[0] else room.new_empty(size)
                    maps = _discarding(maps, row_chunks, discard, spread, room[: size[0]])
                carried.append(_through_block(relevance[images], maps, row_chunks, spread))
            relevance = torch.cat(carried) if len(carried) > 1 else carried[0]
            queries = slice(0, tokens)  # further down, every token may carry relevance
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
    # One row of R ← R + E·R: later blocks stand on the right there, so they come first here.
    carried = [start]
    for record, fusion in zip(reversed(records), reversed(fusions), strict=True):
        relevance = carried[-1]
        passed = gathered(record, fusion, relevance)
        carried.append(relevance + (passed * record.value_norms() if weigh_values else passed))
    return carried[1:]


def gathered(record: Attention, fusion: Fusion, weights: Tensor) -> Tensor:
    """Compute w·F of one block, without its identity.

    Args:
        record: The block's attention.
        fusion: F.
        weights: w, (batch, queries).

    Returns:
        (batch, keys).
    """
    found = torch.zeros_like(weights)
    threads = _threads(record.shape, weights.device)

    def gather(images: slice, rows: slice) -> Tensor:
        return _gather(weights[images, rows], fusion(images, rows))

    with side_by_side(threads) as spread:
        for images, row_chunks in chunks(record.shape, _support(weights), threads):
            for passed in spread(partial(gather, images), row_chunks):  # rows that carry anything
                found[images] += passed
    return found


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
            for images, row_chunks in chunks(record.shape, _support(readout))
        ]
        blocks.append(torch.cat(of_block).squeeze(2))
    return torch.stack(blocks, dim=1)


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
        # As Â in a block: the residual adds the identity, which is 1 where the query is a key.
        share = kept / (row.sum(dim=-1, keepdim=True) + own)
        gathered = gathered + share * row[:, own:]
        kept = share * (row[:, :own].sum(dim=-1, keepdim=True) + own)
    gathered = gathered / gathered.sum(dim=-1, keepdim=True)
    return F.pad(gathered, (tokens - gathered.shape[-1], 0))


def _through_block(
    relevance: Tensor,
    fusion: _Fused,
    row_chunks: list[slice],
    spread: Spread,
) -> Tensor:
    """Multiply relevance (images, tokens) with one block's Â from the left."""

    def carry(rows: slice) -> tuple[Tensor, Tensor]:
        maps = fusion(rows)
        # Rows of (F + I)/2 divided by their sums: the halves cancel, the identity adds 1.
        weights = relevance[:, rows] / (_mean(maps.sum(dim=-1)) + 1)
        return weights, _gather(weights, maps)

    carried = torch.zeros_like(relevance)
    for rows, (weights, passed) in zip(row_chunks, spread(carry, row_chunks), strict=True):
        carried[:, rows] += weights  # relevance · I
        carried += passed  # relevance · F
    return carried


def _discarding(
    fusion: _Fused, row_chunks: list[slice], ratio: float, spread: Spread, room: Tensor
) -> _Fused:
    """Return a block's fused attention with its lowest entries set to 0, for each chunk once.

    Before the residual connection is added, so that no token loses its own. The threshold is taken
    over the whole map, so for once the whole map is held: in ``room`` (images, tokens, tokens),
    since what threads allocate for one block is seldom free for the next.
    """

    def compute(rows: slice) -> Tensor:
        return room[:, rows].copy_(_mean(fusion(rows)))

    lowest = lowest_kept(list(spread(compute, row_chunks)), ratio, spread)

    def kept(rows: slice) -> Tensor:
        maps = room[:, rows]
        return (maps if lowest is None else keep_from(maps, lowest)).unsqueeze(1)

    return kept


def _gather(weights: Tensor, maps: Tensor) -> Tensor:
    """Multiply weights (images, queries) with the mean of maps (images, maps, queries, keys)."""
    share = (weights / maps.shape[1]).unsqueeze(1).expand(-1, maps.shape[1], -1)
    return torch.bmm(share.reshape(len(maps), 1, -1), maps.flatten(1, 2)).squeeze(1)


def _mean(maps: Tensor) -> Tensor:
    """Average over maps, dimension 1; one map is itself."""
    return maps.squeeze(1) if maps.shape[1] == 1 else maps.mean(dim=1)


def _support(readout: Tensor) -> slice:
    """Return the stretch of tokens outside of which a readout is 0 everywhere; at least one."""
    read = readout.reshape(-1, readout.shape[-1]).any(dim=0).nonzero()
    return slice(int(read.min()), int(read.max()) + 1) if len(read) else slice(0, 1)


def _threads(shape: tuple[int, ...], device: torch.device) -> int:
    """Choose how many threads share the rows of an image; parts of a batch have their own."""
    _, heads, queries, keys = shape
    is_long = heads * queries * keys >= _WORTH_THREADS
    return torch.get_num_threads() if is_long and device.type == "cpu" else 1
