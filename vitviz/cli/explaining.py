"""What the commands that explain do: find images, load the model, write a map of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vitviz.cli.leaving import complain, until_reader_leaves
from vitviz.cli.options import RunOptions, WritingRun
from vitviz.cli.signals import Interruption
from vitviz.cli.starting import find, load, read_count, refuse_cheap_mistakes
from vitviz.errors import ClusterError, ImageError, OptionError, OutputError
from vitviz.methods.method import Method
from vitviz.options import OutputKind, PictureFormat, PictureOptions, Saved, ValueRange
from vitviz.runs.cluster import Actors, joined, require_ray
from vitviz.runs.job import Engine, Job, require_parquet
from vitviz.runs.shards import Shard

if TYPE_CHECKING:  # these rooms load torch, or what is needed only after all checks
    from vitviz.cli.reporter import Reporter
    from vitviz.images.sources import Source
    from vitviz.models.model import Model
    from vitviz.report.sink import Sink
    from vitviz.runs.pipeline import Finish
    from vitviz.runs.records import Result

__all__ = ["Plan", "explain_images"]


@dataclass(frozen=True)
class Plan:
    """What is to be done once the model is there.

    Attributes:
        job: What to do with each image.
        finish: What is done to each before it is written; None: nothing.
    """

    job: Job
    finish: Finish | None = None


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
    _require_engine(run)
    found = find(run)
    sources = _own_part(run, job, found.sources)
    refuse_cheap_mistakes(run, sources, method)
    if job.pictures.kinds:
        prepare_folder(run.output)
    sink = _sink(run, method)
    with _cluster(run) as actors:
        here = replace(run, device="cpu") if actors else run
        reporter, model = load(here, found, f"Using Ray: {actors}" if actors else "")

        from vitviz.runs.records import run_record

        with until_reader_leaves(), Interruption() as interruption:
            try:
                made = plan(model, found.sources, job)
                beside = sink.keep if sink else None
                warn = partial(reporter.say, style="yellow")
                results = _run(made, model, found.sources, actors, beside=beside, warn=warn)
                shown = interruption.between(results)
                record = run_record(model.record, made.job)
                shown = sink.watch(shown) if sink else shown
                where = made.job.destination
                reporter.show(shown, len(sources), record, where, previews=run.show)
                _conclude(run, sink, reporter, where)
            except (ClusterError, ImageError, OutputError) as error:
                complain(str(error), code=1)  # what went before is written: not 2
    raise typer.Exit(int(reporter.failed))


def _cluster(run: WritingRun) -> AbstractContextManager[Actors | None]:
    """Return the cluster that does the work, to be joined; None: this process does it."""
    if run.engine is Engine.LOCAL:
        return nullcontext()
    return joined(run.ray_address, read_count(run.actors, "--actors"), run.device)


def _run(
    made: Plan, model: Model, sources: Sequence[Source], actors: Actors | None, **given: Any
) -> Generator[Result, None, None]:
    """Start the work, here or on a cluster."""
    from vitviz.runs import pipeline

    given["finish"] = made.finish or pipeline.unfinished
    if actors is None:
        return pipeline.run(model, sources, made.job, **given)
    from vitviz.runs import ray_engine  # which other runs need not know

    return ray_engine.run(model, sources, made.job, actors=actors, **given)


def _require_engine(run: WritingRun) -> None:
    """Make sure that what shall do the work is there, and that no other has been given options."""
    if run.engine is Engine.RAY:
        require_ray()
    elif given := "--ray-address" * (run.ray_address is not None) or "--actors" * (
        read_count(run.actors, "--actors") is not None
    ):
        raise OptionError(f"{given} is for clusters; add --engine ray")


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
        format=PictureFormat.GIF if is_png and method.is_animated else run.format,
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
        from vitviz.cli.reporting import open_for_people

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
        raise OptionError("--show draws on a terminal, but stderr is not a terminal; leave it out")


def _kinds(run: WritingRun) -> tuple[OutputKind, ...]:
    """Return the kinds of files that are asked for, and make sure that all makes sense."""
    saved = dict.fromkeys(run.save)
    if Saved.NONE in saved and len(saved) > 1:
        others = ", ".join(saved.keys() - {Saved.NONE})
        raise OptionError(f"--save none and {others} are both given; leave one out")
    if run.records is not None:
        require_parquet(run.records)
    elif Saved.TABLE in saved:
        raise OptionError("--save table needs a table; name one, as --records maps.parquet")
    elif Saved.NONE in saved and not run.as_json:
        raise OptionError("--save none leaves nothing; add --records maps.parquet or --json")
    kinds = tuple(OutputKind(each) for each in saved if each not in (Saved.TABLE, Saved.NONE))
    if run.report and not kinds:
        raise OptionError("--report is about files, and none is saved; add --save overlay")
    return kinds
