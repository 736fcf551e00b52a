"""Lists of images in a file, for what takes too long to list anew: ``@list.txt``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vitviz.errors import ImageError, SourceError, first_line
from vitviz.images.stores import StoredObject, is_url, stored_file

__all__ = ["listed", "read_list"]

_COLUMNS = ("source", "path", "url", "key")


def read_list(name: str, separator: str) -> Iterator[Path | StoredObject]:
    """Yield what a list names: lines of a text file, or a column of a Parquet file.

    Args:
        name: Path or URL of the list.
        separator: What ends a line.

    Raises:
        SourceError: It cannot be read.
    """
    file = StoredObject(name)
    try:
        if file.suffix == ".parquet":
            words = _column(name)
        else:
            words = os.fsdecode(file.read()).split(separator)
    except ImageError as error:
        raise SourceError(f"@{name} {error}") from error
    yield from listed(words)


def listed(words: list[str]) -> Iterator[Path | StoredObject]:
    """Yield what words of a list name, none of which is a glob."""
    for word in words:
        if word.strip("\r"):
            yield StoredObject(word.strip("\r")) if is_url(word) else Path(word)


def _column(name: str) -> list[str]:
    if find_spec("pyarrow") is None:
        raise SourceError(f"@{name} needs pyarrow; try pip install 'vitviz[parquet]'")
    from pyarrow import parquet

    try:
        with stored_file(name) as file, parquet.ParquetFile(file) as table:
            columns = [each for each in _COLUMNS if each in table.schema_arrow.names]
            if not columns:
                raise SourceError(f"@{name} has none of the columns {', '.join(_COLUMNS)}")
            words = [word for word in table.read(columns[:1])[columns[0]].to_pylist() if word]
    except (OSError, ValueError) as error:
        raise SourceError(f"@{name} cannot be read: {first_line(error)}") from error
    if odd := next((word for word in words if not isinstance(word, str)), None):
        raise SourceError(f"@{name} has {odd!r} in its column {columns[0]}; expected text")
    return words
