"""Streams of items through threads and batches, in order and in bounded memory; knows no image."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["AdaptiveBatches", "in_batches", "map_ahead", "stop_with", "worker_threads"]


_Before = TypeVar("_Before")
_After = TypeVar("_After")

_PATIENCE = 4  # how many batches an item may wait for others of its key


@contextmanager
def worker_threads(
    workers: int | None, initializer: Callable[[], None] | None = None
) -> Iterator[ThreadPoolExecutor]:
    """Give a pool of threads whose waiting work is dropped when the user goes away.

    Args:
        workers: How many; None: as many as cores.
        initializer: What each thread does first.
    """
    pool = ThreadPoolExecutor(
        workers or os.cpu_count() or 1, thread_name_prefix="vitviz", initializer=initializer
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def map_ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[_Before], _After],
    items: Iterable[_Before],
    depth: int,
    *,
    drain: bool = False,
) -> Generator[_After, None, None]:
    """Map in threads, in order, at most ``depth`` items ahead of the one asked for.

    With ``drain``, what is done or under way when an error comes, by the items or by ``throw``, is
    yielded before the error is raised.
    """
    futures: deque[Future[_After]] = deque()

    def first() -> _After:
        result = futures[0].result()  # an interruption while it waits leaves it to be drained
        del futures[0]
        return result

    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > depth:
                yield first()
        while futures:
            yield first()
    except GeneratorExit:  # nobody listens any more
        raise
    except BaseException:
        begun = [future for future in futures if not future.cancel()] if drain else []
        yield from (future.result() for future in begun if not future.exception())
        raise


def stop_with(
    stream: Generator[_After, None, None], error: BaseException
) -> Generator[_After, None, None]:
    """Stop a stream with an error, which is raised after what the stream still yields."""
    yield stream.throw(error)
    yield from stream


def in_batches(
    items: Iterable[_Before | _After],
    key: Callable[[_Before | _After], Hashable | None],
    size: int,
    work: Callable[[list[Any]], Iterable[_After]],
) -> Iterator[_After]:
    """Work on items in batches of one key, and yield what becomes of them in their order.

    Args:
        items: What comes.
        key: What the items of a batch have in common; an item whose key is None passes as it is.
        size: Items in a full batch.
        work: Makes something of each item of a batch.
    """

    def numbered() -> Iterator[tuple[int, Any]]:
        for kind, numbers, batch in _group(items, key, size, patience=_PATIENCE * size):
            yield from zip(numbers, batch if kind is None else work(batch), strict=True)

    return _in_order(numbered())


def _group(
    items: Iterable[_Before],
    key: Callable[[_Before], Hashable | None],
    size: int,
    *,
    patience: int,
) -> Iterator[tuple[Hashable | None, list[int], list[_Before]]]:
    """Group items of one key in batches, each item with its number.

    Args:
        items: What comes.
        key: What the items of a batch have in common; an item whose key is None stands alone.
        size: Items in a full batch.
        patience: After how many further items a batch goes that is not full.

    Yields:
        The key, the numbers, which run from 0, and the items of a batch.
    """
    waiting: dict[Hashable, tuple[list[int], list[_Before]]] = {}
    for number, item in enumerate(items):
        kind = key(item)
        if kind is None:
            yield None, [number], [item]
            continue
        numbers, batch = waiting.setdefault(kind, ([], []))
        numbers.append(number)
        batch.append(item)
        if len(batch) == size:
            yield kind, *waiting.pop(kind)
        for oldest, (numbers, _) in list(waiting.items())[:1]:  # the one that has waited longest
            if number - numbers[0] >= patience:
                yield oldest, *waiting.pop(oldest)
    for kind, (numbers, batch) in waiting.items():
        yield kind, numbers, batch


def _in_order(numbered: Iterable[tuple[int, _After]]) -> Iterator[_After]:
    """Yield items by their numbers, which run from 0."""
    early: dict[int, _After] = {}
    following = 0
    for number, item in numbered:
        early[number] = item
        while following in early:
            yield early.pop(following)
            following += 1


class AdaptiveBatches:
    """Works on images of one shape, as many at once as there is memory for."""

    def __init__(self, size: int, warn: Callable[[str], None], *, copies: int = 1) -> None:
        """Begin with a size, and keep to a smaller one from when memory was short.

        Args:
            size: Images at once.
            warn: Is told when they become fewer.
            copies: How many the work makes of each, at most ``size`` of them at once.
        """
        self.size = size
        self._warn = warn
        self._copies = copies

    def work(
        self,
        items: list[_Before],
        function: Callable[[list[_Before]], list[_After]],
        fail: Callable[[_Before, MemoryError], _After],
    ) -> Iterator[_After]:
        """Yield what a function makes of items; of one that is too large by itself, what fails."""
        while items:
            portion = items[: self.size]
            try:
                yield from function(portion)
                items = items[len(portion) :]
            except MemoryError as error:
                crowd = min(self.size, len(portion) * self._copies)
                if crowd == 1:
                    yield fail(portion[0], error)
                    items = items[1:]
                    continue
                self.size = math.ceil(crowd / 2)
                self._warn(
                    f"not enough memory for {crowd} images at once: going on with "
                    f"{self.size} (--batch-size {self.size} says so from the start)"
                )
