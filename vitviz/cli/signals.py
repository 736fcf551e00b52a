"""Ctrl-C and SIGTERM while work is going on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from types import FrameType
from typing import TypeVar

from vitviz.streaming import stop_with

__all__ = ["Interruption"]

_Result = TypeVar("_Result")
_ECHO = 0.2  # seconds: `timeout` and others send a signal twice, people are slower


class Interruption:
    """Lets Ctrl-C and SIGTERM end the work: what is being written is finished and told first.

    A second one ends the process at once; a temporary file that it may leave goes with the next
    run.
    """

    def __init__(self) -> None:
        """Wait for the first signal."""
        self._came: float | None = None
        self._telling = False
        self._put_off: SystemExit | None = None

    def __enter__(self) -> Interruption:
        """Take the signals over, except for what our parent had us ignore."""
        signals = (signal.SIGINT, signal.SIGTERM)
        heeded = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._come) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def between(self, results: Generator[_Result, None, None]) -> Iterator[_Result]:
        """Yield results so that none is lost by an interruption while another is told."""
        with closing(results):  # so that what is being written is whole before a command leaves
            for result in results:
                self._telling = True
                yield result
                self._telling = False
                if self._put_off:
                    error, self._put_off = self._put_off, None  # once: what follows comes in peace
                    yield from stop_with(results, error)

    def _come(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._came is not None:
            if now - self._came > _ECHO:
                leave_at_once = self._before[signal.Signals(number)]
                if callable(leave_at_once):  # as the program's own
                    leave_at_once(number, frame)
                os._exit(128 + number)
            return
        self._came = now
        if not self._telling:
            sys.exit(128 + number)
        self._put_off = SystemExit(128 + number)
