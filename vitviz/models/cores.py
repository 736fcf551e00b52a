"""The cores of a processor, shared out between threads that work side by side; knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

import torch

from vitviz.streaming import worker_threads

__all__ = ["Spread", "side_by_side"]

_Before = TypeVar("_Before")
_After = TypeVar("_After")


class Spread(Protocol):
    """A ``map``, in order."""

    def __call__(
        self, work: Callable[[_Before], _After], pieces: Iterable[_Before], /
    ) -> Iterable[_After]:
        """Work on each piece."""


@contextmanager
def side_by_side(threads: int) -> Iterator[Spread]:
    """Give a ``map`` that works in threads, each of which has its share of torch's threads.

    One thread of torch for each of several pieces is faster than all threads on each piece in
    turn: none waits for another within a function, and what a piece needs stays in the cache of
    its core. Where threads of torch are not each thread's own, it is the ``map`` of Python.

    Args:
        threads: How many; 1: that which calls.
    """
    if threads == 1 or not _threads_are_own():
        yield map
        return
    cores = torch.get_num_threads()
    try:
        with worker_threads(threads, partial(torch.set_num_threads, cores // threads)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(cores)  # of threads that are yet to come


def _threads_are_own() -> bool:
    """Tell whether each thread has its own number of torch's threads, as with OpenMP."""
    return "OpenMP" in torch.__config__.parallel_info().split("ATen parallel backend:")[-1]
