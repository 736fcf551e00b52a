"""Timing in alternating rounds, and peaks of memory; knows nothing of models."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

__all__ = [
    "MEGABYTE",
    "Rounds",
    "allocated",
    "alternate",
    "command",
    "peak",
    "peak_so_far",
    "reset_peak",
]

MEGABYTE = 1e6

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")

Side = Callable[[], object]


@dataclass(frozen=True)
class Rounds:
    """Seconds that each side took, round by round."""

    seconds: dict[str, list[float]]

    def ratios(self, over: str, under: str, factor: float = 1.0) -> list[float]:
        """Divide one side's time by another's in each round, times a factor."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return [factor * first / second for first, second in pairs]

    def milliseconds(self, count: int = 1) -> dict[str, float]:
        """Return each side's median time for one of ``count`` things done."""
        return {side: 1000 * median(times) / count for side, times in self.seconds.items()}


def alternate(
    rounds: int, *, warm_up: int = 1, after: Side = lambda: None, **sides: Side
) -> Rounds:
    """Time sides in turn (A B A B …), so that what slows the machine down slows them all.

    Args:
        rounds: How often.
        warm_up: How often before that, untold.
        after: Clears up after each call, untimed.
        **sides: What to time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm_up, rounds):
        for name, side in sides.items():
            taken = _seconds(side)
            after()
            if number >= 0:
                seconds[name].append(taken)
    return Rounds(seconds)


def command(*words: str | Path) -> Side:
    """Return a side that runs a program to its end, and fails when that does."""

    def run() -> None:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr[-500:]}")

    return run


def peak(call: Side) -> float | None:
    """Return the highest resident memory during a call in bytes; None where it is unknown."""
    if not reset_peak():
        return None
    call()
    return peak_so_far()


def reset_peak() -> bool:
    """Forget the highest resident memory so far, and tell whether that is possible here."""
    _return_free_memory()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return peak_so_far() is not None


def peak_so_far() -> float | None:
    """Return the highest resident memory since the reset in bytes; None where it is unknown."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return float(peaks[0]) if peaks else None


def allocated() -> float | None:
    """Return what is allocated and not freed in bytes; None where glibc does not tell."""
    mallinfo2 = _from_libc("mallinfo2")
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _MallocInfo
    info = mallinfo2()
    return float(info.uordblks + info.hblkhd)


class _MallocInfo(ctypes.Structure):
    """What ``mallinfo2`` tells (glibc, malloc.h), in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",  # allocated by mmap, each for itself
            "usmblks",
            "fsmblks",
            "uordblks",  # allocated in all arenas
            "fordblks",
            "keepcost",
        )
    ]


def _return_free_memory() -> None:
    """Let calls begin alike: what an earlier one has freed must not count for the next."""
    if malloc_trim := _from_libc("malloc_trim"):
        malloc_trim(0)


def _from_libc(name: str) -> Any:
    """Return a function that Linux's C library may have; None where it has none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _seconds(side: Side) -> float:
    _wait_for_device()
    start = time.perf_counter()
    side()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
