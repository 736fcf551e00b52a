"""A sink of explanations: keeps what the page draws while a run goes on; never draws a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vitviz.explaining.explanation import Explanation
from vitviz.images.samples import ImageSample
from vitviz.options import OutputKind
from vitviz.report.failures import Failure, put_failures, read_failures
from vitviz.report.files import FILES, prepare, put_picture
from vitviz.report.maps import is_drawn, map_id, put_map, stored_map
from vitviz.runs.provenance import source_id
from vitviz.runs.records import Result, Writer
from vitviz.runs.writing import alone_in

__all__ = ["Sink"]


class Sink:
    """Keeps each image of a run for the page as it comes, and in memory only failures."""

    def __init__(self, folder: Path, method: str) -> None:
        """Make sure that a report can be written to a folder.

        Args:
            folder: Of the page.
            method: The name of the run's method.

        Raises:
            OutputError: It cannot.
        """
        prepare(folder)
        self._folder = folder
        self._method = method
        self._to_mend = {each.key for each in read_failures(folder)}
        self._mended: set[tuple[str, str]] = set()
        self._failures: dict[tuple[str, str], Failure] = {}

    def keep(self, writer: Writer, sample: ImageSample, maps: Sequence[Explanation]) -> None:
        """Keep an image whose files are written; in whatever thread.

        Raises:
            OutputError: It cannot be written.
        """
        put_picture(self._folder, source_id(sample.source.name), sample.picture, sample.digest)
        for explanation in filter(is_drawn, maps):
            _keep_map(self._folder, explanation, writer)

    def watch(self, results: Iterable[Result]) -> Iterator[Result]:
        """Pass results on, and keep in mind what failed."""
        for result in results:
            identity = source_id(result.source.name)
            if result.error is not None:
                failure = Failure(
                    source=result.source.name,
                    source_id=identity,
                    method=self._method,
                    error=result.error,
                )
                self._failures[failure.key] = failure
            elif (identity, self._method) in self._to_mend:
                self._mended.add((identity, self._method))
            yield result

    def finish(self) -> Path:
        """Write the page of all that is in the folder, and return where it is.

        Raises:
            OutputError: It cannot be written.
        """
        from vitviz.report.page import write_page  # which loads Jinja

        # Read again: runs that share the folder, as shards do, have added theirs meanwhile.
        with alone_in(self._folder / FILES):
            known = {each.key: each for each in read_failures(self._folder)} | self._failures
            left = [failure for key, failure in known.items() if key not in self._mended]
            put_failures(self._folder, left)
        return write_page(self._folder)


def _keep_map(folder: Path, explanation: Explanation, writer: Writer) -> None:
    """Keep one map."""
    provenance = writer.provenance(
        explanation.sample, explanation.request, OutputKind.NPY, explanation
    )
    put_map(folder, map_id(provenance), stored_map(explanation, provenance.recipe))
