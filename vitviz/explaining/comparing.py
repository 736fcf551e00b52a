"""Maps of one image by several methods on one sheet; runs the methods one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import tee
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vitviz.explaining.explanation import Caveat, Explanation
from vitviz.explaining.samples import Explained, Failed, explain_samples
from vitviz.methods.comparison import Comparison
from vitviz.models.model import Model
from vitviz.options import OutputKind, PictureOptions
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

    def caveats(self) -> list[Caveat]:
        """Say why one of the maps may mislead; nothing where none need."""
        found = (caveat for _, maps in self.columns for each in maps for caveat in each.caveats())
        return list(dict.fromkeys(found))


def compared(
    model: Model,
    items: Iterable[Explained | Failed | _Passed],
    comparison: Comparison,
    pictures: PictureOptions,
    batch_size: int | None = None,
) -> Iterator[Explained | Failed | _Passed]:
    """Make the maps of all methods of images that the comparison has explained.

    The image is decoded once; each method runs the model for itself, since each needs other things
    of its way.

    Args:
        model: The model; it is left as it was.
        items: What the comparison itself gave; others are passed on.
        comparison: The methods.
        pictures: How they are drawn.
        batch_size: Images run at once; None: chosen by the number of tokens.

    Yields:
        Each image with one map, a ``Sheet``; or what failed, or was passed.

    Raises:
        VitvizError: A method does not fit the model.
    """
    others = [each for each in comparison.columns if each.method is not comparison.own]
    own, *branches = tee(items, len(others) + 1)
    streams = [
        explain_samples(
            *(model, map(_sample, branch), each.method),
            pictures=pictures,
            batch_size=batch_size,
            warn=lambda text: None,  # the comparison itself has told
        )
        for each, branch in zip(others, branches, strict=True)
    ]
    for item, *found in zip(own, *streams, strict=True):
        failed = [each for each in found if isinstance(each, Failed)]
        if not isinstance(item, Explained) or failed:
            yield failed[0] if failed else item
            continue
        maps = {
            other.name: each.maps
            for other, each in zip(others, found, strict=True)
            if isinstance(each, Explained)
        }
        yield replace(item, maps=(_sheet(comparison, item, maps),))


def _sample(item: object) -> object:
    return item.sample if isinstance(item, Explained) else item


def _sheet(
    comparison: Comparison, item: Explained, maps: dict[str, tuple[Explanation, ...]]
) -> Sheet:
    base = item.maps[0]
    return Sheet(
        method=comparison,
        relevance=base.relevance,
        sample=item.sample,
        model=base.model,
        predictions=base.predictions,
        pictures=base.pictures,
        diagnostics=base.diagnostics,
        columns=tuple(
            (each.name, maps.get(each.name, (replace(base, method=each.method),)))
            for each in comparison.columns
        ),
    )


def _explains_class(maps: tuple[Explanation, ...]) -> bool:
    return maps[0].class_index is not None


def _cell(name: str, maps: tuple[Explanation, ...], row: int) -> Cell:
    """Draw the map of a row; below the only one of a method that explains no class, nothing."""
    if row < len(maps):
        return maps[row].cell(OutputKind.OVERLAY, name)
    return Cell(picture=np.full_like(maps[0].sample.picture, 255), title=f"{name}: as above")
