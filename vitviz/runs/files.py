"""Files: what they are called, what made them, and how they appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitviz.errors import OutputError
from vitviz.explaining.explanation import Diagnostics, Explanation, Prediction
from vitviz.images.sources import Source
from vitviz.options import OutputKind

__all__ = [
    "Provenance",
    "encode",
    "encode_picture",
    "is_whole",
    "obstacle",
    "output_path",
    "prepare_folder",
    "read_provenance",
    "require_own",
    "short",
    "sweep",
    "write_own",
    "write_whole",
]


_PNG_KEY = "vitviz"
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk of every whole PNG
_NAME_BYTES = 255
_PNG_BYTES = 1 << 28  # no picture is larger
_PNG_START = 33  # signature and header, in bytes

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = re.compile(r"\.vitviz-(?P<place>\w+)-(?P<process>\d+)-(?P<start>\w+)-\w+\.tmp")
_START = secrets.token_hex(4)  # of this process: another one had its number before
_FORGOTTEN = 24 * 60 * 60  # seconds; whoever is alive moves a temporary file away in moments


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
        predictions: The image's best classes.
        diagnostics: Numbers that tell when the map may mislead.
        versions: Of vitviz, timm and torch.
    """

    recipe: dict[str, Any]
    source: str
    source_id: str
    class_index: int | None = None
    class_label: str | None = None
    predictions: tuple[Prediction, ...] = ()
    diagnostics: Diagnostics | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def same_source(self, other: Provenance) -> bool:
        """Tell whether two files were made from the same file, or from the same bytes."""
        mine, its = self.recipe.get("source_sha256"), other.recipe.get("source_sha256")
        return self.source_id == other.source_id or mine == its


def output_path(
    folder: Path, source: Source, method: str, request: str | None, kind: OutputKind
) -> Path:
    """Return where a map goes: ``OUT/KEY.METHOD[.CLASS][.KIND].png`` or ``….npy``."""
    parts = [source.key, method]
    parts += [request] if request else []
    parts += [kind.value] if kind in (OutputKind.HEATMAP, OutputKind.PANEL) else []
    path = folder / ".".join([*parts, "npy" if kind is OutputKind.NPY else "png"])
    return path.with_name(short(path.name))


def prepare_folder(folder: Path) -> None:
    """Make the output folder and make sure that it can be written to.

    Raises:
        OutputError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder) as temporary:
            temporary.unlink()
    except OSError as error:
        raise OutputError(
            f"--output {folder} cannot be written to: {error.strerror}; choose another folder"
        ) from error


def encode(explanation: Explanation, kind: OutputKind, provenance: Provenance) -> bytes:
    """Encode a map as the content of a file of this kind, provenance inside.

    A ``.npy`` file holds two arrays: ``numpy.load`` gives the relevance, and a second ``load``
    from the same open file the provenance.
    """
    if kind is not OutputKind.NPY:
        return encode_picture(explanation.draw(kind), provenance)
    buffer = io.BytesIO()
    np.save(buffer, explanation.relevance)
    np.save(buffer, np.array(_text(provenance)))
    return buffer.getvalue()


def encode_picture(pixels: NDArray[np.uint8], provenance: Provenance) -> bytes:
    """Encode a picture (height, width, 3) RGB as PNG, provenance inside."""
    return _png(pixels, _text(provenance))


def read_provenance(path: Path) -> Provenance | None:
    """Read what made a file; None when vitviz did not make it or it is damaged."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return None
        if path.suffix == ".npy":
            text = _npy_text(path)
        elif status.st_size <= _PNG_BYTES:
            text = _png_text(path)
        else:
            return None
        fields = json.loads(text)
        predictions = tuple(Prediction(**entry) for entry in fields.pop("predictions"))
        numbers = fields.pop("sanity", None)
        diagnostics = None if numbers is None else Diagnostics.from_record(numbers)
        provenance = Provenance(**fields, predictions=predictions, diagnostics=diagnostics)
    except Exception:  # a file of somebody else's may be anything
        return None
    return provenance if isinstance(provenance.recipe, dict) else None


def is_whole(path: Path) -> bool:
    """Tell whether a file that vitviz made still has its end; a ``.npy`` names its maker there."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            return path.suffix == ".npy" or file.read() == _PNG_END
    except OSError:
        return False


def write_whole(path: Path, content: bytes, provenance: Provenance) -> None:
    """Put a file in its place in one step, replacing only what vitviz made from this source.

    Raises:
        OutputError: Another file is in the way, or the place cannot be written to.
    """
    _put(path, content, partial(_is_free_for, path, provenance))


def write_own(path: Path, content: bytes, is_own: Callable[[Path], bool]) -> None:
    """Put a file that belongs to no one source in its place, replacing only one of its kind.

    Args:
        path: Where.
        content: What.
        is_own: Tells of a file that is there whether it may be replaced.

    Raises:
        OutputError: Another file is in the way, or the place cannot be written to.
    """
    _put(path, content, partial(require_own, path, is_own))


def require_own(path: Path, is_own: Callable[[Path], bool]) -> bool:
    """Tell whether a name is new.

    Raises:
        OutputError: It is taken by what must not be replaced.
    """
    if not os.path.lexists(path):
        return True
    if not is_own(path):
        raise OutputError(f"{path} is in the way, and vitviz did not make it; choose another name")
    return False


def obstacle(folder: Path, error: OutputError) -> str | None:
    """Tell why no other file could be written either, after one could not; None if it could."""
    if not isinstance(error.__cause__, OSError):  # the file in the way is in the way of no other
        return None
    if error.__cause__.errno in _NO_ROOM:
        return f"no room is left for {folder}; make some, then go on with --skip-existing"
    try:
        prepare_folder(folder)
    except OutputError as trouble:
        return str(trouble)
    return None


def sweep(folders: Iterable[Path]) -> None:
    """Remove the temporary files that killed runs have left in these folders."""
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in folder.glob(".vitviz-*.tmp"):
                if _is_abandoned(path):
                    path.unlink(missing_ok=True)


def _is_free_for(path: Path, provenance: Provenance) -> bool:
    """Tell whether a name is new; raise if it is taken by what must not be replaced."""
    if not os.path.lexists(path):
        return True
    found = read_provenance(path)
    if found is None or not found.same_source(provenance):
        origin = f"was made from {found.source}" if found else "was not made by vitviz"
        raise OutputError(f"{path} is in the way and {origin}; move it or use another --output")
    return False


def _put(path: Path, content: bytes, is_new: Callable[[], bool]) -> None:
    """Write a file in one step where its name is new, or its owner has nothing against it."""
    new = is_new()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path.parent) as temporary:
            temporary.write_bytes(content)
            # A name that was free may be another run's by now: only a link never replaces.
            if not (new and _linked(temporary, path)):
                is_new()
                temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _linked(temporary: Path, path: Path) -> bool:
    """Give a file its final name; False when that is taken, or the file system has no links."""
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        return False
    temporary.unlink()
    return True


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Give the path of a new file of this process, which is gone when its writing fails."""
    owner = f"{_place()}-{os.getpid()}-{_START}"
    path = folder / f".vitviz-{owner}-{secrets.token_hex(8)}.tmp"
    path.touch(exist_ok=False)
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError):  # what failed first is what matters
            path.unlink(missing_ok=True)
        raise


def _is_abandoned(path: Path) -> bool:
    """Tell whether nobody is writing a temporary file any more.

    A file of a dead process is. The process can be asked for only where its number means
    anything, on the same machine and in the same container, and a number may have gone to another
    process since: then age decides. Should a file be taken from its owner after all, as from one
    that slept for a day, then that image fails and says so; nothing half-written appears.
    """
    name = _TEMPORARY.fullmatch(path.name)
    if name is None:
        return False
    if name["place"] == _place() and not _is_alive(int(name["process"]), name["start"]):
        return True
    return time.time() - path.stat().st_mtime > _FORGOTTEN


def _is_alive(process: int, start: str) -> bool:
    """Tell whether there is a process of this number; if it is ours, whether it was ours then."""
    if process == os.getpid():
        return start == _START
    if os.name != "posix":  # where to ask may be to kill
        return True
    try:
        os.kill(process, 0)
        return b") Z " not in Path(f"/proc/{process}/stat").read_bytes()  # a dead one, unburied
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's process, or a system without /proc
        return True


@cache
def _place() -> str:
    """Digest of where a process number means anything: the machine, on Linux the container."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (no path)
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


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


def _text(provenance: Provenance) -> str:
    record = asdict(provenance)
    record.pop("diagnostics")
    found = provenance.diagnostics
    # The order of keys is that of the first version, so that equal recipes give equal bytes.
    versions = record.pop("versions")
    record |= {"sanity": None if found is None else found.to_record(), "versions": versions}
    return json.dumps(record, ensure_ascii=True)


def _png(pixels: NDArray[np.uint8], text: str) -> bytes:
    """Encode (height, width, 3) RGB as PNG with an ASCII text in it.

    OpenCV's settings (zlib level 1 on run lengths) take a tenth of the time of Pillow's default,
    for files an eighth larger.
    """
    _, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    content = encoded.tobytes()
    body = b"tEXt" + f"{_PNG_KEY}\0{text}".encode("ascii")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return content[:_PNG_START] + chunk + content[_PNG_START:]


def _png_text(path: Path) -> str:
    with Image.open(path, formats=["PNG"]) as image:
        return str(image.info[_PNG_KEY])


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
