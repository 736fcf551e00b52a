"""Maps finer than patches: the image shifted by parts of a patch, the maps shifted back.

Each cell of the fine grid lies in one patch of each shifted image, another one each time; the mean
of these patches is what is known of the cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitviz.errors import OptionError

__all__ = ["Shift", "place_back", "shifted", "shifts"]


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far the content of an image is moved, downwards and to the right.

    Attributes:
        cells: (rows, cols) in cells of the fine grid.
        pixels: (rows, cols) in pixels.
    """

    cells: tuple[int, int]
    pixels: tuple[int, int]


def shifts(refine: int, patch: tuple[int, int]) -> list[Shift]:
    """List the shifts that split each patch (height, width) into refine × refine cells.

    The first one leaves the image as it is; all are as small as they can be.

    Raises:
        OptionError: A patch has fewer pixels along a side than it should have cells.
    """
    if refine > min(patch):
        raise OptionError(
            f"--refine is {refine}, but the model's patches have {patch[0]}×{patch[1]} pixels; "
            f"give a number from 1 to {min(patch)}"
        )
    cells = sorted(range(refine), key=lambda cell: min(cell, refine - cell))
    steps = [cell if 2 * cell <= refine else cell - refine for cell in cells]
    return [
        Shift(
            cells=(down, right),
            pixels=(round(down * patch[0] / refine), round(right * patch[1] / refine)),
        )
        for down in steps
        for right in steps
    ]


def shifted(images: Tensor, shift: Shift) -> Tensor:
    """Move the content of images (batch, 3, height, width); edges are reflected."""
    for dimension, pixels in zip((-2, -1), shift.pixels, strict=True):
        if pixels:
            images = images.index_select(dimension, _mirrored(images, dimension, pixels))
    return images


def place_back(maps: list[Tensor], made: list[Shift], refine: int) -> Tensor:
    """Average the maps of shifted images, each moved back to where its image was.

    Args:
        maps: (..., rows, cols) for each shift.
        made: The shifts.
        refine: Cells along each side of a patch.

    Returns:
        (..., rows · refine, cols · refine); a patch's relevance is shared out among its cells, so
        that sums stay what they were, but for the edges. What a shift moved out of view it says
        nothing of: cells at a border are means of fewer patches.
    """
    rows, cols = (side * refine for side in maps[0].shape[-2:])
    total = maps[0].new_zeros((*maps[0].shape[:-2], rows, cols))
    seen = maps[0].new_zeros((rows, cols))
    for relevance, shift in zip(maps, made, strict=True):
        fine = relevance.repeat_interleave(refine, -2).repeat_interleave(refine, -1)
        (here_rows, there_rows), (here_cols, there_cols) = (
            _overlap(length, moved) for length, moved in zip((rows, cols), shift.cells, strict=True)
        )
        total[..., here_rows, here_cols] += fine[..., there_rows, there_cols]
        seen[here_rows, here_cols] += 1
    return total / (seen * refine**2)


def _mirrored(images: Tensor, dimension: int, pixels: int) -> Tensor:
    """Return from where each position along a dimension takes its pixel."""
    last = images.shape[dimension] - 1
    position = torch.arange(last + 1, device=images.device).sub_(pixels).abs_()
    return last - (last - position).abs_()


def _overlap(length: int, moved: int) -> tuple[slice, slice]:
    """Return where content is that stayed inside: before it was moved, and after."""
    return (
        slice(max(-moved, 0), length - max(moved, 0)),
        slice(max(moved, 0), length + min(moved, 0)),
    )
