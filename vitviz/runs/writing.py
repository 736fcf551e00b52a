"""How files appear whole or not at all; never decides what is in them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from vitviz.errors import OutputError
from vitviz.runs.provenance import Provenance, read_provenance

try:
    import fcntl
except ImportError:  # Windows, where an open file could not be moved to its final name either
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "alone_in",
    "fatal_write_error",
    "prepare_folder",
    "require_own",
    "sweep",
    "write_own",
    "write_whole",
]


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = re.compile(r"\.vitviz-[0-9a-f]{16}\.tmp")
_FORGOTTEN = 24 * 60 * 60  # seconds; a writer needs its temporary file for moments


def prepare_folder(folder: Path, option: str = "--output") -> None:
    """Make a folder and make sure that it can be written to.

    Args:
        folder: The folder.
        option: What names it.

    Raises:
        OutputError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder) as temporary:
            temporary.unlink()
    except OSError as error:
        raise OutputError(
            f"{option} {folder} cannot be written to: {error.strerror}; choose another folder"
        ) from error


def write_whole(path: Path, content: bytes, provenance: Provenance) -> None:
    """Put a file in its place in one step, replacing only what vitviz made from this source.

    Raises:
        OutputError: Another file is in the way, or the place cannot be written to.
    """
    _put(path, content, partial(_is_free_for, path, provenance))


def write_own(path: Path, content: bytes, is_own: Callable[[Path], bool]) -> None:
    """Put a file that belongs to no one source in its place, replacing only one of its kind.

    Args:
        path: Where.
        content: What.
        is_own: Tells of a file that is there whether it may be replaced.

    Raises:
        OutputError: Another file is in the way, or the place cannot be written to.
    """
    _put(path, content, partial(require_own, path, is_own))


def require_own(path: Path, is_own: Callable[[Path], bool]) -> bool:
    """Tell whether a name is new.

    Raises:
        OutputError: It is taken by what must not be replaced.
    """
    if not os.path.lexists(path):
        return True
    if not is_own(path):
        raise OutputError(
            f"{path} already exists and was not written by vitviz; choose another name"
        )
    return False


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other run is inside for this folder; where locks do not work, do not wait."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # the folder may be gone: it is made again
            if fcntl is not None:
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fatal_write_error(folder: Path, error: OutputError, option: str = "--output") -> str | None:
    """Tell why no other file could be written either, after one could not; None if it could."""
    if not isinstance(error.__cause__, OSError):  # the file in the way is in the way of no other
        return None
    if error.__cause__.errno in _NO_ROOM:
        return f"no room is left for {folder}; make some, then go on with --skip-existing"
    try:
        prepare_folder(folder, option)
    except OutputError as trouble:
        return str(trouble)
    return None


def sweep(folders: Iterable[Path]) -> None:
    """Remove the temporary files that killed runs have left in these folders."""
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in folder.glob(".vitviz-*.tmp"):
                if _TEMPORARY.fullmatch(path.name):
                    _remove_abandoned(path)


def _is_free_for(path: Path, provenance: Provenance) -> bool:
    """Tell whether a name is new; raise if it is taken by what must not be replaced."""
    if not os.path.lexists(path):
        return True
    found = read_provenance(path)
    if found is None or not found.same_source(provenance):
        origin = f"was made from {found.source}" if found else "was not written by vitviz"
        raise OutputError(f"{path} already exists and {origin}; move it or use another --output")
    return False


def _put(path: Path, content: bytes, is_new: Callable[[], bool]) -> None:
    """Write a file in one step where its name is new, or its owner has nothing against it."""
    new = is_new()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path.parent, content) as temporary:
            # A name that was free may be another run's by now: only a link never replaces.
            if not (new and _linked(temporary, path)):
                is_new()
                temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _linked(temporary: Path, path: Path) -> bool:
    """Give a file its final name; False when that is taken, or the file system has no links."""
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        return False
    temporary.unlink()
    return True


@contextlib.contextmanager
def _temporary(folder: Path, content: bytes = b"") -> Iterator[Path]:
    """Give the path of a new file with this content, which is gone when anything fails.

    The file stays locked until its user has moved or removed it: a sweep leaves it alone, in this
    process and in any other. The system drops the lock of a process that dies, however it dies.

    The lock belongs to the open file, not to the process: a forked child shares it, and one that
    outlives its parent keeps an abandoned file from being swept until it ends. A lock that other
    machines do not see (network file systems can be mounted so) does not keep their sweeps off.
    Should a file be taken from its writer, then that image fails and says so: neither the link
    nor the move finds it, and nothing half-written appears under a final name.
    """
    path, file = _locked_file(folder)
    with file:
        try:
            _fill(file, content)
            if fcntl is None:
                file.close()
            yield path
        except BaseException:
            file.close()
            with contextlib.suppress(OSError):  # what failed first is what matters
                path.unlink(missing_ok=True)
            raise


def _locked_file(folder: Path) -> tuple[Path, io.FileIO]:
    """Create a file and lock it."""
    while True:
        path = folder / f".vitviz-{secrets.token_hex(8)}.tmp"
        file = path.open("xb", buffering=0)
        # A sweep may come between creating and locking; it then holds the lock, or has removed
        # the file. No name is used twice, so a file of this name is this one.
        if _lock(file) is not False and path.exists():
            return path, file
        file.close()


def _fill(file: io.FileIO, content: bytes) -> None:
    """Write through the descriptor that holds the lock: on SMB, no other one may."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _lock(file: io.FileIO) -> bool | None:
    """Lock a file without waiting; False when another has it, None where locks do not work."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _opened(path: Path) -> io.FileIO:
    """Open a file to lock it, but follow no link and wait for no pipe."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    # For writing, too, although nothing is written: NFS locks no other.
    return os.fdopen(os.open(path, os.O_RDWR | flags), "r+b", buffering=0)


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file that nobody is writing; without locks, one that is a day old."""
    with contextlib.suppress(OSError):
        locked = None
        with contextlib.suppress(PermissionError), _opened(path) as file:
            locked = _lock(file)
            if locked:  # a writer that is just about to lock it sees that it is gone
                path.unlink(missing_ok=True)
        if locked is None and time.time() - path.stat().st_mtime > _FORGOTTEN:
            path.unlink(missing_ok=True)
