"""What tests share."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from fixtures_io import LABELS, NAME, TIMM_IS_OLD, Shell, save_tiny
from fixtures_processes import Nursery

_MUCH = 1.25e9  # bytes a worker holds before all its objects, half a second's worth, are looked at
_GROWN = 5e7  # bytes, by which it may grow until it looks again
_held = [0.0]  # after the last look


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the large models first, while a worker holds little else."""
    items.sort(key=lambda item: "pair" not in getattr(item, "fixturenames", ()))


def pytest_runtest_logfinish() -> None:
    """Give memory back before much has piled up: commands leave garbage until a module ends."""
    if sys.platform == "linux" and _resident_memory() > max(_MUCH, _held[0] + _GROWN):
        _give_back_memory()


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Start commands in processes of their own at once: one a worker, since it takes seconds."""
    with Nursery(tmp_path_factory.mktemp("streams")) as nursery:
        yield nursery


@pytest.fixture
def shell(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Shell:
    """Run commands in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    return Shell(capfdbinary, monkeypatch)


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep the weights and the labels of the tiny model in a folder."""
    folder = tmp_path_factory.mktemp("kept")
    save_tiny(folder / "tiny.safetensors")
    (folder / "labels.txt").write_text("\n".join(LABELS), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(kept: Path) -> list[str]:
    """Return options that choose the tiny model."""
    weights, labels = str(kept / "tiny.safetensors"), str(kept / "labels.txt")
    return ["-m", NAME, "--img-size", "64", "--weights", weights, "--labels", labels]


@pytest.fixture
def census() -> None:
    """Skip a test of what the census of timm's models saves, with an older timm than its own."""
    if TIMM_IS_OLD:
        pytest.skip("the census is of a newer timm")


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
    shared = vars(sys.modules["comparison"]).values() if "comparison" in sys.modules else ()
    _forget([*vars(request.module).values(), *shared])


@pytest.fixture
def large() -> Iterator[None]:
    """Give memory back after a test that takes much of it, what it shares with others too."""
    yield
    import comparison

    _forget(vars(comparison).values())


def _forget(cached: Iterable[object]) -> None:
    for each in cached:
        if callable(clear := getattr(each, "cache_clear", None)):
            clear()
    _give_back_memory()


def _give_back_memory() -> None:
    if is_large := _resident_memory() > _MUCH:
        gc.unfreeze()  # commands freeze what is there, garbage too, since their process soon ends
    gc.collect()
    gc.freeze()  # so that later collections pass over what stays
    if is_large and sys.platform == "linux":  # what is free goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    _held[0] = _resident_memory()


def _resident_memory() -> float:
    """Return the bytes of memory that this process holds; without Linux, nobody knows."""
    if sys.platform != "linux":
        return math.inf
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
