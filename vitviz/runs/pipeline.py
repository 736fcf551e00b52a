"""Sources → files and results: streams a run through explaining to a sink; never prints.

Three stages pull on each other: threads read and decode, the calling thread runs the model in
full batches, threads draw and write. Each holds only a bounded number of images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from vitviz.errors import ImageError, OutputError
from vitviz.explaining.batch import class_requests
from vitviz.explaining.samples import (
    Explained,
    Failed,
    explain_samples,
    images_at_once,
    input_transform,
)
from vitviz.images.decoding import ImageFile, read_file
from vitviz.images.fitting import InputTransform
from vitviz.images.remarks import Remark, Tally
from vitviz.images.samples import ImageSample, load_sample
from vitviz.images.sources import Source
from vitviz.models.model import Model
from vitviz.options import Fit
from vitviz.runs.job import Job
from vitviz.runs.records import Beside, Result, Writer, failure
from vitviz.runs.rows import RowWriter, opened_table
from vitviz.runs.writing import sweep
from vitviz.streaming import map_ahead, stop_with, worker_threads

__all__ = [
    "Finish",
    "Item",
    "Setup",
    "set_up",
    "count_caveats",
    "explained",
    "run",
    "unfinished",
    "up_to_fatal_error",
]

_READERS = 16  # threads that wait for stores, far more than there are cores

_Other = TypeVar("_Other")
Item = Explained | Failed | Result
Finish = Callable[[Model, Iterator[Item]], Iterator[Item]]


def unfinished(model: Model, items: Iterator[Item]) -> Iterator[Item]:
    """Leave images as they are before they are written."""
    return items


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a process needs for any part of a run, beside the model; it can be pickled.

    Attributes:
        writer: Writes the files, and knows what to do with each image.
        transform: How images are brought to the model's size.
        finish: What is done to each image that is explained before it is written.
    """

    writer: Writer
    transform: InputTransform
    finish: Finish


def run(
    model: Model,
    sources: Sequence[Source],
    job: Job,
    *,
    finish: Finish = unfinished,
    beside: Beside | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Generator[Result, None, None]:
    """Explain images and write their maps, yielding one result per image in the order given.

    Results of what is being written when an error is thrown in are yielded before it is raised.

    Args:
        model: The model; it is left as it was.
        sources: The images; of these, all that the job's shard holds are explained.
        job: What to do with them.
        finish: What is done to each image that is explained before it is written.
        beside: Is given each image and its maps once its files are written, in whatever thread.
        warn: Is told what the user should know while the work goes on.

    Raises:
        VitvizError: As for ``set_up``; an image that fails is a result, not an error.
        OutputError: Nothing can be written any more, as on a full disk: of ten thousand images all
            would fail alike, each after the model has run for it.
    """
    setup, sources = set_up(model, sources, job, finish=finish, beside=beside)
    tally = Tally()
    with opened_table(setup.writer, sources) as table:
        rows = RowWriter(setup.writer, table) if table else None
        yield from up_to_fatal_error(explained(model, setup, sources, rows, tally, warn))
    tally.tell(warn)


def set_up(
    model: Model,
    sources: Sequence[Source],
    job: Job,
    *,
    finish: Finish,
    beside: Beside | None,
) -> tuple[Setup, Sequence[Source]]:
    """Make sure that a run makes sense, and clear up behind earlier ones.

    Args:
        model: As for ``run``, like all others.
        sources: All images.
        job: What to do with them.
        finish: What is done before they are written.
        beside: What is given them then.

    Returns:
        What its processes need, and the images that the job's shard holds.

    Raises:
        VitvizError: The options do not fit the model, or the model cannot be explained.
        SourceError: An output would overwrite a source.
    """
    requests = tuple(request.key for request in class_requests(model, job.method)) or (None,)
    if job.fit is not Fit.NATIVE:  # there, each shape has a grid of its own
        job.method.require_grid(model.layout.grid)
    transform = input_transform(model, job.fit, job.value_range)
    writer = Writer(model=model.record, job=job, requests=requests, beside=beside)
    return Setup(writer=writer, transform=transform, finish=finish), _own_part(writer, sources)


def explained(
    model: Model,
    setup: Setup,
    sources: Sequence[Source],
    rows: RowWriter | None,
    tally: Tally,
    warn: Callable[[str], None],
) -> Generator[Result, None, None]:
    """Explain images and write what belongs to them, yielding one result per image, in order.

    Args:
        model: The model; it is left as it was.
        setup: What to do.
        sources: The images.
        rows: Where their rows go, if they have any.
        tally: Counts what may mislead.
        warn: As for ``run``.
    """
    writer, job = setup.writer, setup.writer.job
    batch_size = job.batch_size or images_at_once(model)
    depth = 2 * batch_size  # how far each stage may be ahead: enough for the model to have a batch
    with ExitStack() as room:
        pool = room.enter_context(worker_threads(job.workers))
        files = _files(room, partial(_read, writer, rows), sources, depth)
        prepared = map_ahead(pool, partial(_load, job, setup.transform), files, depth)
        maps = explain_samples(
            model, prepared, job.method, pictures=job.pictures, batch_size=batch_size, warn=warn
        )
        counted = count_caveats(setup.finish(model, maps), tally)
        yield from map_ahead(pool, partial(_write, writer, rows), counted, depth, drain=True)


def _own_part(writer: Writer, sources: Sequence[Source]) -> Sequence[Source]:
    """Return the images of this run, and make sure that their files can be written."""
    job = writer.job
    writer.refuse_overwriting(sources)
    part = job.part_of(sources)  # only now: no shard may overwrite what another one reads
    sweep({job.output, *(path.parent for each in part for path, _, _ in writer.files(each))})
    return part


def count_caveats(
    items: Iterable[Explained | _Other], tally: Tally
) -> Iterator[Explained | _Other]:
    """Pass items on, and count what may mislead in them."""
    for item in items:
        if isinstance(item, Explained):
            name = item.sample.source.name
            tally.add(item.sample.remarks, "image", name)
            for explanation in item.maps:
                found = (Remark(*caveat.value) for caveat in explanation.caveats())
                tally.add(found, "map", name)
        yield item


def _files(
    room: ExitStack,
    read: Callable[[Source], ImageFile | Result],
    sources: Sequence[Source],
    depth: int,
) -> Iterable[Callable[[], ImageFile | Result]]:
    """Return, for each image, what gives its file: now where it is local, else as it comes in.

    Stores answer late: many threads wait for them, which is no work for as many cores.
    """
    if not any(source.origin for source in sources):
        return (partial(read, source) for source in sources)
    readers = room.enter_context(worker_threads(_READERS))
    fetched = map_ahead(readers, read, sources, depth)
    return (partial(_same, item) for item in fetched)


def _read(writer: Writer, rows: RowWriter | None, source: Source) -> ImageFile | Result:
    """Read an image, or find that it needs no work."""
    try:
        file = read_file(source)
        if writer.job.skip_existing and (result := (rows or writer).skipped(file)):
            return result
    except (ImageError, MemoryError) as error:
        return failure(source, error)
    return file


def _same(item: ImageFile | Result) -> ImageFile | Result:
    return item


def _load(
    job: Job, transform: InputTransform, file: Callable[[], ImageFile | Result]
) -> ImageSample | Result:
    """Decode an image that needs work."""
    item = file()
    if isinstance(item, Result):
        return item
    try:
        return load_sample(item, transform, job.pictures.max_size if job.pictures.kinds else 1)
    except (ImageError, MemoryError) as error:
        return failure(item.source, error)


def _write(writer: Writer, rows: RowWriter | None, item: Item) -> Result:
    """Write the files of an image that is explained, and its rows."""
    if isinstance(item, Explained):
        result = writer.write(item.sample, item.maps)
    elif isinstance(item, Failed):
        result = Result(source=item.source, status="failed", error=item.error)
    else:
        result = item
    maps = item.maps if isinstance(item, Explained) else ()
    return rows.add(maps, result) if rows else result


def up_to_fatal_error(
    results: Generator[Result, None, None],
) -> Generator[Result, None, None]:
    """Pass results on until one meets what the others would meet too; it alone tells of that."""
    for result in results:
        fatal = result.fatal_write_error
        stop: BaseException | None = OutputError(fatal) if fatal else None
        try:
            yield result
        except (KeyboardInterrupt, SystemExit) as interruption:
            stop = interruption
        if stop:
            rest = stop_with(results, stop)
            yield from (each for each in rest if each.outputs or not each.fatal_write_error)
