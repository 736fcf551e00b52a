"""What made a file: kept inside pictures and NPY files, and read back; never writes to disk."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitviz.explaining.explanation import Diagnostics, Explanation, Prediction
from vitviz.images.stores import is_url
from vitviz.options import OutputKind, PictureFormat
from vitviz.runs.picture_files import animated, encoded, ends_whole, text_in

__all__ = [
    "JPEG_MARK",
    "Provenance",
    "encode",
    "encode_picture",
    "is_own_jpeg",
    "is_whole",
    "read_provenance",
    "source_id",
]

JPEG_MARK = b"vitviz"
"""How the comment begins of the JPEGs beside a report, which are no images to explain."""

_JPEG_START = 30  # start, JFIF's own segment of 18 and the mark of a comment, in bytes


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made a file; it travels inside the file.

    Attributes:
        recipe: All that decides the file's content: the digest of the source's bytes, model,
            weights, method, options and class request. Equal recipes give equal files.
        source: The source, as the user named it.
        source_id: Digest of the source's absolute path.
        class_index: Which class the map explains.
        class_label: That class's name.
        versus_index: The class that it is compared with.
        versus_label: That class's name.
        predictions: The image's best classes.
        diagnostics: Numbers that tell when the map may mislead.
        versions: Of vitviz, timm and torch.
    """

    recipe: dict[str, Any]
    source: str
    source_id: str
    class_index: int | None = None
    class_label: str | None = None
    versus_index: int | None = None
    versus_label: str | None = None
    predictions: tuple[Prediction, ...] = ()
    diagnostics: Diagnostics | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def same_source(self, other: Provenance) -> bool:
        """Tell whether two files were made from the same file, or from the same bytes."""
        mine, its = self.recipe.get("source_sha256"), other.recipe.get("source_sha256")
        return self.source_id == other.source_id or mine == its


def encode(explanation: Explanation, kind: OutputKind, provenance: Provenance) -> bytes:
    """Encode a map as the content of a file of this kind, provenance inside.

    A ``.npy`` file holds two arrays: ``numpy.load`` gives the relevance, and a second ``load``
    from the same open file the provenance.

    Raises:
        OutputError: The format of pictures cannot hold it.
    """
    if kind is not OutputKind.NPY:
        format = kind.stored_as(explanation.pictures.format)
        if explanation.is_animated:
            return animated(explanation.animation(kind), _text(provenance), format)
        return encode_picture(explanation.draw(kind), provenance, format)
    buffer = io.BytesIO()
    np.save(buffer, explanation.relevance)
    np.save(buffer, np.array(_text(provenance)))
    return buffer.getvalue()


def encode_picture(
    pixels: NDArray[np.uint8],
    provenance: Provenance,
    format: PictureFormat = PictureFormat.PNG,
) -> bytes:
    """Encode a picture (height, width, 3) RGB or (height, width), provenance inside."""
    return encoded(pixels, _text(provenance), format)


def read_provenance(path: Path) -> Provenance | None:
    """Read what made a file; None when vitviz did not make it or it is damaged."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return None
        fields = json.loads(_npy_text(path) if path.suffix == ".npy" else text_in(path))
        predictions = tuple(Prediction(**entry) for entry in fields.pop("predictions"))
        numbers = fields.pop("sanity", None)
        diagnostics = None if numbers is None else Diagnostics.from_record(numbers)
        provenance = Provenance(**fields, predictions=predictions, diagnostics=diagnostics)
    except Exception:  # a file of somebody else's may be anything
        return None
    return provenance if isinstance(provenance.recipe, dict) else None


def source_id(name: str) -> str:
    """Return the digest of an image's address or absolute path."""
    absolute = os.fsencode(name if is_url(name) else Path(name).absolute())
    return hashlib.sha256(absolute).hexdigest()[:16]


def is_own_jpeg(path: Path) -> bool:
    """Tell whether a file is a JPEG beside a report."""
    if path.suffix != ".jpg" or not path.is_file():  # to open a pipe is to wait for its writer
        return False
    try:
        with path.open("rb") as file:
            start = file.read(_JPEG_START)
    except OSError:
        return False
    return start.startswith(b"\xff\xd8") and JPEG_MARK in start


def is_whole(path: Path) -> bool:
    """Tell whether a file that vitviz made still has its end; a ``.npy`` names its maker there."""
    try:
        return bool(path.stat().st_size) if path.suffix == ".npy" else ends_whole(path)
    except OSError:
        return False


def _text(provenance: Provenance) -> str:
    record = asdict(provenance)
    record.pop("diagnostics")
    found = provenance.diagnostics
    # The order of keys is that of the first version, so that equal recipes give equal bytes.
    versions = record.pop("versions")
    if provenance.versus_index is None:
        del record["versus_index"], record["versus_label"]
    record |= {"sanity": None if found is None else found.to_record(), "versions": versions}
    return json.dumps(record, ensure_ascii=True)


def _npy_text(path: Path) -> str:
    """Read the second array; the first one, which may be large, is passed over."""
    layout = np.lib.format
    with path.open("rb") as file:
        read_header = {
            (1, 0): layout.read_array_header_1_0,
            (2, 0): layout.read_array_header_2_0,
        }[layout.read_magic(file)]
        shape, _, kind = read_header(file)
        file.seek(math.prod(shape) * kind.itemsize, os.SEEK_CUR)
        return str(np.load(file, allow_pickle=False))
