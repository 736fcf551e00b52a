"""Parts of a batch side by side on the cores of a processor; knows no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from vitviz.models.cores import side_by_side

__all__ = ["batch_size_for", "map_parts"]


_Part = TypeVar("_Part")

_PART_TOKENS = 800  # 4 images of 197 tokens: more leave the cache, fewer are more calls
_LONG = 2048  # with more tokens, layers are large enough to share, and so is their memory
_PARTS = 2  # for each core, so that it seldom waits for the others at the end of a batch
_ACCELERATOR_TOKENS = 12800  # 64 images of 197 tokens
_MOST_IMAGES = 64


def batch_size_for(tokens: int, device: torch.device) -> int:
    """Choose how many images to run at once.

    Args:
        tokens: Length of the sequence that the model makes of an image.
        device: Where the model is.
    """
    if device.type == "cpu":
        return min(_MOST_IMAGES, _part_size(tokens) * _PARTS * torch.get_num_threads())
    return max(1, min(_MOST_IMAGES, _ACCELERATOR_TOKENS // tokens))


def map_parts(
    work: Callable[..., _Part], images: Tensor, *others: Tensor, tokens: int
) -> list[_Part]:
    """Work on a batch in parts: on a processor side by side, elsewhere all at once.

    Args:
        work: What to do with a part of each tensor.
        images: (batch, ...).
        others: (batch, ...), what goes with each image.
        tokens: Length of the sequence that the model makes of an image.

    Returns:
        What became of the parts, in order.
    """
    if images.device.type != "cpu":
        return [work(images, *others)]
    cores = torch.get_num_threads()
    size = min(_part_size(tokens), math.ceil(len(images) / cores))
    parts = list(zip(*(torch.split(each, size) for each in (images, *others)), strict=True))
    with side_by_side(1 if tokens > _LONG else min(cores, len(parts))) as spread:
        return list(spread(lambda part: work(*part), parts))


def _part_size(tokens: int) -> int:
    return max(1, _PART_TOKENS // tokens)
