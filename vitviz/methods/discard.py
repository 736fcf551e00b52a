"""The lowest entries of a map set to 0, exactly and without sorting it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["discard_lowest"]


def discard_lowest(fused: Tensor, ratio: float) -> None:
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
