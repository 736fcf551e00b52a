"""Labels and values in two columns."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

__all__ = ["INDENT", "LABEL_WIDTH", "show_rows"]


_Row = tuple[str, str]
INDENT = 3
LABEL_WIDTH = 15


def show_rows(
    console: Console,
    rows: Iterable[_Row],
    *,
    indent: int = INDENT,
    width: int = LABEL_WIDTH,
    style: str = "cyan",
) -> None:
    """Print labels and values in two columns; the values wrap between words.

    Args:
        console: Where to.
        rows: Labels, each with its value.
        indent: Of the labels.
        width: Of the labels' column.
        style: Of the labels.
    """
    column = indent + width
    for label, value in rows:
        # Wrapped here, not in a table, which pads every line with blanks to its full width.
        for number, line in enumerate(Text(value).wrap(console, max(console.width - column, 20))):
            line.rstrip()
            start = " " * indent + (label if number == 0 else "")
            console.print(Text.assemble((start.ljust(column), style), line), soft_wrap=True)
