"""A folder of Parquet files with a row for each map, which grows as a run goes; runs no model.

Parquet has its table of contents at its end: of a file that is being written, nothing can be read.
So a run writes parts of a data set, each of them whole or not at all.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitviz.errors import OutputError, first_line
from vitviz.runs.writing import prepare_folder, sweep, write_own

__all__ = ["BlockTable", "RecordsTable", "is_own", "part_name", "read_whole", "require_own"]

Row = dict[str, Any]
_Place = tuple[str, str | None, bool]  # an image's key, its class request, whether it failed

_GROUP_ROWS, _GROUP_VALUES = 1024, 1 << 22  # of a row group, which is one write
_PART_BYTES = 1 << 26
_PART_SECONDS = 60.0  # of work that a kill may cost
_MARK = b"vitviz"  # in the metadata of each part


class RecordsTable:
    """The rows of a run, and those of earlier runs that are there.

    A row stands in the place of an image's key, method and class request. A new row replaces the
    one in its place; rows of failures are replaced by any new row of their image.
    """

    def __init__(self, folder: Path, method: str, keys: Collection[str]) -> None:
        """Read which rows of these images are there.

        Args:
            folder: Where the parts of the table are; it is made.
            method: The word of the method.
            keys: Of the run's images, as rows spell them.

        Raises:
            OutputError: It cannot be written to, or holds what vitviz did not write.
        """
        self._folder = folder
        self._lock = threading.Lock()
        self._part: _Part | None = None
        self._there: dict[_Place, tuple[str, Path]] = {}
        self._replaced: dict[Path, set[_Place]] = defaultdict(set)
        self._method = method
        prepare_folder(folder, "--records")
        sweep([folder])
        for part in sorted(folder.glob("*.parquet")):
            require_own(part)
            for place, recipe in _places(part, method):
                if place[0] in keys:
                    self._replace(place)
                    self._there[place] = recipe, part

    def has(self, key: str, request: str | None, recipe: str) -> bool:
        """Tell whether a map's row is there, made by this recipe."""
        return self._there.get((key, request, False), ("",))[0] == recipe

    def recipe(self, key: str, request: str | None) -> str | None:
        """Return by which recipe a map's row was made; None where it is not there."""
        return self._there.get((key, request, False), (None,))[0]

    def replaced(self, key: str, requests: Iterable[str | None], *, failed: bool) -> None:
        """Note that rows of an image are there that another process has written.

        Args:
            key: The image's.
            requests: Of its maps.
            failed: Whether it is one row, which says why there is no map.
        """
        with self._lock:
            for request in () if failed else requests:
                self._replace((key, request, False))
            self._replace((key, None, True))

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows; from any thread.

        Raises:
            OutputError: They cannot be written.
        """
        with self._lock:
            self._part = self._part or _Part(schema())
            self._part.add(rows)
            if self._part.age > _PART_SECONDS or self._part.size > _PART_BYTES:
                self._finish_part()

    def close(self) -> None:
        """Write what is left, then take out the rows that have been replaced.

        Raises:
            OutputError: It cannot be written.
        """
        with self._lock:
            self._finish_part()
            for part, places in self._replaced.items():
                _remove(part, self._method, places)

    def _finish_part(self) -> None:
        part, self._part = self._part, None
        if part and (content := part.finish()):
            name = part_name(time.time_ns(), secrets.token_hex(4))
            write_own(self._folder / name, content, lambda path: False)
            for place in part.places:  # only now: until then, old rows are all there are
                self._replace(place)
                self._replace((place[0], None, True))

    def _replace(self, place: _Place) -> None:
        """Note that a row that is there is to go."""
        if place in self._there:
            _, part = self._there.pop(place)
            self._replaced[part].add(place)


class BlockTable:
    """The rows of some images of a run, for the process that works on these: one part of a table.

    A process that works on them once more, because the first one died or was taken for dead, writes
    the same part: no row is there twice.
    """

    def __init__(self, path: Path, recipes: Mapping[tuple[str, str | None], str]) -> None:
        """Begin with no row.

        Args:
            path: Of the part.
            recipes: By which recipe the rows were made that are there already, by key and request.
        """
        self._path, self._recipes = path, recipes
        self._lock = threading.Lock()
        self._part = _Part(schema())

    def has(self, key: str, request: str | None, recipe: str) -> bool:
        """Tell whether a map's row is there, made by this recipe."""
        return self._recipes.get((key, request)) == recipe

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows; from any thread."""
        with self._lock:
            self._part.add(rows)

    def close(self) -> None:
        """Write the part, if there is a row.

        Raises:
            OutputError: It cannot be written.
        """
        if content := self._part.finish():
            write_own(self._path, content, lambda path: True)


def part_name(nanoseconds: int, token: str) -> str:
    """Return the name of a part; in the order of their names, what is newer comes later."""
    return f"part-{nanoseconds:020}-{token}.parquet"


class _Part:
    """One file of a table, in memory until it is whole."""

    def __init__(self, schema: Any) -> None:
        import pyarrow
        from pyarrow import parquet

        self._begun = time.monotonic()
        self._sink = pyarrow.BufferOutputStream()
        self._schema = schema
        self._writer = parquet.ParquetWriter(self._sink, schema, compression="zstd")
        self._waiting: list[Row] = []
        self._rows = 0
        self.places: list[_Place] = []

    @property
    def age(self) -> float:
        """Seconds since it was begun."""
        return time.monotonic() - self._begun

    @property
    def size(self) -> int:
        """Bytes of the row groups so far."""
        return int(self._sink.tell()) if self._rows else 0

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, which are written a row group at a time."""
        self._waiting += rows
        values = sum(len(row.get("relevance", ())) for row in self._waiting[:1])
        is_wide = values * len(self._waiting) >= _GROUP_VALUES
        if is_wide or len(self._waiting) >= _GROUP_ROWS:
            self._write_group()

    def keep(self, rows: Any) -> None:
        """Add a row group that is a table of pyarrow already."""
        if rows.num_rows:
            self._writer.write_table(rows)
            self._rows += rows.num_rows

    def finish(self) -> bytes:
        """Return the whole file; nothing if it has no row."""
        self._write_group()
        self._writer.close()
        return bytes(self._sink.getvalue()) if self._rows else b""

    def _write_group(self) -> None:
        import pyarrow

        rows, self._waiting = self._waiting, []
        columns = {
            field.name: pyarrow.array([row.get(field.name) for row in rows], field.type)
            for field in self._schema
        }
        self.keep(pyarrow.table(columns, schema=self._schema))
        self.places += [(each["key"], each.get("class_request"), "error" in each) for each in rows]


def schema() -> Any:
    """Return the columns of a table, as pyarrow has them."""
    import pyarrow as pa

    import vitviz

    text, number = pa.string(), pa.int32()
    prediction = [("class_index", number), ("class_label", text), ("score", pa.float64())]
    about = [
        (f"{name}_{fact}", kind)
        for name in ("class", "versus")
        for fact, kind in (("index", number), ("label", text), ("score", pa.float64()))
    ]
    diagnostics = [
        ("prefix_attention", pa.float64()),
        ("outlier_tokens", number),
        ("contrast", pa.float64()),
        ("gradient_norm_product", pa.float64()),
        ("outlier_share", pa.float64()),
    ]
    columns = [
        *((name, text) for name in ("source", "key", "sha256")),
        *((name, number) for name in ("height", "width")),
        ("region", pa.list_(pa.float64())),
        *((name, text) for name in ("method", "class_request")),
        *about,
        ("predictions", pa.list_(pa.struct(prediction))),
        ("score_kind", text),
        ("diagnostics", pa.struct(diagnostics)),
        ("relevance", pa.list_(pa.float32())),
        ("shape", pa.list_(number)),
        ("files", pa.list_(text)),
        *((name, text) for name in ("error", "model", "weights", "weights_sha256")),
        *((name, text) for name in ("versions", "options", "recipe")),
    ]
    return pa.schema(columns, metadata={_MARK: vitviz.__version__})


def require_own(part: Path) -> None:
    """Make sure that vitviz wrote a part of a table; raises ``OutputError``."""
    if not is_own(part):
        raise OutputError(f"{part} was not written by vitviz; choose another name")


def is_own(part: Path) -> bool:
    """Tell whether vitviz wrote a part of a table; raises ``OutputError`` if it is damaged."""
    from pyarrow import parquet

    with read_whole(part):
        return _MARK in (parquet.read_schema(part).metadata or {})


@contextmanager
def read_whole(part: Path) -> Iterator[None]:
    """Raise ``OutputError`` where a part of a table turns out to be damaged while it is read."""
    try:
        yield
    except FileNotFoundError:  # another run has just written it anew, under another name
        raise
    except (OSError, ValueError) as error:
        raise OutputError(f"{part} cannot be read: {first_line(error)}; move it away") from error


def _places(part: Path, method: str) -> Iterator[tuple[_Place, str]]:
    """Yield the places of a part that hold rows of a method, and by which recipe these are."""
    from pyarrow import parquet

    with read_whole(part), parquet.ParquetFile(part) as file:
        for batch in file.iter_batches(columns=[*_PLACE, "method", "recipe"]):
            methods, recipes = (batch[name].to_pylist() for name in ("method", "recipe"))
            for place, its, recipe in zip(_places_of(batch), methods, recipes, strict=True):
                if its == method:
                    yield place, recipe or ""


_PLACE = ["key", "class_request", "error"]


def _places_of(rows: Any) -> Iterator[_Place]:
    keys, requests, errors = (rows[name].to_pylist() for name in _PLACE)
    for key, request, error in zip(keys, requests, errors, strict=True):
        yield key, request, error is not None


def _remove(part: Path, method: str, places: Collection[_Place]) -> None:
    """Write a part anew without the rows in these places; one that is gone stays so."""
    from pyarrow import parquet

    try:
        with read_whole(part), parquet.ParquetFile(part) as file:
            kept = _Part(file.schema_arrow)
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group)
                its = zip(_places_of(rows), rows["method"].to_pylist(), strict=True)
                stays = [word != method or place not in places for place, word in its]
                kept.keep(rows.filter(stays))
    except FileNotFoundError:
        return
    if content := kept.finish():
        write_own(part, content, lambda path: True)
    else:
        part.unlink(missing_ok=True)
