"""Maps of one image by several methods on one sheet; runs no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vitviz.explaining.explanation import Caveat, Explanation
from vitviz.explaining.samples import Explained, Failed
from vitviz.methods.comparison import Comparison
from vitviz.options import OutputKind
from vitviz.pictures.tables import Cell, picture_table

__all__ = ["Sheet", "compared"]

_Passed = TypeVar("_Passed")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Sheet(Explanation):
    """Several methods' maps of one image; it draws them as one picture.

    Attributes:
        columns: Of each method its name and its maps, one for each class, or one for all.
    """

    columns: tuple[tuple[str, tuple[Explanation, ...]], ...]

    def draw(self, kind: OutputKind) -> NDArray[np.uint8]:
        """Draw the sheet, whatever the kind: (height, width, 3) RGB."""
        rows = [
            [Cell(picture=self.sample.picture, title="image")]
            + [_cell(name, maps, row) for name, maps in self.columns]
            for row in range(max(len(maps) for _, maps in self.columns))
        ]
        most = max((maps for _, maps in self.columns), key=_explains_class)
        names = [each.subject for each in most] if _explains_class(most) else []
        source, _, model = self.origin.partition(" · ")
        return picture_table(rows, title=source, subtitle=model, names=names)

    @property
    def _has_heat(self) -> bool:
        """Each of its maps has a colour bar on the sheet; there is none for all."""
        return False

    def caveats(self) -> list[Caveat]:
        """Say why one of the maps may mislead; nothing where none need."""
        found = (caveat for _, maps in self.columns for each in maps for caveat in each.caveats())
        return list(dict.fromkeys(found))


def compared(
    items: Iterable[Explained | Failed | _Passed], comparison: Comparison
) -> Iterator[Explained | Failed | _Passed]:
    """Put the maps of each image on a sheet.

    Args:
        items: What a comparison gave; what is not explained is passed on.
        comparison: The methods.

    Yields:
        Each image with one map, a ``Sheet``; or what failed, or was passed.
    """
    for item in items:
        if isinstance(item, Explained):
            item = replace(item, maps=(_sheet(comparison, item),))
        yield item


def _sheet(comparison: Comparison, item: Explained) -> Sheet:
    columns = [
        (each.name, tuple(one for one in item.maps if one.method == each.method))
        for each in comparison.columns
    ]
    # A record has room for one map's numbers: those of a method that explains no class, if there
    # is one, else those of the first column's first class.
    base, *_ = min((maps for _, maps in columns), key=_explains_class)
    return Sheet(
        method=comparison,
        relevance=base.relevance,
        sample=item.sample,
        model=base.model,
        predictions=base.predictions,
        pictures=base.pictures,
        diagnostics=base.diagnostics,
        columns=tuple(columns),
    )


def _explains_class(maps: tuple[Explanation, ...]) -> bool:
    return maps[0].class_index is not None


def _cell(name: str, maps: tuple[Explanation, ...], row: int) -> Cell:
    """Draw the map of a row; below the only one of a method that explains no class, nothing."""
    if row < len(maps):
        return maps[row].cell(OutputKind.OVERLAY, name)
    return Cell(picture=np.full_like(maps[0].sample.picture, 255), title=f"{name}: as above")
