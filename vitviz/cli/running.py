"""What the commands that work on images do: find images, load the model, explain or measure."""

from __future__ import annotations

import gc
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

import typer

from vitviz.cli.options import EvaluationRun, RunOptions, SharedOptions
from vitviz.cli.signals import Interruption
from vitviz.errors import ImageError, OptionError, OutputError, SourceError, printable
from vitviz.evaluation.options import EvaluationOptions
from vitviz.methods.method import Method
from vitviz.options import PictureOptions
from vitviz.runs.job import Job

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.cli.reporter import Reporter
    from vitviz.evaluation.measuring import ImageScores
    from vitviz.evaluation.summary import Evaluation
    from vitviz.images.sources import Source
    from vitviz.models.model import Model

__all__ = [
    "complain",
    "evaluate_images",
    "explain_images",
    "forget",
    "importing",
    "read_size",
    "require_known",
    "until_reader_leaves",
]


def complain(message: str, code: int = 2) -> NoReturn:
    """Say in one line what is wrong, and leave."""
    typer.echo(f"Error: {printable(message)}", err=True)
    sys.exit(code)


def explain_images(run: RunOptions, method: Method) -> None:
    """Do what an explaining command asks for."""
    from vitviz.runs.writing import prepare_folder

    job = _job(run, method)
    found = _find(run)
    _refuse_cheap_mistakes(run, found)
    prepare_folder(run.output)
    reporter, model = _load(run, found)

    from vitviz.runs import pipeline
    from vitviz.runs.records import run_record

    with until_reader_leaves(), Interruption() as interruption:
        try:
            warn = partial(reporter.say, style="yellow")
            results = interruption.between(pipeline.run(model, found.sources, job, warn=warn))
            reporter.show(results, len(found.sources), run_record(model.record, job))
        except OutputError as error:  # what went before is written: no reason to leave with 2
            complain(str(error), code=1)
    raise typer.Exit(int(reporter.failed))


def evaluate_images(run: EvaluationRun) -> NoReturn:
    """Do what ``evaluate`` asks for."""
    if run.plot is not None:
        from vitviz.evaluation.files import require_matplotlib

        require_matplotlib()
    options = _evaluation_options(run)
    found = _find(run)
    _refuse_cheap_mistakes(run, found)
    reporter, model = _load(run, found)

    from vitviz.evaluation import annotations
    from vitviz.evaluation import files as exhibits
    from vitviz.evaluation import measuring as examination
    from vitviz.evaluation import summary as evaluation
    from vitviz.evaluation.tasks import annotated_images

    exhibits.require_places(run.csv, run.plot)
    truth = None
    if run.truth is not None:
        truth = annotations.read_truth(run.truth, model.labels, model.num_classes)
    subjects = annotated_images(found.sources, masks=run.masks, truth=truth)
    with until_reader_leaves(), Interruption() as interruption:
        warn = partial(reporter.say, style="yellow")
        measured = examination.measure(
            model, subjects, options, warn=warn, advance=reporter.advance
        )
        kept: list[ImageScores] = []
        try:
            reporter.collect(interruption.between(measured), len(subjects), kept)
        finally:  # what was measured before an interruption is told, too
            if len(kept) == len(subjects) or any(each.cases for each in kept):
                result = evaluation.summarize(model, options, kept)
                _tell(reporter, result, run)
    raise typer.Exit(int(reporter.failed))


def _tell(reporter: Reporter, result: Evaluation, run: EvaluationRun) -> None:
    """Write what was measured to the files that are asked for, and show it."""
    from vitviz.evaluation import files as exhibits

    try:
        exhibits.save(result, run.csv, run.plot)
        reporter.present(result)
    except OutputError as error:  # it is measured: no reason to leave with 2
        complain(str(error), code=1)


def _evaluation_options(run: EvaluationRun) -> EvaluationOptions:
    if len(run.targets) > 1:
        raise OptionError(
            f"--class is given {len(run.targets)} times; methods are measured on one class of each "
            "image, or with --class mask on all that its mask names"
        )
    return EvaluationOptions(
        methods=tuple(run.methods),
        target=run.targets[0],
        convention=run.convention,
        fit=run.fit,
        batch_size=_count(run.batch_size, "--batch-size"),
        workers=_count(run.workers, "--workers"),
        seed=run.seed,
        resamples=run.resamples,
    )


def _load(run: SharedOptions, found: _Found) -> tuple[Reporter, Model]:
    """Say what the work begins with, and load the model; only now torch, after all mistakes."""
    img_size = read_size(run.img_size)
    with importing():
        from vitviz.cli.reporter import Reporter
        from vitviz.models.devices import describe_device, select_device
        from vitviz.models.model import load_model

    reporter = Reporter(quiet=run.quiet, as_json=run.as_json, nul=run.nul)
    for argument in found.fruitless:
        reporter.say(f"no images in {argument}", "yellow")
    reporter.say(describe_device(select_device(run.device)))
    model = load_model(
        run.model,
        weights=run.weights,
        labels=run.labels,
        device=run.device,
        fit=run.fit,
        img_size=img_size,
        precision=run.precision,
    )
    for note in model.notes:
        reporter.say(note, "yellow")
    warnings.filterwarnings("ignore", module="PIL")  # of odd images: what matters is in a result
    return reporter, model


def _job(run: RunOptions, method: Method) -> Job:
    return Job(
        method=method,
        pictures=PictureOptions(
            kinds=tuple(dict.fromkeys(run.save)),
            colormap=run.colormap,
            alpha=run.alpha,
            max_size=run.max_size,
        ),
        fit=run.fit,
        output=run.output,
        skip_existing=run.skip_existing,
        batch_size=_count(run.batch_size, "--batch-size"),
        workers=_count(run.workers, "--workers"),
    )


@dataclass(frozen=True)
class _Found:
    """The images of a call, and the arguments that gave none."""

    sources: list[Source]
    fruitless: list[str]


def _find(run: SharedOptions) -> _Found:
    """Find the images, and make sure that there are some."""
    from vitviz.images.sources import find_sources
    from vitviz.runs.provenance import read_provenance

    def own(path: Path) -> bool:
        """Tell whether an image found on the way is a picture that vitviz made."""
        return read_provenance(path) is not None

    arguments = list(_arguments(run.sources, "\0" if run.nul else "\n"))
    sources, fruitless = find_sources(arguments, skip=own)
    if not sources:
        where = ", ".join(fruitless) or "stdin"
        raise SourceError(f"nothing to do: no images in {where}; give images or folders of them")
    return _Found(sources, fruitless)


def _refuse_cheap_mistakes(run: SharedOptions, found: _Found) -> None:
    """Find what is sure to fail before torch is loaded and weights are looked for."""
    from vitviz.images.decoding import require_readable

    require_known(run.model)
    if run.as_json:  # a record tells of the model, too
        return
    failures: list[str] = []
    for source in found.sources:
        try:
            require_readable(source)
        except ImageError as error:
            failures.append(f"failed: {source.path}: {error}")
        else:
            return  # one that can be read: the others fail in their turn
    for failure in failures:
        typer.echo(printable(failure), err=True)
    raise typer.Exit(1)


def require_known(model: str) -> None:
    """Make sure, without timm, that it has a model of this name; if its names are known."""
    from vitviz.models.census import known_models
    from vitviz.models.names import require_name

    if known := known_models():
        require_name(model, known)


def _arguments(words: Iterable[str], separator: str) -> Iterator[str | Path]:
    """Yield the sources as typed, ``-`` replaced by the paths on stdin, which are no globs."""
    for word in words:
        if word == "-":
            paths = os.fsdecode(sys.stdin.buffer.read()).split(separator)
            yield from (Path(path) for path in paths if path)
        else:
            yield word


def _count(word: str, option: str) -> int | None:
    if word == "auto":
        return None
    try:
        return int(word)
    except ValueError:
        raise OptionError(f"{option} is {word!r}; give a number or auto") from None


def read_size(word: str | None) -> tuple[int, int] | None:
    """Read "518" or "336x672" (height x width)."""
    if word is None:
        return None
    sides = re.fullmatch(r"([1-9]\d*)(?:[x×]([1-9]\d*))?", word)
    if not sides:
        raise OptionError(f"--img-size is {word!r}; give one side or HEIGHTxWIDTH, like 336x672")
    return int(sides[1]), int(sides[2] or sides[1])


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and timm without looking for garbage among what they make: a fifth faster."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor later on: all of it is there to stay
        gc.enable()


@contextmanager
def until_reader_leaves() -> Iterator[None]:
    """Leave quietly when whoever reads our results has left."""
    try:
        yield
    except BrokenPipeError:
        forget(sys.stdout, sys.stderr)
        sys.exit(141)


def forget(*streams: TextIO) -> None:
    """Drop what streams cannot tell any more, so that leaving does not fail over it."""
    from vitviz.cli.reporter import discard

    for stream in streams:
        discard(stream)
