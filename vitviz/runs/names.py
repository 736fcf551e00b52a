"""What the files of a run are called; opens none of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from vitviz.images.sources import Source
from vitviz.options import OutputKind, PictureFormat

__all__ = ["output_path", "short"]


_NAME_BYTES = 255


def output_path(
    folder: Path,
    source: Source,
    method: str,
    request: str | None,
    kind: OutputKind,
    format: PictureFormat = PictureFormat.PNG,
) -> Path:
    """Return where a map goes: ``OUT/KEY.METHOD[.CLASS][.KIND].png``, ``….jpg`` or ``….npy``."""
    ending = kind.ending(format)
    path = folder / (".".join(filter(None, (source.key, method, request))) + ending)
    return path.with_name(short(path.name))


def short(name: str) -> str:
    """Shorten a name of over 255 bytes; its digest keeps it apart from others."""
    encoded = os.fsencode(name)
    if len(encoded) <= _NAME_BYTES:
        return name
    ending = f"-{hashlib.sha256(encoded).hexdigest()[:12]}{Path(name).suffix}"
    kept = encoded[: _NAME_BYTES - len(ending)]
    while kept and 0x80 <= encoded[len(kept)] < 0xC0:  # never cut inside a character
        kept = kept[:-1]
    return os.fsdecode(kept) + ending
