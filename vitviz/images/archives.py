"""Images inside tar and Parquet files, which are read where they lie; unpacks nothing to disk."""

from __future__ import annotations

import tarfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from vitviz.errors import ImageError, SourceError, first_line
from vitviz.images.stores import Origin, StoredObject, patiently, safe_key, stored_file

__all__ = ["ARCHIVES", "members"]

ARCHIVES = frozenset((".parquet", ".tar"))
"""Endings of files that hold images."""

_Member = tuple[Origin, str]
_HELD, _HELD_BYTES = 2, 1 << 28  # row groups in memory: more only where they are small


@dataclass(frozen=True)
class TarMember:
    """A file in a tar file.

    Attributes:
        archive: The tar file.
        name: The member's name in it.
        start: Where its bytes begin.
        size: How many they are.
    """

    archive: StoredObject
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        """Return the names of both."""
        return f"{self.archive}/{self.name}"

    def read(self) -> bytes:
        """Return its bytes."""
        return self.archive.read_part(self.start, self.size) if self.size else b""


@dataclass(frozen=True)
class ParquetCell:
    """The bytes of an image in a row of a Parquet file.

    Attributes:
        archive: The Parquet file.
        column: The column.
        group: The row group.
        row: Counted from the beginning of the row group.
        name: What it is called.
        listing: Which reading of the file's structure it comes from.
    """

    archive: StoredObject
    column: str
    group: int
    row: int
    name: str
    listing: int

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    def read(self) -> bytes:
        """Return the bytes."""
        value = _GROUPS.get(self)[self.row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise ImageError("has no bytes in this row")
        return bytes(content)


@dataclass(frozen=True)
class Unreadable:
    """A part of an archive that cannot be read, so that what is missing is told.

    Attributes:
        name: What it is called.
        error: Why not.
    """

    name: str
    error: str

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    def read(self) -> bytes:
        """Raise an ``ImageError`` that says why."""
        raise ImageError(self.error)


def members(archive: StoredObject, key: str, suffixes: frozenset[str]) -> Iterator[_Member]:
    """Yield the images of an archive in their order, each with its key.

    Args:
        archive: A tar file or a Parquet file.
        key: Of the archive.
        suffixes: Which members of a tar file are images.

    Raises:
        SourceError: A Parquet file has no column of images, or pyarrow is missing.
    """
    if archive.suffix == ".tar":
        yield from _of_tar(archive, key, suffixes)
    else:
        yield from _of_parquet(archive, key)


def _of_tar(archive: StoredObject, key: str, suffixes: frozenset[str]) -> Iterator[_Member]:
    """Yield the image files of a tar file; links, devices and all else are passed over."""
    seen: Counter[str] = Counter()
    try:
        with stored_file(archive.url) as file, _opened(file) as tar:
            for info in tar:
                if info.isreg() and PurePosixPath(info.name).suffix.lower() in suffixes:
                    yield _member(archive, key, info, seen)
                tar.members = []  # type: ignore[attr-defined]  # else they pile up
    except SourceError:
        raise
    except Exception as error:  # a damaged archive, or a store that does not answer
        said = f"cannot be read after {seen.total()} images: {first_line(error)}"
        yield Unreadable(str(archive), said), key


class _StrictTarInfo(tarfile.TarInfo):
    """A header that is damaged or missing is an error; Python's own takes it for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        """Read the next header."""
        try:
            return super().fromtarfile(tarfile)
        except _END:
            raise
        except _BAD_HEADER as error:
            raise ValueError(f"damaged at byte {tarfile.offset:,}: {error}") from error


_END, _BAD_HEADER = tarfile.EOFHeaderError, tarfile.HeaderError  # type: ignore[attr-defined]


def _opened(file: BinaryIO) -> tarfile.TarFile:
    mode: Any = "r:" if file.seekable() else "r|"
    return tarfile.open(fileobj=file, mode=mode, tarinfo=_StrictTarInfo)


def _member(archive: StoredObject, key: str, info: tarfile.TarInfo, seen: Counter[str]) -> _Member:
    own = f"{key}/{safe_key(info.name)}"
    seen[own] += 1
    if (times := seen[own]) > 1:  # unpacking would overwrite the first one
        name = f"{archive}/{info.name} ({times})"
        return Unreadable(name, "has the name of another image in its archive"), f"{own}.{times}"
    if info.issparse():
        return Unreadable(f"{archive}/{info.name}", "is stored with holes, as no image is"), own
    return TarMember(archive, info.name, info.offset_data, info.size), own


def _of_parquet(archive: StoredObject, key: str) -> Iterator[_Member]:
    """Yield the images of a Parquet file, whose keys are the numbers of their rows."""
    if find_spec("pyarrow") is None:
        raise SourceError(
            f"{archive} is Parquet, which needs pyarrow; try pip install 'vitviz[parquet]'"
        )
    from pyarrow import parquet

    try:
        with stored_file(archive.url) as file, parquet.ParquetFile(file) as table:
            column = _image_column(archive, table.schema_arrow)
            groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    except SourceError:
        raise
    except Exception as error:
        yield Unreadable(str(archive), f"cannot be read: {first_line(error)}"), key
        return
    listing, number = next(_LISTINGS), 0
    for group, rows in enumerate(groups):
        for row in range(rows):
            name = f"{number:07}"
            cell = ParquetCell(archive, column, group, row, f"{archive}/{name}", listing)
            yield cell, f"{key}/{name}"
            number += 1


def _image_column(archive: StoredObject, schema: Any) -> str:
    """Return the column of images: bytes, or as in the datasets of Hugging Face."""
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    names = [str(each.name) for each in schema if holds_bytes(each.type)]
    if len(names) > 1 and "image" in names:
        names = ["image"]
    if len(names) != 1:
        found = f"columns of bytes: {', '.join(names)}" if names else "no column of bytes"
        raise SourceError(f"{archive} has {found}; expected one, or one called image")
    return names[0]


class _RowGroups:
    """The row groups that are being read, a few at a time, for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def get(self, cell: ParquetCell) -> Any:
        """Return the column and row group that a cell is in."""
        wanted = cell.listing, cell.group
        with self._lock:  # whoever comes meanwhile most likely wants the same
            if wanted not in self._held:
                while len(self._held) >= _HELD and self._size > _HELD_BYTES:
                    self._held.popitem(last=False)
                self._held[wanted] = patiently(lambda: _read_group(cell))
            self._held.move_to_end(wanted)
            return self._held[wanted]

    @property
    def _size(self) -> int:
        return sum(each.nbytes for each in self._held.values())


_GROUPS, _LISTINGS = _RowGroups(), count()


def _read_group(cell: ParquetCell) -> Any:
    from pyarrow import parquet

    with stored_file(cell.archive.url) as file, parquet.ParquetFile(file) as table:
        return table.read_row_group(cell.group, columns=[cell.column])[cell.column]
