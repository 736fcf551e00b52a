"""What tests share."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread: tiny models only wait for a second one, long on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def forgotten_caches(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drop, after each module, what its functions have cached, so that a worker stays small."""
    yield
    for each in vars(request.module).values():
        if callable(getattr(each, "cache_clear", None)):
            each.cache_clear()
    gc.collect()
    if sys.platform == "linux":  # what is free goes back to the system, not to the next module
        ctypes.CDLL(None).malloc_trim(0)
