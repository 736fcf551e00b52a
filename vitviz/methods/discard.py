"""The lowest entries of a map set to 0, exactly and without sorting it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitviz.models.cores import Spread

__all__ = ["keep_from", "lowest_kept"]


def lowest_kept(rows: Sequence[Tensor], ratio: float, spread: Spread) -> Tensor | None:
    """Return the entry of each map below which floor(ratio·N²) entries are discarded.

    Args:
        rows: All rows of the maps of some images (images, N, N), in pieces (images, rows, N).
        ratio: Share of the entries to discard, in [0, 1).
        spread: Works on several pieces.

    Returns:
        (images, 1, 1); None where nothing is discarded.
    """
    size = sum(piece[0].numel() for piece in rows)
    # The product is rounded first: 0.29 · 100 is 28.999… in floating point, and means 29.
    # Nor does rounding discard everything: a ratio is below 1.
    count = min(math.floor(round(ratio * size, 6)), size - 1)
    if not count:
        return None
    if not _is_on_processor(rows[0]):
        entries = torch.cat([piece.flatten(1) for piece in rows], dim=1)
        kept = entries.topk(size - count, dim=1, sorted=False).values
        return kept.amin(dim=1)[:, None, None]
    arrays = [piece.flatten(1).numpy() for piece in rows]
    found = [
        _order_statistic([array[image] for array in arrays], count, spread)
        for image in range(len(rows[0]))
    ]
    return torch.from_numpy(np.stack(found))[:, None, None]


def keep_from(maps: Tensor, lowest: Tensor) -> Tensor:
    """Zero the entries of maps (images, rows, N) below the lowest that is kept, in place.

    In place, since the maps are this room's own and the largest thing it holds. Entries equal to
    the lowest stay: maps with ties (a uniform one, say) keep their symmetry.
    """
    if not _is_on_processor(maps):
        return maps.masked_fill_(maps < lowest, 0)
    below = np.nextafter(lowest.flatten().numpy(), -np.inf)
    for image, highest_discarded in zip(maps, below.tolist(), strict=True):
        torch.threshold_(image, highest_discarded, 0.0)  # a tenth of the time of a mask
    return maps


def _is_on_processor(maps: Tensor) -> bool:
    return maps.device.type == "cpu"


def _order_statistic(pieces: Sequence[NDArray[Any]], index: int, spread: Spread = map) -> Any:
    """Return the entry that has exactly ``index`` entries before it in ascending order.

    A sample tells between which two values it must lie, so that only the few entries between
    them are put in order (Floyd & Rivest 1975, "Expected time bounds for selection"): no copy of
    the map, and a quarter of the time of ``np.partition`` where that has no vector instructions.

    Args:
        pieces: The entries, flat.
        index: How many lie before it.
        spread: Works on several pieces.
    """
    size = sum(piece.size for piece in pieces)
    part = 2 * size ** (-1 / 3)  # of all entries: few to put in order, few between them
    sample = np.concatenate([piece.take(_sample_positions(piece.size, part)) for piece in pieces])
    share = index / size
    # Four standard deviations of how many of the sample lie below.
    reach = 4 * math.sqrt(sample.size * share * (1 - share)) + 1
    first = max(math.floor(share * sample.size - reach), 0)
    last = min(math.ceil(share * sample.size + reach), sample.size - 1)
    sample.partition(last)  # one at a time, which NumPy does with vector instructions
    sample[:last].partition(first)
    found = list(spread(partial(_bracketed, low=sample[first], high=sample[last]), pieces))
    between = np.concatenate([entries for _, entries in found])
    rank = index - sum(below for below, _ in found)
    if not 0 <= rank < between.size:  # an unlucky sample, or entries that are not numbers
        between, rank = np.concatenate(pieces), index
    return np.partition(between, rank)[rank]


def _bracketed(entries: NDArray[Any], low: Any, high: Any) -> tuple[int, NDArray[Any]]:
    """Count the entries below ``low``, and return those from there to ``high``."""
    below = entries < low
    between = entries <= high
    return int(np.count_nonzero(below)), entries.compress(np.greater(between, below, out=between))


@lru_cache
def _sample_positions(size: int, part: float) -> NDArray[np.int64]:
    """Choose which entries stand for all, the same ones each time."""
    chosen = np.random.default_rng(0).integers(size, size=math.ceil(part * size))
    return np.asarray(chosen, dtype=np.int64)
