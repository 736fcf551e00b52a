"""Actors of a cluster: what each is told, what it does with a block of images, what it tells back.

Loads no Ray: to a process of Ray's, this is a class like any other.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vitviz.errors import ClusterError, OutputError, VitvizError
from vitviz.images.remarks import Tally
from vitviz.images.sources import Source
from vitviz.models.model import Model
from vitviz.runs.cluster import Actors
from vitviz.runs.pipeline import Setup, explained
from vitviz.runs.records import Result
from vitviz.runs.rows import RowWriter, spelled, table_folder
from vitviz.runs.tables import BlockTable, part_name

__all__ = ["Actor", "Order", "Report"]

_REPORTS = 4  # of a block, each of which costs Ray some 50 ms


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """What every actor is told.

    Attributes:
        model: The model.
        setup: What to do.
        actors: How many there are, and what each has.
        folder: Where the command was given: what paths are relative to.
        begun: When, in nanoseconds.
    """

    model: Model
    setup: Setup
    actors: Actors
    folder: Path = field(default_factory=Path.cwd)
    begun: int = field(default_factory=time.time_ns)

    def part(self, keys: Iterable[bytes]) -> Path | None:
        """Return where the rows of a block go; None where there is no table."""
        job = self.setup.writer.job
        if job.records is None:
            return None
        digest = hashlib.sha256(b"\0".join(keys)).hexdigest()
        return table_folder(job) / part_name(self.begun, digest[:16])


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an actor tells of a block.

    Attributes:
        block: The place in the run of its first image.
        results: What became of some of its images, by their places in the run.
        warnings: What the user should know.
        tally: What may mislead in the whole block; comes with its last images, when all is written.
        error: Why no actor can go on.
    """

    block: int
    results: tuple[tuple[int, Result], ...] = ()
    warnings: tuple[str, ...] = ()
    tally: Tally | None = None
    error: Exception | None = None


class Actor:
    """Explains blocks of images in a process of Ray's; holds the model."""

    def __init__(self, order: Callable[[], Order]) -> None:
        """Know where the order is; it is looked at when work comes, to tell of what is wrong."""
        self._fetch = order
        self._order: Order | None = None

    def __call__(self, block: Any) -> Iterator[dict[str, list[bytes]]]:
        """Work on a block, which is a table of Arrow."""
        for report in self.reports(block):
            yield {"report": [pickle.dumps(report)]}

    def reports(self, block: Any) -> Iterator[Report]:
        """Tell what becomes of the images of a block."""
        columns = block.to_pydict()
        first = columns["place"][0]
        try:
            self._order = self._order or _taken_up(self._fetch())
            yield from _explained(self._order, columns)
        except VitvizError as error:
            yield Report(block=first, error=error)
        except Exception:  # a mistake of ours: told where somebody sees it
            text = f"an actor failed:\n{traceback.format_exc()}"
            yield Report(block=first, error=RuntimeError(text))


def _taken_up(order: Order) -> Order:
    """Make an actor's process what the order expects."""
    try:
        os.chdir(order.folder)
    except OSError as error:
        raise ClusterError(
            f"the actors have no folder {order.folder}: {error.strerror}; work in one that all "
            "machines of the cluster share"
        ) from error
    warnings.filterwarnings("ignore")  # nobody reads what an actor says
    torch.set_num_threads(order.actors.cores)
    order.model.module.to(order.actors.device)
    return order


def _explained(order: Order, columns: dict[str, list[Any]]) -> Iterator[Report]:
    """Explain the images of a block, a few to a report."""
    sources = list(map(_source, columns["path"], columns["key"], columns["origin"]))
    writer, rows, table = order.setup.writer, None, None
    if path := order.part(columns["key"]):
        recipes = {
            (spelled(source.key), request): recipe
            for source, given in zip(sources, columns["recipes"], strict=True)
            for request, recipe in zip(writer.requests, given or (), strict=False)
        }
        table = BlockTable(path, recipes)
        rows = RowWriter(writer, table)
    heard: list[str] = []
    tally = Tally()
    results = explained(order.model, order.setup, sources, rows, tally, heard.append)
    placed = zip(columns["place"], results, strict=True)
    # Ray goes on with a block that is repeated at the report where it broke off: the same images
    # must be in the same report each time, however long they take.
    size = math.ceil(len(sources) / _REPORTS)
    for left in range(len(sources), 0, -size):
        is_last = left <= size
        some = tuple(islice(placed, None if is_last else size))
        report = Report(block=columns["place"][0], results=some, warnings=tuple(heard))
        heard.clear()
        yield _ended(report, tally, table) if is_last else report


def _ended(report: Report, tally: Tally, table: BlockTable | None) -> Report:
    """Complete the last report of a block, once its rows are written."""
    try:
        if table:
            table.close()
    except OutputError as error:
        return replace(report, error=error)
    return replace(report, tally=tally)


def _source(path: bytes, key: bytes, origin: bytes | None) -> Source:
    known = None if origin is None else pickle.loads(origin)
    return Source(path=Path(os.fsdecode(path)), key=os.fsdecode(key), origin=known)
