"""vitviz at work as its users see it: the pipeline over a folder, and the whole command."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tests.bench.figures import Setting
from tests.bench.subject import weights
from vitviz.explaining.parallel import batch_size_for
from vitviz.images.sources import Source, find_sources
from vitviz.models.model import Model
from vitviz.options import OutputKind, PictureOptions
from vitviz.runs import pipeline
from vitviz.runs.job import Job
from vitviz.runs.records import Result

__all__ = [
    "batch_size",
    "clearing",
    "expect_written",
    "explain",
    "results",
    "rollout_command",
    "sources_in",
    "vitviz_command",
]


def batch_size(model: Model) -> int:
    """Return how many images vitviz runs at once when it is left to choose."""
    return batch_size_for(model.layout.tokens, model.device)


def sources_in(folder: Path) -> list[Source]:
    """Return the images of a folder."""
    return find_sources([folder])[0]


def explain(
    setting: Setting, model: Model, sources: Sequence[Source], kind: OutputKind = OutputKind.OVERLAY
) -> None:
    """Take images through the whole pipeline, from files to files."""
    expect_written(results(setting, model, sources, kind))


def results(
    setting: Setting, model: Model, sources: Sequence[Source], kind: OutputKind = OutputKind.OVERLAY
) -> Iterator[Result]:
    """Explain images as by default and yield what became of each."""
    job = Job(pictures=PictureOptions(kinds=(kind,)), output=_output(setting))
    return pipeline.run(model, sources, job)


def expect_written(found: Iterable[Result]) -> None:
    """Fail unless each image was written: what fails is fast."""
    for result in found:
        if result.status != "written":
            raise RuntimeError(f"{result.source.path} {result.status}: {result.error}")


def clearing(setting: Setting) -> Callable[[], None]:
    """Return what removes the maps, so that no call finds those of another."""
    return lambda: shutil.rmtree(_output(setting), ignore_errors=True)


def vitviz_command(*words: str | Path) -> list[str | Path]:
    """Return the command line of vitviz as it is installed beside this Python."""
    found = shutil.which("vitviz", path=sysconfig.get_path("scripts"))
    if found is None:
        raise RuntimeError("the command vitviz is not installed here; try make setup")
    return [found, *words]


def rollout_command(setting: Setting, source: Path) -> list[str | Path]:
    """Return the command that explains a file or a folder: no network, and no GPU."""
    model = "-m", "deit_tiny", "--weights", weights(setting), "--device", "cpu"
    return vitviz_command("rollout", source, *model, "-q", "-o", _output(setting))


def _output(setting: Setting) -> Path:
    return setting.folder / "output"
