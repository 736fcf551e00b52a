"""What the commands that explain do: find images, load the model, write a map of each."""

from __future__ import annotations

from functools import partial

import typer

from vitviz.cli.leaving import complain, until_reader_leaves
from vitviz.cli.options import RunOptions
from vitviz.cli.signals import Interruption
from vitviz.cli.starting import find, load, read_count, refuse_cheap_mistakes
from vitviz.errors import OutputError
from vitviz.methods.method import Method
from vitviz.options import PictureOptions, ValueRange
from vitviz.runs.job import Job

__all__ = ["explain_images"]


def explain_images(run: RunOptions, method: Method) -> None:
    """Do what an explaining command asks for."""
    from vitviz.runs.writing import prepare_folder

    job = _job(run, method)
    found = find(run)
    refuse_cheap_mistakes(run, found)
    prepare_folder(run.output)
    reporter, model = load(run, found)

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
        value_range=ValueRange.ensure(run.value_range),
        output=run.output,
        skip_existing=run.skip_existing,
        batch_size=read_count(run.batch_size, "--batch-size"),
        workers=read_count(run.workers, "--workers"),
    )
