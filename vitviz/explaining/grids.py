"""Many maps as one picture, for notebooks and slides; runs no model."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitviz.errors import OptionError, printable
from vitviz.explaining.explanation import Explanation
from vitviz.options import OutputKind, whole
from vitviz.pictures.tables import Cell, ColorBar, picture_table

__all__ = ["Explanations", "grid"]

_PAPER = 255
_SHOWN = 24  # maps, of however many: a notebook keeps its pictures


class Explanations(list[Explanation]):
    """Maps as the functions return them: a list, which shows itself in a notebook."""

    def _repr_png_(self) -> bytes | None:
        """Show the first maps side by side."""
        if not self:
            return None
        buffer = io.BytesIO()
        grid(self[:_SHOWN]).save(buffer, "PNG")
        return buffer.getvalue()


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
    drawn = [_small(each, cell) for each in maps]
    height, width = (max(each.shape[axis] for each in drawn) for axis in (0, 1))
    cells = [
        Cell(picture=_centered(picture, height, width), title=_title(each), bar=_bar(each))
        for each, picture in zip(maps, drawn, strict=True)
    ]
    across = min(columns, len(cells))
    cells += [Cell(picture=_blank(height, width))] * (-len(cells) % across)
    rows = [cells[start : start + across] for start in range(0, len(cells), across)]
    title, models = _all(each.method.name for each in maps), _all(each.model for each in maps)
    return Image.fromarray(picture_table(rows, title=title, subtitle=models))


def _all(names: Iterable[str]) -> str:
    return ", ".join(filter(None, dict.fromkeys(names)))


def _small(explanation: Explanation, side: int) -> NDArray[np.uint8]:
    """Draw a map with this as its longest side, in pixels."""
    drawn = Image.fromarray(explanation.draw(OutputKind.OVERLAY))
    scale = side / max(drawn.size)
    size = (max(round(drawn.width * scale), 1), max(round(drawn.height * scale), 1))
    return np.asarray(drawn.resize(size, Image.Resampling.LANCZOS))


def _centered(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Put a picture in the middle of a blank one."""
    paper = _blank(height, width)
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    paper[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return paper


def _title(explanation: Explanation) -> str:
    return ": ".join(filter(None, (printable(explanation.source.name), explanation.subject)))


def _bar(explanation: Explanation) -> ColorBar | None:
    has_heat = explanation.method.axes[0] != "channels"
    return explanation.color_bar() if has_heat else None


def _blank(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), _PAPER, dtype=np.uint8)
