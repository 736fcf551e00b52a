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
            images = images.index_select(dimension, _origins(images, dimension, pixels))
    return images


def place_back(maps: list[Tensor], made: list[Shift], refine: int) -> Tensor:
    """Average the maps of shifted images, each moved back to where its image was.

    Args:
        maps: (..., rows, cols) for each shift.
        made: The shifts.
        refine: Cells along each side of a patch.

    Returns:
        (..., rows · refine, cols · refine); a patch's relevance is shared out among its cells, so
        that sums stay what they were, but for the edges. A cell is the mean over all places that
        showed its content, in the mirror too: if a patch at the edge is hot because it shows
        something twice, that counts twice for the cell of this thing, and once for its neighbour.
    """
    rows, cols = (side * refine for side in maps[0].shape[-2:])
    # The exact transpose of shifting, divided by how often each cell was seen.
    total = maps[0].new_zeros((*maps[0].shape[:-2], rows, cols))
    seen = maps[0].new_zeros((rows, cols))
    for relevance, shift in zip(maps, made, strict=True):
        total += _moved_back(
            relevance.repeat_interleave(refine, -2).repeat_interleave(refine, -1), shift
        )
        seen += _moved_back(torch.ones_like(seen), shift)
    return total / (seen * refine**2)


def _moved_back(cells: Tensor, shift: Shift) -> Tensor:
    """Add each cell (..., rows, cols) to the one that its content came from."""
    for dimension, moved in zip((-2, -1), shift.cells, strict=True):
        if moved:
            origins = _origins(cells, dimension, moved)
            cells = torch.zeros_like(cells).index_add_(dimension, origins, cells)
    return cells


def _origins(content: Tensor, dimension: int, moved: int) -> Tensor:
    """Return where what each place along a dimension shows came from; edges are mirrors."""
    length = content.shape[dimension]
    places = torch.arange(length, device=content.device) - moved
    before = torch.where(places < 0, -1 - places, places)
    return torch.where(before >= length, 2 * length - 1 - before, before)
