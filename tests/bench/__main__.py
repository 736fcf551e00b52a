"""The command: runs each row in a process of its own, shows a table and writes it as JSON."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from tests.bench import growth
from tests.bench.figures import Row, Setting, SkippedError
from tests.bench.machine import machine, versions
from tests.bench.rows import ROWS

_ROOT = Path(__file__).parents[2]
_OUTPUT = Path(".bench")
_TAIL = 4000  # characters of what a crashed row said

_progress = Console(stderr=True, highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run this row only; repeatable.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Try it out: fewer rounds, fewer images.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = _OUTPUT / "bench.json",
    plot: Annotated[Path, typer.Option(help="Where the plot goes.")] = _OUTPUT / "growth.png",
    row: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run this row here and print its JSON.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(hidden=True, help="What rows share, already made.")
    ] = None,
) -> None:
    """Measure what vitviz costs, as multiples of plain forward passes."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # clears up
    with _shared(folder) as shared:
        setting = Setting(folder=shared, quick=quick)
        if row:
            (chosen,) = _chosen([row])
            print(json.dumps(_measure(chosen, setting)))
            return
        records = _run(_chosen(only), setting, output, plot)
    Console().print(_table(records))
    if any("error" in record for record in records):
        raise typer.Exit(1)


@contextlib.contextmanager
def _shared(folder: Path | None) -> Iterator[Path]:
    """Give the folder that rows share: the one already made, or one for this run alone."""
    if folder:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="vitviz-bench-") as temporary:
        yield Path(temporary)


def _chosen(names: Iterable[str] | None) -> list[Row]:
    """Return the rows asked for; all that can run here when none is named."""
    if not names:
        return [row for row in ROWS.values() if not row.cuda or torch.cuda.is_available()]
    if unknown := [name for name in names if name not in ROWS]:
        raise typer.BadParameter(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    return [ROWS[name] for name in names]


def _run(rows: Iterable[Row], setting: Setting, output: Path, plot: Path) -> list[dict[str, Any]]:
    """Measure rows one after the other; what is known is on the disk after each."""
    about = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": setting.quick,
        "machine": machine(),
        "versions": versions(_ROOT),
    }
    records: list[dict[str, Any]] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        with _progress.status(row.title):
            record = _measure_apart(row, setting)
        records.append(record)
        _progress.print("\n".join(_lines(record)), soft_wrap=True)
        output.write_text(json.dumps({**about, "rows": records}, indent=2, ensure_ascii=False))
        if row.name == "costs" and "notes" in record:
            growth.draw(record["notes"], plot)
    return records


def _measure(row: Row, setting: Setting) -> dict[str, Any]:
    """Measure a row in this process; stdout is kept for what it tells."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            if row.cuda and not torch.cuda.is_available():
                raise SkippedError("no CUDA device here")
            for make in row.needs:
                make(setting)
            return row.measure(setting).record()
        except SkippedError as reason:
            return {"skipped": str(reason)}


def _measure_apart(row: Row, setting: Setting) -> dict[str, Any]:
    """Measure a row in a process of its own, so that it neither gives nor gets anything."""
    for make in row.needs:
        make(setting)
    words = [sys.executable, "-m", "tests.bench", "--row", row.name]
    start = time.perf_counter()
    done = subprocess.run(
        [*words, "--folder", str(setting.folder), *["--quick"] * setting.quick],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    about = {"name": row.name, "title": row.title, "seconds": time.perf_counter() - start}
    if done.returncode:
        said = done.stderr.strip() or f"ended with {done.returncode}"
        return {**about, "error": said.splitlines()[-1], "stderr": said[-_TAIL:]}
    return {**about, **json.loads(done.stdout)}


def _table(records: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(title="vitviz benchmark")
    table.add_column("row", no_wrap=True)
    table.add_column("what")
    for column in ("figure", "min – max", "goal", "met"):
        table.add_column(column, justify="right", no_wrap=True)
    for record in records:
        if problem := _problem(record):
            table.add_row(record["name"], problem)
        for number, figure in enumerate(record.get("figures", ())):
            cells = figure["label"], _value(figure), _range(figure), figure["goal"] or ""
            table.add_row("" if number else record["name"], *cells, _verdict(figure))
    return table


def _lines(record: Mapping[str, Any]) -> list[str]:
    """Say a row in plain lines, as soon as it is known."""
    taken = f"{record['name']} ({record['seconds']:.0f} s)"
    if problem := _problem(record):
        return [f"{taken} {problem}"]
    return [
        " ".join(filter(None, (taken, figure["label"], _value(figure), _verdict(figure))))
        for figure in record["figures"]
    ]


def _problem(record: Mapping[str, Any]) -> str | None:
    for kind in ("error", "skipped"):
        if kind in record:
            return f"{kind}: {record[kind]}"
    return None


def _value(figure: Mapping[str, Any]) -> str:
    if figure["median"] is None:
        return "not measured"
    return f"{figure['median']:.3g} {figure['unit']}".rstrip()


def _range(figure: Mapping[str, Any]) -> str:
    if figure["rounds"] < 2:
        return ""
    return f"{figure['min']:.3g} – {figure['max']:.3g}"


def _verdict(figure: Mapping[str, Any]) -> str:
    return {None: "", True: "yes", False: "no"}[figure["met"]]


if __name__ == "__main__":
    app()
