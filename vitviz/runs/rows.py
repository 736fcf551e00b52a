"""The rows of a run: what a table says of each image and map; knows nothing of its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from vitviz.errors import OutputError
from vitviz.explaining.explanation import Explanation
from vitviz.images.decoding import ImageFile
from vitviz.images.sources import Source
from vitviz.runs.job import Job
from vitviz.runs.records import Result, Writer, run_record
from vitviz.runs.tables import RecordsTable
from vitviz.runs.writing import fatal_write_error

__all__ = ["RowWriter", "opened_table", "spelled", "table_folder"]

_Row = dict[str, Any]


class Table(Protocol):
    """Where rows go."""

    def has(self, key: str, request: str | None, recipe: str) -> bool:
        """Tell whether a map's row is there, made by this recipe."""

    def add(self, rows: Iterable[_Row]) -> None:
        """Add rows; from any thread."""

    def close(self) -> None:
        """Write what is left."""


def table_folder(job: Job) -> Path:
    """Return where the table of a job is that has one."""
    if job.records is None:
        raise ValueError("the job names no table")
    return job.records


@contextmanager
def opened_table(writer: Writer, sources: Sequence[Source]) -> Iterator[RecordsTable | None]:
    """Open the table that a job names, to add rows of these images; None where it names none.

    Raises:
        OutputError: The table cannot be written to, or is none of vitviz's.
    """
    job = writer.job
    if job.records is None:
        yield None
        return
    keys = {spelled(each.key) for each in sources}
    with closing(RecordsTable(job.records, job.method.name, keys)) as table:
        yield table


class RowWriter:
    """Writes rows for what becomes of images, and knows which are there already."""

    def __init__(self, writer: Writer, table: Table) -> None:
        """Begin with no row.

        Args:
            writer: Writes the images' files, and knows the recipe of each map.
            table: Where the rows go.
        """
        record = run_record(writer.model, writer.job)
        self._writer, self._table = writer, table
        run = record["run"]
        self._common: _Row = {
            "method": run["method"],
            "score_kind": record["score_kind"],
            "model": run["model"],
            "weights": spelled(str(run["weights"]["source"])),
            "weights_sha256": run["weights"]["sha256"],
            "versions": json.dumps(run["versions"]),
            "options": json.dumps(run["options"]),
        }

    def skipped(self, file: ImageFile) -> Result | None:
        """Return the result of an image whose rows are there, made by the same recipe.

        Its files must be there, too, but are not read.
        """
        writer, key = self._writer, spelled(file.source.key)
        there = all(
            self._table.has(key, request, writer.row_recipe(file.digest, request))
            for request in writer.requests
        ) and all(path.exists() for path, _, _ in writer.files(file.source))
        return Result(source=file.source, status="skipped") if there else None

    def add(self, maps: Sequence[Explanation], result: Result) -> Result:
        """Add the rows of an image; the result is another if that fails.

        Args:
            maps: Of the image, none where it failed.
            result: What became of it.
        """
        if result.status == "skipped":
            return result
        if result.error is not None:
            rows = [{**self._of_source(result.source), "error": result.error}]
        else:
            rows = [self._of_map(each, result) for each in maps]
        try:
            self._table.add(rows)
        except OutputError as error:
            folder = table_folder(self._writer.job)
            fatal = fatal_write_error(folder, error, "--records")
            return replace(result, status="failed", error=str(error), fatal_write_error=fatal)
        return result

    def _of_map(self, explanation: Explanation, result: Result) -> _Row:
        sample, found = explanation.sample, explanation.diagnostics
        outputs = self._writer.outputs_of(explanation.request, result)
        row = {
            **self._of_source(sample.source),
            "sha256": sample.digest,
            "height": sample.size[0],
            "width": sample.size[1],
            "region": [getattr(sample.region, side) for side in ("left", "top", "right", "bottom")],
            "class_request": explanation.request,
            "predictions": [asdict(each) for each in explanation.predictions],
            "diagnostics": None if found is None else asdict(found),
            "files": [spelled(str(each.path)) for each in outputs],
            "recipe": self._writer.row_recipe(sample.digest, explanation.request),
        }
        for name in ("class", "versus"):
            for fact in ("index", "label", "score"):
                row[f"{name}_{fact}"] = getattr(explanation, f"{name}_{fact}")
        if self._writer.job.table:
            row["relevance"] = explanation.relevance.ravel()
            row["shape"] = list(explanation.relevance.shape)
        return row

    def _of_source(self, source: Source) -> _Row:
        path = spelled(source.name)
        return {"source": path, "key": spelled(source.key), **self._common}


def spelled(text: str) -> str:
    r"""Return a path as text that every table takes: bytes that are no UTF-8 become ``\xff``."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
