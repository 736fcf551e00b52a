"""What belongs to each image of a run: its files, their recipe, and what became of it.

Knows how files come about, but runs no model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vitviz.errors import OutputError, SourceError, VitvizError, reason
from vitviz.explaining.explanation import Diagnostics, Explanation, Prediction
from vitviz.images.decoding import ImageFile
from vitviz.images.samples import ImageSample
from vitviz.images.sources import Source
from vitviz.methods.method import ClassMethod, Method
from vitviz.models.record import ModelRecord
from vitviz.options import OutputKind, ValueRange
from vitviz.runs.job import Job
from vitviz.runs.names import output_path
from vitviz.runs.provenance import Provenance, encode, is_whole, read_provenance, source_id
from vitviz.runs.writing import fatal_write_error, write_whole

__all__ = ["Beside", "Output", "Result", "Writer", "failure", "run_record"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One written file."""

    kind: str
    path: Path
    class_index: int | None
    class_label: str | None
    versus_index: int | None = None
    versus_label: str | None = None
    diagnostics: Diagnostics | None = None

    def to_record(self) -> dict[str, Any]:
        """Return it as records have it, which leave out the other class where there is none."""
        numbers = None if self.diagnostics is None else self.diagnostics.to_record()
        other = {"versus_index": self.versus_index, "versus_label": self.versus_label}
        return {
            "kind": self.kind,
            "path": str(self.path),
            "class_index": self.class_index,
            "class_label": self.class_label,
            **({} if self.versus_index is None else other),
            "sanity": numbers,
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one image.

    Attributes:
        source: The image.
        status: "written", "skipped" or "failed".
        outputs: The files, those that were there already included.
        predictions: The best classes, best first.
        error: Why it failed.
        fatal_write_error: Why every other image would fail in the same way.
    """

    source: Source
    status: str
    outputs: tuple[Output, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None
    fatal_write_error: str | None = None


Beside = Callable[["Writer", ImageSample, Sequence[Explanation]], None]
"""Is given each image and its maps once its files are written, in whatever thread."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes the maps of each image: a sink of explanations, which can be pickled.

    Knows which files belong to an image and what their recipe is.

    Attributes:
        model: What there is to know of the model.
        job: What to do with each image.
        requests: Names of the class requests; a single None for a class-agnostic method.
        beside: Is given each image and its maps once its files are written.
    """

    model: ModelRecord
    job: Job
    requests: tuple[str | None, ...]
    beside: Beside | None = None

    def refuse_overwriting(self, sources: Sequence[Source]) -> None:
        """Make sure that no output is a source, by whatever name, nor that of another source."""
        files = (source.path for source in sources if source.origin is None)
        taken = {_file_at(path) for path in files} - {None}
        folder_of = cache(os.path.realpath)
        makers: dict[tuple[str, str], Source] = {}
        for source in sources:
            for path, _, _ in self.files(source):
                other = makers.setdefault((folder_of(path.parent), path.name), source)
                if other is not source:
                    raise SourceError(
                        f"the maps of {other.name} and {source.name} would be one file, since "
                        "links lead to one folder; choose another --output folder"
                    )
                if _file_at(path) in taken:
                    raise SourceError(
                        f"the map of {source.name} would overwrite the source {path}; "
                        "choose another --output folder"
                    )

    def files(self, source: Source) -> Iterator[tuple[Path, str | None, OutputKind]]:
        """Yield the path, class request and kind of each file of an image."""
        for request in self.requests:
            for kind in self.job.pictures.kinds:
                path = output_path(
                    *(self.job.output, source, self.job.method.file_name, request, kind),
                    self.job.pictures.format,
                )
                yield path, request, kind

    def outputs_of(self, request: str | None, result: Result) -> list[Output]:
        """Return the files of one map of an image."""
        pairs = zip(self.files(result.source), result.outputs, strict=True)
        return [output for (_, its, _), output in pairs if its == request]

    def row_recipe(self, digest: str, request: str | None) -> str:
        """Return the digest of all that decides a map's row in a table, and its files."""
        kinds = (OutputKind.NPY, *self.job.pictures.kinds)  # of .npy, what is in all recipes
        recipes = [self._recipe(digest, request, kind) for kind in kinds]
        content = json.dumps([recipes, self.job.table], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def write(self, sample: ImageSample, maps: Sequence[Explanation]) -> Result:
        """Draw and write an image's files."""
        source = sample.source
        by_request = {explanation.request: explanation for explanation in maps}
        outputs = []
        try:
            for path, request, kind in self.files(source):
                explanation = by_request[request]
                provenance = self.provenance(sample, request, kind, explanation)
                write_whole(path, encode(explanation, kind, provenance), provenance)
                outputs.append(_output(path, kind, provenance))
            if self.beside is not None:
                self.beside(self, sample, maps)
        except MemoryError as error:
            return replace(failure(source, error), outputs=tuple(outputs))
        except OutputError as error:
            fatal = fatal_write_error(self.job.output, error)
            failed = failure(source, error)
            return replace(failed, outputs=tuple(outputs), fatal_write_error=fatal)
        return Result(
            source=source,
            status="written",
            outputs=tuple(outputs),
            predictions=maps[0].predictions,
        )

    def skipped(self, file: ImageFile) -> Result | None:
        """Return the result of an image whose files are all there, made by the same recipe."""
        found = []
        for path, request, kind in self.files(file.source):
            provenance = read_provenance(path) if is_whole(path) else None
            if provenance is None or provenance.recipe != self._recipe(file.digest, request, kind):
                return None
            found.append((path, kind, provenance))
        return Result(
            source=file.source,
            status="skipped",
            outputs=tuple(_output(*entry) for entry in found),
            predictions=found[0][2].predictions,
        )

    def provenance(
        self, sample: ImageSample, request: str | None, kind: OutputKind, explanation: Explanation
    ) -> Provenance:
        """Say what makes a file of an image."""
        return Provenance(
            recipe=self._recipe(sample.digest, request, kind),
            source=sample.source.name,
            source_id=source_id(sample.source.name),
            class_index=explanation.class_index,
            class_label=explanation.class_label,
            versus_index=explanation.versus_index,
            versus_label=explanation.versus_label,
            predictions=explanation.predictions,
            diagnostics=explanation.diagnostics,
            versions=self.model.versions,
        )

    def _recipe(self, digest: str, request: str | None, kind: OutputKind) -> dict[str, Any]:
        method = self.job.method
        recipe = {
            "source_sha256": digest,
            "model": self.model.name,
            "weights_sha256": self.model.weights_sha256,
            "method": method.name,
            "options": {**method.to_record(), **self.job.pictures.to_record(kind, method.colormap)},
            "fit": self.job.fit.value,
            "value_range": self.job.value_range and str(self.job.value_range),
            "preprocessing": self.model.preprocessing,
            "class": request,
            "labels": self.model.labels_digest,
            "kind": kind.value,
            "vitviz": self.model.versions["vitviz"],
            "timm": self.model.versions["timm"],
        }
        return dict(json.loads(json.dumps(recipe)))  # as it reads back from a file


def run_record(model: ModelRecord, job: Job) -> dict[str, Any]:
    """Return what all records of a run have in common."""
    method = job.method
    return {
        "score_kind": model.score_kind,
        "run": {
            "versions": model.versions,
            "model": model.name,
            "weights": {"source": model.weights, "sha256": model.weights_sha256},
            "method": method.name,
            "options": {
                **method.to_record(),
                **job.pictures.to_record(OutputKind.OVERLAY, method.colormap),
                "fit": job.fit.value,
                **ValueRange.to_record(job.value_range),
                **{key: list(model.preprocessing[key]) for key in ("size", "mean", "std")},
                "dtype": model.dtype,
                "labels": model.labels_source,
                "class": list(method.classes) if isinstance(method, ClassMethod) else [],
                **_versus(method),
                "save": [kind.value for kind in job.pictures.kinds] + ["table"] * job.table,
            },
        },
    }


def _versus(method: Method) -> dict[str, str]:
    """Return the class that others are compared with; nothing where there is none."""
    word = method.versus if isinstance(method, ClassMethod) else None
    return {} if word is None else {"versus": word}


def _file_at(path: Path) -> tuple[int, int] | None:
    """Return what all names of one file have in common: links, and cases where those are one."""
    # Of every hard link the same, unlike `images.sources.identity`: an input is never overwritten.
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def failure(source: Source, error: VitvizError | MemoryError) -> Result:
    """Return the result of an image that failed."""
    return Result(source=source, status="failed", error=reason(error))


def _output(path: Path, kind: OutputKind, provenance: Provenance) -> Output:
    return Output(
        kind=kind.value,
        path=path,
        class_index=provenance.class_index,
        class_label=provenance.class_label,
        versus_index=provenance.versus_index,
        versus_label=provenance.versus_label,
        diagnostics=provenance.diagnostics,
    )
