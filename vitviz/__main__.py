"""The program: ``vitviz``, and ``python -m vitviz``."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

__all__ = ["main"]

_INTERRUPTED = 128 + signal.SIGINT


def main() -> NoReturn:
    """Run the command line; an interruption while it loads or leaves ends it without a word.

    There is nothing to finish then, and half an import may swallow an exception or dress it up.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as of a shell's job in the background
            signal.signal(number, _leave_at_once)
    from vitviz.cli.app import main as run

    try:
        run()
    except SystemExit as left:
        _leave(left)


def _leave(left: SystemExit) -> NoReturn:
    """Leave; where torch is loaded, without taking apart what it has made.

    That takes a second and more, and the bindings of Triton, which torch brings for GPUs, complain
    at length of objects that the garbage collector was told to leave alone.
    """
    if isinstance(left.code, int) and ("torch" in sys.modules or left.code == _INTERRUPTED):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed before we came
                stream.flush()
        if left.code == _INTERRUPTED:
            _leave_at_once(signal.SIGINT, None)
        os._exit(left.code)
    raise left


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Leave with a signal's exit code; after Ctrl-C at a terminal by the signal itself.

    A shell would go on with its loop if a command that was interrupted ended in any other way.
    """
    if number == signal.SIGINT and sys.stderr is not None and sys.stderr.isatty():
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(128 + number)


if __name__ == "__main__":
    main()
