"""The rows of tables of records → what a page shows of them; never writes a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitviz.errors import OutputError
from vitviz.explaining.explanation import Diagnostics, Prediction
from vitviz.images.fitting import Region
from vitviz.report.failures import Failure
from vitviz.runs.provenance import Provenance, source_id
from vitviz.runs.tables import is_own, read_whole, require_own

__all__ = ["Row", "own_tables", "rows_in"]

_BATCH = 256  # rows at once


class Row:
    """A map in a table, or the failure of an image.

    Attributes:
        failure: Why the image failed; None for a map.
        provenance: What made the map; of a failure, what was tried.
        size: (height, width) of the image.
        region: Where on the image the model looked.
        relevance: (rows, cols), or along the method's axes; None where the table has none.
        time: When its part of the table was written, in seconds since 1970.
    """

    def __init__(self, columns: dict[str, Any], time: float) -> None:
        """Take it from the columns of a table."""
        self.time = time
        self.provenance = _provenance(columns)
        self.size = (columns["height"] or 1, columns["width"] or 1)
        left, top, right, bottom = columns.get("region") or (0, 0, 1, 1)
        self.region = Region(left=left, top=top, right=right, bottom=bottom)
        self.relevance: NDArray[np.float32] | None = None
        values = columns["relevance"]
        if values is not None:
            self.relevance = np.asarray(values, dtype=np.float32).reshape(columns["shape"])
        self.failure = None if columns["error"] is None else self._failure(columns)

    def _failure(self, columns: dict[str, Any]) -> Failure:
        return Failure(
            source=columns["source"],
            source_id=self.provenance.source_id,
            method=columns["method"],
            error=columns["error"],
            time=self.time,
        )


def own_tables(folder: Path) -> list[Path]:
    """Find the tables in a folder, those of other programs left out.

    Raises:
        OutputError: pyarrow is not installed, or a part cannot be read.
    """
    found = sorted(each for each in folder.rglob("*.parquet") if each.is_dir())
    for table in found:
        _require_pyarrow(table)
    return [table for table in found if any(map(is_own, _parts(table)))]


def rows_in(table: Path) -> Iterator[Row]:
    """Yield the rows of a table, the newest last.

    Args:
        table: The folder of its parts.

    Raises:
        OutputError: pyarrow is not installed, or a part cannot be read or is none of vitviz's.
    """
    _require_pyarrow(table)
    from pyarrow import parquet

    for part in _parts(table):
        require_own(part)
        time = part.stat().st_mtime
        with read_whole(part), parquet.ParquetFile(part) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                yield from (Row(each, time) for each in batch.to_pylist())


def _parts(table: Path) -> list[Path]:
    return sorted(table.glob("*.parquet"))


def _require_pyarrow(table: Path) -> None:
    if find_spec("pyarrow") is None:
        raise OutputError(
            f"{table} is read by pyarrow, which is not installed; try pip install 'vitviz[parquet]'"
        )


def _provenance(columns: dict[str, Any]) -> Provenance:
    """Return what made a row, as far as a table tells."""
    options, diagnostics = json.loads(columns["options"]), columns["diagnostics"]
    return Provenance(
        recipe={
            "source_sha256": columns["sha256"],
            "model": columns["model"],
            "weights_sha256": columns["weights_sha256"],
            "method": columns["method"],
            "class": columns["class_request"],
            "options": options,
            "fit": options["fit"],
        },
        source=columns["source"],
        source_id=source_id(columns["source"]),
        class_index=columns["class_index"],
        class_label=columns["class_label"],
        versus_index=columns["versus_index"],
        versus_label=columns["versus_label"],
        predictions=tuple(Prediction(**each) for each in columns["predictions"] or ()),
        diagnostics=None if diagnostics is None else Diagnostics(**diagnostics),
        versions=json.loads(columns["versions"]),
    )
