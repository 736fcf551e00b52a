"""The program: ``vitviz``, and ``python -m vitviz``."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line; an interruption while it loads or leaves ends it without a word.

    There is nothing to finish then, and half an import may swallow an exception or dress it up.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave_at_once)
    from vitviz.cli import main as run

    try:
        run()
    except SystemExit as left:
        _leave(left)


def _leave(left: SystemExit) -> NoReturn:
    """Leave; where torch is loaded, without taking apart what it has made.

    That takes a second and more, and the bindings of Triton, which torch brings for GPUs, complain
    at length of objects that the garbage collector was told to leave alone.
    """
    if "torch" in sys.modules and isinstance(left.code, int):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed before we came
                stream.flush()
        os._exit(left.code)
    raise left


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


if __name__ == "__main__":
    main()
