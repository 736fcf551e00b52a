"""The program: ``vitviz``, and ``python -m vitviz``."""

import os
import signal
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

    run()


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


if __name__ == "__main__":
    main()
