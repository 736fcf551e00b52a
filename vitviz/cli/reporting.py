"""What ``report`` does: write a page of the maps in a folder."""

from __future__ import annotations

from pathlib import Path

from vitviz.cli.leaving import until_reader_leaves
from vitviz.cli.reporter import Reporter
from vitviz.cli.surroundings import require_working_directory

__all__ = ["report_folder"]


def report_folder(folder: Path) -> None:
    """Write the page of a folder, and print where it is."""
    require_working_directory()
    from vitviz.report.page import write_page

    with until_reader_leaves():
        Reporter().write(write_page(folder))
