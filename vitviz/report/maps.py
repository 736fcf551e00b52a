"""One map as the page draws it: small numbers in a script of its own; never a picture of it."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitviz.explaining.explanation import Explanation
from vitviz.options import Outliers
from vitviz.pictures.heat import in_unit
from vitviz.report.files import FILES, SCRIPT_START, is_own, put
from vitviz.runs.provenance import Provenance

__all__ = ["StoredMap", "is_animated", "is_drawn", "map_id", "put_map", "read_map", "stored_map"]

_LEVELS = 65535  # of a map between its least and its most
_BETWEEN = ("blocks", "heads")  # axes that the page can choose on


@dataclass(frozen=True, kw_only=True)
class StoredMap:
    """What the page needs to draw a map.

    Attributes:
        recipe: What decides the relevance; that of its PNG has more of pictures.
        shape: (rows, cols), or (blocks, heads, rows, cols).
        ranges: Least and most of each (rows, cols), in the unit.
        values: Base64 of uint16, little-endian: 0 is the least of its (rows, cols), 65535 the most.
        region: Left, top, right and bottom of what the model saw, in shares of the image.
        size: (height, width) of the PNG.
        is_signed: Whether 0 has a meaning.
        extent: What is drawn coldest and hottest; twice the same where there is no heat; None:
            the least and the most of each (rows, cols).
        patches: (rows, cols) of the patches, of which a map may have several cells each.
        outliers: (row, column) of the patches whose tokens are of outlying norm, where pictures
            treat these differently from others.
        is_muted: Whether outliers are left out of the range of the colours, and framed only where
            they are beyond it.
        unit: What the numbers count.
        colormap: The PNG's.
        alpha: Of the PNG.
        score: Of the class.
        versus_score: Of the class that it is compared with.
        caveats: What may mislead, and why.
    """

    recipe: dict[str, Any]
    shape: tuple[int, ...]
    ranges: tuple[tuple[float, float], ...]
    values: str
    region: tuple[float, float, float, float]
    size: tuple[int, int]
    is_signed: bool
    extent: tuple[float, float] | None
    patches: tuple[int, int]
    outliers: tuple[tuple[int, int], ...]
    is_muted: bool
    unit: str
    colormap: str
    alpha: float
    score: float | None = None
    versus_score: float | None = None
    caveats: tuple[tuple[str, str], ...] = ()

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most that colours must tell apart."""
        if self.extent is not None and self.extent[0] < self.extent[1]:
            return self.extent
        lows, highs = zip(*self.ranges, strict=True)
        return min(lows), max(highs)

    def made_with(self, recipe: dict[str, Any]) -> bool:
        """Tell whether a file of this recipe shows this map."""
        mine, its = dict(self.recipe), dict(recipe)
        options, others = mine.pop("options"), its.pop("options", {})
        for each in (mine, its):
            each.pop("kind", None)
        return mine == its and options.items() <= others.items()


def map_id(provenance: Provenance) -> str:
    """Return what names the map of a file: one for an image, method and class request.

    An animation is another map than the still one.
    """
    recipe = provenance.recipe
    parts = [provenance.source_id, recipe.get("method"), recipe.get("class")]
    if is_animated(provenance):
        parts.append(recipe["options"]["animate"])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def is_animated(provenance: Provenance) -> bool:
    """Tell whether a file is of an animation, which shows itself."""
    return bool(provenance.recipe.get("options", {}).get("animate"))


def is_drawn(explanation: Explanation) -> bool:
    """Tell whether the page can draw a map itself: features have no colours of their own.

    A sheet of several maps draws itself.
    """
    is_one = type(explanation) is Explanation
    return is_one and all(axis in _BETWEEN for axis in explanation.method.axes[:-2])


def stored_map(explanation: Explanation, recipe: dict[str, Any]) -> StoredMap:
    """Bring a map to the numbers that the page draws.

    Args:
        explanation: One that ``is_drawn``.
        recipe: Of its relevance.
    """
    relevance, region = explanation.relevance, explanation.sample.region
    method = explanation.method
    slices = relevance.reshape(-1, *relevance.shape[-2:])
    ranges, levels = _quantised(np.stack([in_unit(each, method.unit) for each in slices]))
    return StoredMap(
        recipe=recipe,
        shape=relevance.shape,
        ranges=ranges,
        values=base64.b64encode(levels.tobytes()).decode("ascii"),
        region=(region.left, region.top, region.right, region.bottom),
        size=(explanation.sample.picture.shape[0], explanation.sample.picture.shape[1]),
        is_signed=method.is_signed,
        extent=_extent(explanation),
        **_outliers(explanation),
        unit=method.unit.value,
        colormap=explanation.pictures.table(method.colormap).value,
        alpha=explanation.pictures.alpha,
        score=explanation.class_score,
        versus_score=explanation.versus_score,
        caveats=tuple(each.value for each in explanation.caveats()),
    )


def put_map(folder: Path, name: str, stored: StoredMap) -> None:
    """Write a map where the page finds it: as a script, since a page from disk reads nothing else.

    Raises:
        OutputError: It cannot be written.
    """
    text = json.dumps(asdict(stored), separators=(",", ":"), allow_nan=False)
    put(folder / FILES, f"{name}.js", SCRIPT_START + f'"{name}",{text})\n'.encode("ascii"))


def read_map(folder: Path, name: str) -> StoredMap | None:
    """Read a map; None where it is not there or damaged."""
    path = folder / FILES / f"{name}.js"
    if not is_own(path):
        return None
    try:
        text = path.read_text(encoding="ascii").partition(",")[2].rstrip()
        return StoredMap(**json.loads(text.removesuffix(")")))
    except (OSError, ValueError, TypeError):
        return None


def _extent(explanation: Explanation) -> tuple[float, float] | None:
    """Return what the PNG draws coldest and hottest; of heads, each has its own."""
    found = explanation.color_range
    return found if len(explanation.method.axes) > 2 else found or (0.0, 0.0)


def _outliers(explanation: Explanation) -> dict[str, Any]:
    """Return which patches pictures treat differently from others."""
    found, policy = explanation.outliers, explanation.pictures.outliers
    if found is None or not found.any() or policy is Outliers.SHOW:
        return {"patches": (1, 1), "outliers": (), "is_muted": False}
    return {
        "patches": found.shape,
        "outliers": tuple((int(row), int(col)) for row, col in np.argwhere(found)),
        "is_muted": policy is Outliers.MUTE,
    }


def _quantised(
    slices: NDArray[np.float32],
) -> tuple[tuple[tuple[float, float], ...], NDArray[np.uint16]]:
    """Return the least and the most of each of (slices, rows, cols), and levels between these."""
    values = slices.astype(np.float64)
    low, high = values.min(axis=(1, 2)), values.max(axis=(1, 2))
    extent = np.where(high > low, high - low, 1)
    levels = np.rint((values - low[:, None, None]) / extent[:, None, None] * _LEVELS)
    pairs = zip(low.tolist(), high.tolist(), strict=True)
    return tuple(pairs), levels.astype("<u2")
