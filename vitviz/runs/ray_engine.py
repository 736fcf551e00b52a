"""A run as a data set of Ray: blocks of keys go to actors, which write; results come back.

Ray repeats what dies. Nothing here knows a block by its number: images are told from each other by
their place in the run, and rows of a table are in a part that is named by the keys in it.
"""

from __future__ import annotations

import math
import os
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from vitviz.errors import ClusterError, ImageError, first_line
from vitviz.images.remarks import Tally
from vitviz.images.sources import Source
from vitviz.models.model import Model
from vitviz.runs.cluster import Actors
from vitviz.runs.job import Job
from vitviz.runs.pipeline import Finish, set_up, unfinished, up_to_fatal_error
from vitviz.runs.ray_actors import Actor, Order, Report
from vitviz.runs.records import Beside, Result, failure
from vitviz.runs.rows import RowWriter, opened_table, spelled
from vitviz.runs.tables import RecordsTable

__all__ = ["run"]

_MOST, _FEW = 1024, 32  # images of a block: what a part of a table has, and what fills a model
_BLOCKS = 8  # for each actor, so that none waits long for the others at the end
_ATTEMPTS = 3  # at a block whose actor dies
_AHEAD = 2  # blocks that an actor has been given: the one that it works on, and the next


def run(
    model: Model,
    sources: Sequence[Source],
    job: Job,
    *,
    actors: Actors,
    finish: Finish = unfinished,
    beside: Beside | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Generator[Result, None, None]:
    """Explain images on a cluster, yielding one result per image, as they come in.

    Args:
        model: The model; each actor has a copy of it.
        sources: As for ``pipeline.run``.
        job: What to do with them.
        actors: Who does it.
        finish: As for ``pipeline.run``.
        beside: Likewise, but in an actor.
        warn: As for ``pipeline.run``.

    Raises:
        VitvizError: As for ``pipeline.run``.
        ClusterError: The actors cannot work.
    """
    job = replace(job, workers=job.workers or actors.cores)
    setup, sources = set_up(model, sources, job, finish=finish, beside=beside)
    order = Order(model=model, setup=setup, actors=actors)
    tally = Tally()
    with opened_table(setup.writer, sources) as table:
        driver = _Driver(order, sources, table, tally, warn)
        yield from up_to_fatal_error(driver.results())
    tally.tell(warn)


class _Driver:
    """Gives blocks to actors, and knows what has come back."""

    def __init__(
        self,
        order: Order,
        sources: Sequence[Source],
        table: RecordsTable | None,
        tally: Tally,
        warn: Callable[[str], None],
    ) -> None:
        self._order, self._sources, self._table = order, sources, table
        self._writer = order.setup.writer
        self._tally, self._warn = tally, warn
        self._told = bytearray(len(sources))
        self._said: set[str] = set()

    def results(self) -> Generator[Result, None, None]:
        """Yield a result for each image.

        What is lost with an actor that dies again and again is tried once more, an image at a
        time: only those at which it dies fail.
        """
        places: Sequence[int] = range(len(self._sources))
        for size, ahead in ((self._block_size(), _AHEAD), (1, 1)):
            if places:
                blocks = [places[at : at + size] for at in range(0, len(places), size)]
                places = yield from self._worked_on(blocks, ahead)
        for place in places:
            yield from self._new([(place, self._died(self._sources[place]))])

    def _block_size(self) -> int:
        images, actors = len(self._sources), self._order.actors.count
        size = min(max(math.ceil(images / actors / _BLOCKS), _FEW), _MOST)
        return max(1, min(size, math.ceil(images / actors)))

    def _worked_on(
        self, blocks: list[Sequence[int]], ahead: int
    ) -> Generator[Result, None, list[int]]:
        """Yield results of blocks; return the places of those that are not done."""
        left = {block[0]: block for block in blocks}
        held: dict[int, list[Result]] = defaultdict(list)
        for report in _reports(self._order, map(self._packed, blocks), len(blocks), ahead):
            self._say(report.warnings)
            yield from self._new(report.results)
            if report.error:
                raise report.error
            if self._table:
                held[report.block] += (result for _, result in report.results)
            if report.tally and left.pop(report.block, None):
                self._tally.update(report.tally)
                self._replace(held.pop(report.block, []))
        for block in left.values():  # what of their rows is there comes again in other parts
            if part := self._order.part(self._keys(block)):
                part.unlink(missing_ok=True)
        return [place for block in left.values() for place in block]

    def _new(self, results: Sequence[tuple[int, Result]]) -> Iterator[Result]:
        """Yield what has not been told: a block that is repeated is reported again."""
        for place, result in results:
            if not self._told[place]:
                self._told[place] = True
                yield result

    def _say(self, texts: Sequence[str]) -> None:
        for text in texts:
            if text not in self._said:  # by another actor
                self._said.add(text)
                self._warn(text)

    def _replace(self, results: Sequence[Result]) -> None:
        """Take note of rows that are there now."""
        for result in results:
            if self._table and result.status != "skipped":
                failed, requests = result.error is not None, self._writer.requests
                self._table.replaced(spelled(result.source.key), requests, failed=failed)

    def _died(self, source: Source) -> Result:
        times = f"{_ATTEMPTS} times"
        result = failure(source, ImageError(f"the process that worked on it died, {times}"))
        return RowWriter(self._writer, self._table).add((), result) if self._table else result

    def _keys(self, block: Sequence[int]) -> list[bytes]:
        return [os.fsencode(self._sources[place].key) for place in block]

    def _packed(self, block: Sequence[int]) -> dict[str, Any]:
        """Put what an actor must know of images into columns."""
        sources = [self._sources[place] for place in block]
        origins = [each.origin and pickle.dumps(each.origin) for each in sources]
        recipes = None
        if self._table and self._writer.job.skip_existing:
            table, requests = self._table, self._writer.requests
            keys = [spelled(each.key) for each in sources]
            recipes = [[table.recipe(key, request) for request in requests] for key in keys]
        return {
            "place": block,
            "path": [os.fsencode(each.path) for each in sources],
            "key": self._keys(block),
            "origin": origins,
            "recipes": recipes or [None] * len(sources),
        }


def _reports(
    order: Order, blocks: Iterator[dict[str, Any]], count: int, ahead: int
) -> Iterator[Report]:
    """Have actors work on blocks, and yield what they tell as it comes in."""
    import pyarrow as pa
    import ray

    _set_up_data_sets()
    text, number = pa.binary(), pa.int64()
    columns = {"place": number, "path": text, "key": text, "origin": text}
    schema = pa.schema([*columns.items(), ("recipes", pa.list_(pa.string()))])
    known = ray.put(order)
    actors = order.actors
    data = ray.data.from_arrow_refs([ray.put(pa.table(each, schema=schema)) for each in blocks])
    with warnings.catch_warnings():
        # The last argument leaves in 2.64; by default, Ray tries for ever what kills its actors.
        warnings.simplefilter("ignore", DeprecationWarning)
        data = data.map_batches(
            Actor,
            fn_constructor_args=(lambda: ray.get(known),),
            batch_size=None,  # a block
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=min(actors.count, count), max_tasks_in_flight_per_actor=ahead
            ),
            num_cpus=None if actors.on_gpu else actors.cores,
            num_gpus=1 if actors.on_gpu else None,
            max_task_retries=_ATTEMPTS - 1,
        )
    try:
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from map(pickle.loads, batch["report"].to_pylist())
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the actors cannot work: {first_line(error)}") from error


def _set_up_data_sets() -> None:
    """Have Ray Data pass reports on at once, go on when a block is lost, and say nothing."""
    import ray

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1  # bytes: each report is a block of its own
    context.max_errored_blocks = -1  # they are tried again by us
    context.enable_progress_bars = False
    context.print_on_execution_start = False
