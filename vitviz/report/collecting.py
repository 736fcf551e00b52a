"""A folder of maps → what the page shows of it, from provenance alone; runs no model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from vitviz.errors import VitvizError
from vitviz.explaining.explanation import Explanation
from vitviz.images.decoding import read_file
from vitviz.images.fitting import InputTransform
from vitviz.images.samples import ImageSample, load_sample
from vitviz.images.sources import Source
from vitviz.methods.table import METHODS
from vitviz.options import Fit, PictureOptions, ValueRange
from vitviz.report.failures import Failure, read_failures
from vitviz.report.files import FILES, Picture, picture_mark, put_picture
from vitviz.report.maps import StoredMap, is_animated, map_id, put_map, read_map, stored_map
from vitviz.report.rows import Row, own_tables, rows_in
from vitviz.runs.provenance import Provenance, is_whole, read_provenance

__all__ = ["FoundImage", "FoundMap", "address", "find_images"]

_SUFFIXES = (".png", ".npy", ".jpg", ".webp", ".gif")
_ANY_FILTER = Image.Resampling.NEAREST  # where what the model sees is of no use
_PICTURES = ("overlay", "heatmap", "panel", "gray")  # what stands for a map, best first


@dataclass(kw_only=True)
class FoundMap:
    """A map of an image.

    Attributes:
        name: Of its script.
        provenance: What made its files.
        files: Where these are, by kind.
        stored: What the page draws; None: it shows a picture as it is.
        row: Of a table, which has no file.
    """

    name: str
    provenance: Provenance
    files: dict[str, Path] = field(default_factory=dict)
    stored: StoredMap | None = None
    row: Row | None = None

    @property
    def time(self) -> float:
        """When it was written, in seconds since 1970."""
        times = [path.stat().st_mtime for path in self.files.values()]
        return max([*times, *([self.row.time] if self.row else [])])

    @property
    def picture(self) -> Path | None:
        """The file that stands for the map where the page cannot draw it."""
        return next((self.files[kind] for kind in _PICTURES if kind in self.files), None)

    @property
    def caveats(self) -> tuple[tuple[str, str], ...]:
        """What may mislead, and why."""
        if self.stored is not None:
            return self.stored.caveats
        numbers = self.provenance.diagnostics
        return () if numbers is None else tuple(each.value for each in numbers.caveats())


@dataclass(kw_only=True)
class FoundImage:
    """An image with all its maps.

    Attributes:
        source_id: Digest of its path.
        maps: In the order of their files' names.
        size: (height, width) of the kept picture; None where there is none.
        is_original: Whether that is the image, not one of its maps.
    """

    source_id: str
    maps: list[FoundMap] = field(default_factory=list)
    size: tuple[int, int] | None = None
    is_original: bool = True

    @property
    def provenance(self) -> Provenance:
        """What made its last map, which knows the image as it is now."""
        return self.maps[-1].provenance


def find_images(folder: Path, table: Path | None) -> tuple[list[FoundImage], list[Failure]]:
    """Find the images whose maps are in a folder, and complete what the page needs of them.

    Those that have files come first, in the order of their names, then those of tables, likewise.
    Also return what failed in the last runs, and has no newer map.

    What a run with a report has kept is taken as it is. Else the numbers are read from ``.npy``
    files and the original from where it was, if it still has the same bytes; what is then lacking
    is shown as the picture that there is. Rows of tables stand in where there is no file.

    Args:
        folder: Of the page.
        table: A table outside of it; None: those that are in it.

    Raises:
        OutputError: What is completed cannot be written, or a table cannot be read.
    """
    images: dict[str, FoundImage] = {}
    failures = read_failures(folder)
    for path, provenance in _made_here(folder):
        _map_of(images, provenance).files[str(provenance.recipe.get("kind"))] = path
    with_files = len(images)
    for row in (row for table in _tables(folder, table) for row in rows_in(table)):
        if row.failure is not None:
            failures.append(row.failure)
        elif not (known := _map_of(images, row.provenance)).files:
            known.row, known.provenance = row, row.provenance
    found = list(images.values())
    # Rows are in the order in which images were done, which is another in each run.
    found[with_files:] = sorted(found[with_files:], key=lambda image: image.provenance.source)
    for image in found:
        _complete(folder, image)
    return found, _not_mended(failures, found)


def _map_of(images: dict[str, FoundImage], provenance: Provenance) -> FoundMap:
    """Return the map that a file or a row is of, a new one if it is the first."""
    image = images.setdefault(provenance.source_id, FoundImage(source_id=provenance.source_id))
    name = map_id(provenance)
    known = next((each for each in image.maps if each.name == name), None)
    if known is None:
        known = FoundMap(name=name, provenance=provenance)
        image.maps.append(known)
    return known


def _not_mended(failures: list[Failure], images: Iterable[FoundImage]) -> list[Failure]:
    """Return what failed, and has no newer map."""
    made = {
        (image.source_id, each.provenance.recipe.get("method")): each.time
        for image in images
        for each in image.maps
    }
    return [each for each in failures if made.get((each.source_id, each.method), 0) < each.time]


def address(folder: Path, path: Path) -> str:
    """Return the address of a file as the page names it, byte for byte."""
    return quote(os.fsencode(path.relative_to(folder)))


def _made_here(folder: Path) -> Iterator[tuple[Path, Provenance]]:
    """Yield the whole files that vitviz made in a folder, with what made them, by name."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if each != FILES)
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix in _SUFFIXES and (found := read_provenance(path)) and is_whole(path):
                yield path, found


def _tables(folder: Path, table: Path | None) -> list[Path]:
    """Return the tables to read."""
    return own_tables(folder) if table is None else [table]


def _complete(folder: Path, image: FoundImage) -> None:
    """Find what the page draws of an image."""
    for each in image.maps:
        stored = read_map(folder, each.name)
        if stored is not None and stored.made_with(each.provenance.recipe):
            each.stored = stored
    if not _has_picture(folder, image) or any(_lacks_numbers(each) for each in image.maps):
        sample = _original(image.provenance)
        if sample is not None:
            put_picture(folder, image.source_id, sample.picture, sample.digest)
        for each in filter(_lacks_numbers, image.maps):
            each.stored = _with_numbers(folder, each, sample)
    if not _has_picture(folder, image):
        _take_a_map(folder, image)


def _lacks_numbers(found: FoundMap) -> bool:
    in_row = found.row is not None and found.row.relevance is not None
    return found.stored is None and ("npy" in found.files or in_row)


def _has_picture(folder: Path, image: FoundImage) -> bool:
    """Find the kept picture, if it is of the image's bytes."""
    names, digest = Picture(image.source_id), image.provenance.recipe.get("source_sha256")
    words = (picture_mark(folder / FILES / names.picture) or "").split()
    if words[:1] not in ([digest], [f"map-{digest}"]) or len(words) != 3:
        return False
    image.size = int(words[1]), int(words[2])
    image.is_original = words[0] == digest
    return True


def _original(provenance: Provenance) -> ImageSample | None:
    """Read the image again, if it is where it was and has the same bytes."""
    recipe = provenance.recipe
    try:
        file = read_file(Source(path=Path(provenance.source), key=""))
        if file.digest != recipe["source_sha256"]:
            return None
        longest = recipe["options"].get("max_size", PictureOptions().max_size)
        return load_sample(file, _transform(recipe), longest)
    except (VitvizError, MemoryError, KeyError, TypeError, ValueError):
        return None  # it is gone, or the file was made by another version


def _transform(recipe: dict[str, Any]) -> InputTransform:
    """Return how the image was brought to the model."""
    expected = recipe.get("preprocessing")
    if expected is None:  # a row, which says itself what the model saw
        values = ValueRange.ensure(recipe["options"].get("value_range"))
        every = InputTransform(
            fit=Fit.SQUASH, size=(1, 1), patch=(1, 1), resample=_ANY_FILTER, crop_pct=1
        )
        return replace(every, values=values)
    return InputTransform(
        fit=Fit(recipe["fit"]),
        size=tuple(expected["size"]),
        patch=tuple(expected["patch"]),
        resample=Image.Resampling[expected["interpolation"].upper()],
        crop_pct=expected["crop_pct"],
        values=ValueRange.ensure(recipe["value_range"]),
    )


def _with_numbers(folder: Path, found: FoundMap, sample: ImageSample | None) -> StoredMap | None:
    """Keep the numbers of a file or a row for the page, as a run with a report does."""
    provenance, row = found.provenance, found.row
    method = METHODS.get(str(provenance.recipe.get("method")))
    if method is None or is_animated(provenance):  # features have no colours of their own
        return None
    if row is not None:
        sample = replace(sample or _unseen(row), region=row.region)
    if sample is None:
        return None
    try:
        relevance = row.relevance if row else np.load(found.files["npy"], allow_pickle=False)
        score: dict[int | None, float] = {
            each.class_index: each.score for each in provenance.predictions
        }
        explanation = Explanation(
            method=method(),
            relevance=np.asarray(relevance, dtype=np.float32),
            sample=sample,
            class_index=provenance.class_index,
            versus_index=provenance.versus_index,
            class_score=score.get(provenance.class_index),
            versus_score=score.get(provenance.versus_index),
            diagnostics=provenance.diagnostics,
        )
        own = read_provenance(found.files["npy"]) if row is None else None
        stored = stored_map(explanation, (own or provenance).recipe)
    except (OSError, ValueError, TypeError):
        return None
    put_map(folder, found.name, stored)
    return stored


def _unseen(row: Row) -> ImageSample:
    """Stand in for an image that is gone; its size is all that is known."""
    black = np.broadcast_to(np.uint8(0), (*row.size, 3))
    return ImageSample(
        source=Source(path=Path(row.provenance.source), key=""),
        digest=str(row.provenance.recipe["source_sha256"]),
        pixels=black,
        region=row.region,
        picture=black,
        size=row.size,
    )


def _take_a_map(folder: Path, image: FoundImage) -> None:
    """Keep a thumbnail of a map where the original is gone."""
    shown = next((each.picture for each in image.maps if each.picture), None)
    if shown is None:
        return
    try:
        with Image.open(shown, formats=["PNG", "JPEG", "WEBP", "GIF"]) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, ValueError):
        return
    digest = f"map-{image.provenance.recipe.get('source_sha256')}"
    put_picture(folder, image.source_id, pixels, digest)
    _has_picture(folder, image)
