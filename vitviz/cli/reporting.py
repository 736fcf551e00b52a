"""What ``report`` does, write a page of the maps in a folder; and what opens it."""

from __future__ import annotations

from pathlib import Path

import typer

from vitviz.cli.leaving import until_reader_leaves
from vitviz.cli.reporter import Reporter
from vitviz.cli.surroundings import require_working_directory
from vitviz.errors import printable

__all__ = ["open_for_people", "report_folder"]


def report_folder(folder: Path, *, opened: bool) -> None:
    """Write the page of a folder, print where it is, and open it."""
    require_working_directory()
    from vitviz.report.page import write_page

    with until_reader_leaves():
        page = write_page(folder)
        Reporter().write(page)
        if opened:
            open_for_people(page)


def open_for_people(path: Path) -> None:
    """Open a page or a folder in what the system has for it, or say that it has nothing."""
    if typer.launch(str(path.absolute())):
        typer.echo(f"nothing here opens {printable(str(path))}; open it elsewhere", err=True)
