"""What a run says on the terminal: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import ControlType
from rich.text import Text

from vitviz.cli.leaving import discard
from vitviz.cli.surroundings import SPELT_OUT
from vitviz.errors import OutputError, printable
from vitviz.explaining.explanation import Prediction
from vitviz.images.sources import Source
from vitviz.runs.records import Result

__all__ = ["Reporter"]

_Item = TypeVar("_Item")

_RESULTS = ("written", "skipped", "failed")
_FEW = 10  # images that people read one by one
_NAMED = 3  # classes of many images


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
        # Asked now: what stands for stdout beside a bar cannot tell before Rich 15.
        self._on_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._counts: Counter[str] = Counter()
        self._best: Counter[str] = Counter()  # classes, of many images
        self._previews = False
        self._total = 0
        self._done = 0.0  # images, and parts of them
        self._bar: Callable[[], None] | None = None
        self._start = time.perf_counter()

    def say(self, text: str, style: str = "") -> None:
        """Say something about the run, unless it is quiet."""
        if not self._quiet:
            self._errors.print(Text(printable(text), style), soft_wrap=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Say on a terminal what is waited for, until something follows."""
        if not self._shows_progress:
            yield
            return
        # Without a newline: a download draws its bar over the line.
        self._errors.print(Text(printable(text)), end="", soft_wrap=True)
        try:
            yield
        finally:
            erase = (ControlType.ERASE_IN_LINE, 2)
            self._errors.control(Control(ControlType.CARRIAGE_RETURN, erase))

    def show(
        self,
        results: Iterable[Result],
        total: int,
        run: dict[str, Any],
        where: Path | None,
        *,
        previews: bool = False,
    ) -> None:
        """Show each result as it comes, under a progress bar where there is a terminal; sum up.

        To people on a terminal it tells what the model said and where the files are; of many images
        in numbers.

        Args:
            results: From the pipeline.
            total: How many there will be.
            run: What is the same for all records.
            where: Where to look for what is written.
            previews: Whether pictures are shown on the terminal, too.

        Raises:
            OutputError: Results cannot be told, as into a file on a full disk.
        """
        method, self._previews = run["run"]["method"], previews
        self.watch(results, total, partial(self._show, run=run), _RESULTS, what=method, where=where)

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
        *,
        what: str,
        where: Path | None = None,
    ) -> None:
        """Tell of items as they come, under a progress bar, and sum up by status.

        Args:
            items: As they come.
            total: How many there will be.
            tell: Called with each; counts it.
            statuses: What can become of an item, what is hoped for first.
            what: What is done to them, for the bar.
            where: Where it is written to, for the last line.
        """
        self._start, self._total, self._done = time.perf_counter(), total, 0.0
        try:
            with closing(self._progress(items, total, what)) as shown:
                for item in shown:
                    tell(item)
        finally:
            is_interrupted = isinstance(sys.exc_info()[1], (KeyboardInterrupt, SystemExit))
            if self._counts or is_interrupted:
                self._summarize(statuses, where)

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
        elif self._speaks and self._total > _FEW and not self._previews:
            self._best.update(_class(best) for best in result.predictions[:1])
        elif self._speaks and result.status == "written":
            self._tell(result)
        elif result.status != "skipped":
            for output in result.outputs:
                self.write(output.path, self._end)
        if self._previews:
            self._preview(result)

    def _preview(self, result: Result) -> None:
        """Show the pictures of an image."""
        from vitviz.cli.previews import Preview, protocol_of, shown_files

        protocol = protocol_of(os.environ)
        for path in shown_files([(output.kind, output.path) for output in result.outputs]):
            self._errors.print(Preview.read(path, protocol))

    def _tell(self, result: Result) -> None:
        """Tell people what the model said of an image, and where its files are."""
        said = [f"{_class(best)} {best.score:.0%}" for best in result.predictions[:1]]
        line = "  ".join([result.source.path.name, *said])
        paths = [f"  → {output.path}" for output in result.outputs]
        whole = "".join([line, *paths])
        fits = len(paths) == 1 and cell_len(printable(whole)) <= self._errors.width
        for text in [whole] if fits else [line, *paths]:
            self.write(text)

    def _summarize(self, statuses: Sequence[str], where: Path | None) -> None:
        """Say how many images there were and how fast they went.

        Args:
            statuses: What can become of an image, what is hoped for first.
            where: Where it is written to.
        """
        if self._best:
            most = sorted(self._best.items(), key=lambda each: (-each[1], each[0]))[:_NAMED]
            others = len(self._best) - len(most)
            named = ", ".join(f"{name} {count:,}" for name, count in most)
            rest = f" and {others:,} other{'s' * (others > 1)}" if others else ""
            self.say(f"best classes: {named}{rest}")
        seconds = time.perf_counter() - self._start
        done = self._counts[statuses[0]]
        parts = [f"{self._counts[status]} {status}" for status in statuses]
        if left := self._total - self._counts.total():
            parts.append(f"{left} not done")
        rate = f", {done / seconds:.1f} images/s" if done and seconds else ""
        place = "" if where is None else f" → {where}"
        self.say(f"{', '.join(parts)} in {seconds:.1f} s{rate}{place}")

    @property
    def failed(self) -> bool:
        """Whether an image failed."""
        return bool(self._counts["failed"])

    @property
    def _shows_progress(self) -> bool:
        return not self._quiet and self._errors.is_terminal

    @property
    def _speaks(self) -> bool:
        """Whether results are for people, who see both streams on one terminal."""
        is_plain = not self._as_json and self._end == b"\n"
        return is_plain and self._shows_progress and self._on_terminal

    def write(self, result: str | Path, end: bytes = b"\n") -> None:
        """Write a result to stdout: paths byte for byte for programs, readable for people.

        Raises:
            OutputError: It cannot be told, as into a file on a full disk.
        """
        text = str(result)
        if sys.stdout is None:  # closed before we came
            return
        if not self._on_terminal:
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

    def _progress(
        self, results: Iterable[_Item], total: int, what: str
    ) -> Generator[_Item, None, None]:
        if not self._shows_progress:
            yield from results
            return
        columns = (
            TextColumn(what),
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


def _class(prediction: Prediction) -> str:
    """Name a class by the first of its synonyms."""
    label = prediction.class_label or f"class {prediction.class_index}"
    return label.partition(",")[0]


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
