"""What a run says on the terminal: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vitviz.cli.leaving import discard
from vitviz.cli.surroundings import SPELT_OUT
from vitviz.errors import OutputError, printable
from vitviz.images.sources import Source
from vitviz.runs.records import Result

__all__ = ["Reporter"]

_Item = TypeVar("_Item")

_RESULTS = ("written", "skipped", "failed")


class Reporter:
    """Shows a run as it goes."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False, nul: bool = False) -> None:
        """Choose what is shown.

        Args:
            quiet: Only results and failures.
            as_json: Results as one JSON object a line, instead of one path a line.
            nul: End paths with NUL instead of a newline.
        """
        self._quiet = quiet
        self._as_json = as_json
        self._end = b"\0" if nul else b"\n"
        self._errors = Console(stderr=True, highlight=False)
        self._counts: Counter[str] = Counter()
        self._total = 0
        self._done = 0.0  # images, and parts of them
        self._bar: Callable[[], None] | None = None
        self._start = time.perf_counter()

    def say(self, text: str, style: str = "") -> None:
        """Say something about the run, unless it is quiet."""
        if not self._quiet:
            self._errors.print(Text(printable(text), style), soft_wrap=True)

    def show(self, results: Iterable[Result], total: int, run: dict[str, Any]) -> None:
        """Show each result as it comes, under a progress bar where there is a terminal; sum up.

        Args:
            results: From the pipeline.
            total: How many there will be.
            run: What is the same for all records.

        Raises:
            OutputError: Results cannot be told, as into a file on a full disk.
        """
        self.watch(results, total, partial(self._show, run=run), _RESULTS)

    def advance(self, images: float) -> None:
        """Move the bar on by what is done of images that no result tells of yet."""
        self._done = min(self._done + images, self._total)
        if self._bar:
            self._bar()

    def watch(
        self,
        items: Iterable[_Item],
        total: int,
        tell: Callable[[_Item], None],
        statuses: Sequence[str],
    ) -> None:
        """Tell of items as they come, under a progress bar, and sum up by status.

        Args:
            items: As they come.
            total: How many there will be.
            tell: Called with each; counts it.
            statuses: What can become of an item, what is hoped for first.
        """
        self._start, self._total, self._done = time.perf_counter(), total, 0.0
        try:
            with closing(self._progress(items, total)) as shown:
                for item in shown:
                    tell(item)
        finally:
            self._summarize(statuses)

    def count(self, status: str, source: Source, error: str | None) -> None:
        """Count what became of an image, and tell why it failed if it did."""
        self._counts[status] += 1
        if error:
            text = f"failed: {source.name}: {error}"
            self._errors.print(Text(printable(text), "red"), soft_wrap=True)

    def _show(self, result: Result, run: dict[str, Any]) -> None:
        self.count(result.status, result.source, result.error)
        if self._as_json:
            self.write(json.dumps(_record(result, run)))
        elif result.status != "skipped":
            for output in result.outputs:
                self.write(output.path, self._end)

    def _summarize(self, statuses: Sequence[str]) -> None:
        """Say how many images there were and how fast they went, if there were any.

        Args:
            statuses: What can become of an image, what is hoped for first.
        """
        if not self._counts:
            return
        seconds = time.perf_counter() - self._start
        done = self._counts[statuses[0]]
        parts = [f"{self._counts[status]} {status}" for status in statuses]
        if left := self._total - self._counts.total():
            parts.append(f"{left} not done")
        rate = f", {done / seconds:.1f} images/s" if done and seconds else ""
        self.say(f"{', '.join(parts)} in {seconds:.1f} s{rate}")

    @property
    def failed(self) -> bool:
        """Whether an image failed."""
        return bool(self._counts["failed"])

    @property
    def _shows_progress(self) -> bool:
        return not self._quiet and self._errors.is_terminal

    def write(self, result: str | Path, end: bytes = b"\n") -> None:
        """Write a result to stdout: paths byte for byte for programs, readable for people.

        Raises:
            OutputError: It cannot be told, as into a file on a full disk.
        """
        text = str(result)
        if sys.stdout is None:  # closed before we came
            return
        if not sys.stdout.isatty():
            is_path = isinstance(result, Path)
            content = os.fsencode(text) if is_path else text.encode(sys.stdout.encoding, SPELT_OUT)
            try:
                sys.stdout.buffer.write(content + end)
                sys.stdout.buffer.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                discard(sys.stdout)
                raise OutputError(f"results cannot be told on stdout: {error.strerror}") from error
        elif self._shows_progress:  # one terminal for both: the line goes above the bar
            self._errors.print(Text(printable(text)), soft_wrap=True)
        else:
            print(printable(text), flush=True)

    def _progress(self, results: Iterable[_Item], total: int) -> Generator[_Item, None, None]:
        if not self._shows_progress:
            yield from results
            return
        columns = (
            TextColumn("explaining"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._errors, transient=True) as progress:
            task = progress.add_task("", total=total, rate="")

            def move() -> None:
                rate = self._done / (time.perf_counter() - self._start)
                progress.update(task, completed=self._done, rate=f"{rate:.1f} images/s")

            self._bar = move
            for result in results:
                yield result
                self._done = max(self._done, self._counts.total())
                move()
            self._bar = None


def _record(result: Result, run: dict[str, Any]) -> dict[str, Any]:
    """Return the NDJSON record of a result."""
    return {
        "source": result.source.name,
        "status": result.status,
        "outputs": [output.to_record() for output in result.outputs],
        "predictions": [asdict(prediction) for prediction in result.predictions],
        **run,
        "error": result.error,
    }
