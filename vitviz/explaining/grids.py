"""Many maps as one picture, for notebooks and slides; runs no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitviz.errors import OptionError, printable
from vitviz.explaining.explanation import Explanation
from vitviz.options import OutputKind, whole
from vitviz.pictures.encoding import png
from vitviz.pictures.tables import Cell, in_rows, picture_table

__all__ = ["Explanations", "grid"]

_PAPER = 255
_SHOWN = 24  # maps, of however many: a notebook keeps its pictures


class Explanations(list[Explanation]):
    """Maps as the functions return them: a list, which shows itself in a notebook."""

    def _repr_png_(self) -> bytes | None:
        """Show the first maps side by side."""
        if not self:
            return None
        return png(grid(self[:_SHOWN]))


def grid(maps: Sequence[Explanation], *, columns: int = 4, cell: int = 280) -> Image.Image:
    """Draw overlays of several maps side by side, each with its image, class, score and colours.

    Args:
        maps: The maps, of one method or of several.
        columns: How many stand side by side.
        cell: Longest side of each, in pixels.

    Raises:
        OptionError: There is no map, or a number is below 1.
    """
    columns, cell = whole("columns", columns), whole("cell", cell)
    if not maps or columns < 1 or cell < 1:
        raise OptionError(
            f"{len(maps)} maps, columns {columns}, cell {cell}; give at least one of each"
        )
    cells = [_cell(each, cell) for each in maps]
    height, width = (max(each.picture.shape[axis] for each in cells) for axis in (0, 1))
    cells = [replace(each, picture=_centered(each.picture, height, width)) for each in cells]
    title = _all(each.method.title for each in maps)
    models = printable(_all(each.model for each in maps))
    return Image.fromarray(picture_table(in_rows(cells, columns), title=title, subtitle=models))


def _all(names: Iterable[str]) -> str:
    return ", ".join(filter(None, dict.fromkeys(names)))


def _cell(explanation: Explanation, side: int) -> Cell:
    """Draw a map with this as its longest side, in pixels, under its image and class."""
    title = (printable(explanation.source.name), explanation.subject)
    drawn = explanation.cell(OutputKind.OVERLAY, ": ".join(filter(None, title)))
    scale = side / max(drawn.picture.shape[:2])
    height, width = (max(round(each * scale), 1) for each in drawn.picture.shape[:2])
    small = Image.fromarray(drawn.picture).resize((width, height), Image.Resampling.LANCZOS)
    return replace(drawn, picture=np.asarray(small))


def _centered(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Put a picture in the middle of a blank one."""
    paper = np.full((height, width, 3), _PAPER, dtype=np.uint8)
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    paper[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return paper
