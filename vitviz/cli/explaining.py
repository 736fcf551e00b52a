"""What the commands that explain do: find images, load the model, write a map of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vitviz.cli.leaving import complain, until_reader_leaves
from vitviz.cli.options import RunOptions, WritingRun
from vitviz.cli.reporter import Reporter
from vitviz.cli.reporting import open_for_people
from vitviz.cli.signals import Interruption
from vitviz.cli.starting import find, load, read_count, refuse_cheap_mistakes
from vitviz.errors import ImageError, OptionError, OutputError
from vitviz.methods.method import Method
from vitviz.options import OutputKind, PictureFormat, PictureOptions, Saved, ValueRange
from vitviz.runs.job import Job, require_parquet
from vitviz.runs.shards import Shard

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.images.sources import Source
    from vitviz.models.model import Model
    from vitviz.report.sink import Sink
    from vitviz.runs.pipeline import Item

__all__ = ["Plan", "explain_images"]


@dataclass(frozen=True)
class Plan:
    """What is to be done once the model is there.

    Attributes:
        job: What to do with each image.
        finish: What is done to each before it is written; None: nothing.
    """

    job: Job
    finish: Callable[[Model, Iterator[Item]], Iterator[Item]] | None = None


def explain_images(
    run: WritingRun,
    method: Method,
    plan: Callable[[Model, Sequence[Source], Job], Plan] = lambda model, sources, job: Plan(job),
) -> None:
    """Do what an explaining command asks for.

    Args:
        run: The options.
        method: How maps are computed.
        plan: Finds out, of the model and the images, what is to be done.
    """
    from vitviz.runs.writing import prepare_folder

    job = _job(run, method)
    _require_previews(run, job.pictures)
    found = find(run)
    sources = _own_part(run, job, found.sources)
    refuse_cheap_mistakes(run, sources, method)
    if job.pictures.kinds:
        prepare_folder(run.output)
    sink = _sink(run, method)
    reporter, model = load(run, found)

    from vitviz.runs import pipeline
    from vitviz.runs.records import run_record

    with until_reader_leaves(), Interruption() as interruption:
        try:
            warn = partial(reporter.say, style="yellow")
            made = plan(model, found.sources, job)
            results = pipeline.run(
                *(model, found.sources, made.job),
                finish=made.finish or pipeline.unfinished,
                beside=sink.keep if sink else None,
                warn=warn,
            )
            shown = interruption.between(results)
            record = run_record(model.record, made.job)
            shown = sink.watch(shown) if sink else shown
            where = made.job.destination
            reporter.show(shown, len(sources), record, where, previews=run.show)
            _conclude(run, sink, reporter, where)
        except ImageError as error:  # the one that all others hang on
            complain(str(error), code=1)
        except OutputError as error:  # what went before is written: no reason to leave with 2
            complain(str(error), code=1)
    raise typer.Exit(int(reporter.failed))


def _own_part(run: WritingRun, job: Job, sources: Sequence[Source]) -> Sequence[Source]:
    """Return the images of this call; leave if there are none, as in the last of many shards."""
    part = job.part_of(sources)
    if job.shard and not run.quiet:
        text = f"Shard {job.shard}: {len(part):,} of {len(sources):,} images"
        typer.echo(text, err=True)
    if not part:
        raise typer.Exit
    return part


def _pictures(run: WritingRun, method: Method) -> PictureOptions:
    is_png = run.format is PictureFormat.PNG  # which holds no frames, and is the default
    pictures = PictureOptions(
        kinds=_kinds(run),
        alpha=run.alpha,
        max_size=run.max_size,
        format=PictureFormat.GIF if is_png and method.axes[0] == "frames" else run.format,
    )
    if not isinstance(run, RunOptions):
        return pictures
    return replace(pictures, colormap=run.colormap, scale=run.scale, outliers=run.outliers)


def _sink(run: WritingRun, method: Method) -> Sink | None:
    """Make ready for a report, where one is asked for; raises ``OutputError``."""
    if not run.report:
        return None
    from vitviz.report.sink import Sink  # which other runs need not know

    return Sink(run.output, method.name)


def _conclude(run: WritingRun, sink: Sink | None, reporter: Reporter, where: Path | None) -> None:
    """Write the report and open what there is to look at, where these are asked for."""
    page = sink.finish() if sink else None
    if page:
        reporter.say(f"report: {page}")
    if run.open and (found := page or where):
        open_for_people(found)


def _job(run: WritingRun, method: Method) -> Job:
    return Job(
        method=method,
        pictures=_pictures(run, method),
        fit=run.fit,
        value_range=ValueRange.ensure(run.value_range),
        output=run.output,
        skip_existing=run.skip_existing,
        batch_size=read_count(run.batch_size, "--batch-size"),
        workers=read_count(run.workers, "--workers"),
        records=run.records,
        table=Saved.TABLE in run.save,
        shard=None if run.shard is None else Shard.parse(run.shard),
    )


def _require_previews(run: WritingRun, pictures: PictureOptions) -> None:
    """Make sure that there is something to show, and somewhere, if that is asked for."""
    if not run.show:
        return
    if not any(kind is not OutputKind.NPY for kind in pictures.kinds):
        raise OptionError("--show shows the pictures that are written; add --save overlay")
    if sys.stderr is None or not sys.stderr.isatty():
        raise OptionError("--show draws on a terminal, but stderr is none; leave it out")


def _kinds(run: WritingRun) -> tuple[OutputKind, ...]:
    """Return the kinds of files that are asked for, and make sure that all makes sense."""
    saved = dict.fromkeys(run.save)
    if run.records is not None:
        require_parquet(run.records)
    elif Saved.TABLE in saved:
        raise OptionError("--save table needs a table; name one, as --records maps.parquet")
    elif Saved.NONE in saved and not run.as_json:
        raise OptionError("--save none leaves nothing; add --records maps.parquet or --json")
    if Saved.NONE in saved and len(saved) > 1:
        others = ", ".join(saved.keys() - {Saved.NONE})
        raise OptionError(f"--save none and {others} are both given; leave one out")
    kinds = tuple(OutputKind(each) for each in saved if each not in (Saved.TABLE, Saved.NONE))
    if run.report and not kinds:
        raise OptionError("--report is about files, and none is saved; add --save overlay")
    return kinds
