"""What ``evaluate`` does: find images, load the model, measure methods, show them side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

from vitviz.cli.evaluation_options import EvaluationRun
from vitviz.cli.leaving import complain, until_reader_leaves
from vitviz.cli.signals import Interruption
from vitviz.cli.starting import find, load, read_count, refuse_cheap_mistakes
from vitviz.errors import OptionError, OutputError
from vitviz.evaluation.options import EvaluationOptions, require_matplotlib
from vitviz.options import ValueRange

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.cli.reporter import Reporter
    from vitviz.evaluation.measuring import ImageScores
    from vitviz.evaluation.summary import Evaluation

__all__ = ["evaluate_images"]


def evaluate_images(run: EvaluationRun) -> NoReturn:
    """Do what ``evaluate`` asks for."""
    if run.plot is not None:
        require_matplotlib()
    options = _evaluation_options(run)
    found = find(run)
    refuse_cheap_mistakes(run, found.sources)
    reporter, model = load(run, found)

    from vitviz.evaluation.annotations import read_truth
    from vitviz.evaluation.files import require_places
    from vitviz.evaluation.measuring import measure
    from vitviz.evaluation.summary import summarize
    from vitviz.evaluation.tasks import annotated_images

    require_places(run.csv, run.plot)
    truth = None
    if run.truth is not None:
        truth = read_truth(run.truth, model.labels, model.num_classes)
    images = annotated_images(found.sources, masks=run.masks, truth=truth)
    with until_reader_leaves(), Interruption() as interruption:
        warn = partial(reporter.say, style="yellow")
        scores = measure(model, images, options, warn=warn, advance=reporter.advance)
        kept: list[ImageScores] = []
        try:
            _collect(reporter, interruption.between(scores), len(images), kept)
        finally:  # what was measured before an interruption is told, too
            if len(kept) == len(images) or any(each.cases for each in kept):
                _tell(reporter, summarize(model, options, kept), run)
    raise typer.Exit(int(reporter.failed))


def _collect(
    reporter: Reporter, scores: Iterable[ImageScores], total: int, kept: list[ImageScores]
) -> None:
    """Keep the scores of images as they come, also of those before an interruption."""

    def keep(image: ImageScores) -> None:
        reporter.count("failed" if image.error else "measured", image.source, image.error)
        kept.append(image)

    reporter.watch(scores, total, keep, ("measured", "failed"), what="measuring")


def _tell(reporter: Reporter, evaluation: Evaluation, run: EvaluationRun) -> None:
    """Write what was measured to the files that are asked for, and show it."""
    from vitviz.evaluation.files import save

    try:
        save(evaluation, run.csv, run.plot)
        if run.as_json:
            reporter.write(json.dumps(evaluation.to_dict(), allow_nan=False))
        elif evaluation.images:
            _show_tables(reporter, evaluation, explain=run.explain)
    except OutputError as error:  # it is measured: no reason to leave with 2
        complain(str(error), code=1)


def _show_tables(reporter: Reporter, evaluation: Evaluation, *, explain: bool) -> None:
    """Show methods side by side."""
    from vitviz.cli.evaluation_view import show_evaluation

    console = Console(highlight=False)
    with console.capture() as shown:
        show_evaluation(evaluation, console, explain=explain)
    if console.is_terminal:
        print(shown.get(), end="", flush=True)
    else:  # cells are padded with blanks, which a file has no use for
        reporter.write("\n".join(map(str.rstrip, shown.get().splitlines())))


def _evaluation_options(run: EvaluationRun) -> EvaluationOptions:
    if len(run.targets) > 1:
        raise OptionError(
            f"--class is given {len(run.targets)} times; methods are measured on one class of each "
            "image, or with --class mask on all that its mask names"
        )
    return EvaluationOptions(
        methods=tuple(run.methods),
        target=run.targets[0],
        versus=run.versus,
        convention=run.convention,
        fit=run.fit,
        value_range=ValueRange.ensure(run.value_range),
        batch_size=read_count(run.batch_size, "--batch-size"),
        workers=read_count(run.workers, "--workers"),
        seed=run.seed,
        resamples=run.resamples,
    )
