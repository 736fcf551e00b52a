"""Ways to leave: with one line, or quietly when whoever reads our results has left."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

import typer

from vitviz.errors import printable

__all__ = ["complain", "discard", "forget", "until_reader_leaves"]


def complain(message: str, code: int = 2) -> NoReturn:
    """Say in one line what is wrong, and leave."""
    typer.echo(f"Error: {printable(message)}", err=True)
    sys.exit(code)


@contextmanager
def until_reader_leaves() -> Iterator[None]:
    """Leave quietly when whoever reads our results has left."""
    try:
        yield
    except BrokenPipeError:
        forget(sys.stdout, sys.stderr)
        sys.exit(141)


def forget(*streams: TextIO) -> None:
    """Drop what streams cannot tell any more, so that leaving does not fail over it."""
    for stream in streams:
        discard(stream)


def discard(stream: TextIO) -> None:
    """Send what a stream still holds nowhere, so that leaving does not fail over it."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)
