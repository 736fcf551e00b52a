"""Files, folders, globs, URLs and archives → the images of a call; opens no image."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vitviz.errors import SourceError
from vitviz.images.archives import ARCHIVES, members
from vitviz.images.stores import Origin, StoredObject, is_url, list_objects

__all__ = ["SUFFIXES", "Source", "find_sources", "identity"]


SUFFIXES = frozenset(
    (".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg")
    + (".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")
)
"""Endings that make a file in a folder an image; a file named by itself may have any."""

_NAMES = 100  # of one folder, by links: in a maze of links they double with every step


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image to explain.

    Attributes:
        path: Where it is, as the user may open it; for what is no file, its name alone.
        key: Its relative path under the output folder, with "/" between the parts.
        origin: Where its bytes are; None: in the file at ``path``.
    """

    path: Path
    key: str
    origin: Origin | None = None

    @property
    def name(self) -> str:
        """What people call it: a path, or a URL."""
        return os.fspath(self.path) if self.origin is None else str(self.origin)

    @property
    def address(self) -> str:
        """What tells it from all others, from wherever it is named."""
        return self.name if is_url(self.name) else os.fspath(_absolute(Path(self.name)))


def find_sources(
    arguments: Iterable[str | Path | StoredObject],
    *,
    skip: Callable[[Path], bool] = lambda path: False,
) -> tuple[list[Source], list[str]]:
    """Turn files, folders, globs, URLs and archives into images, in order, each once.

    Two names of one file, by links, are two images.

    Args:
        arguments: As typed; a ``Path`` is never a glob, and a ``StoredObject`` no folder either.
            What does not exist is taken for a file and fails when it is read, as a folder does
            that cannot be looked into.
        skip: Tells of an image found in a folder or by a glob that it is not to be taken.

    Returns:
        The sources, and the arguments that led to no image.

    Raises:
        SourceError: Two files would write the same outputs, or a store cannot be looked into.
    """
    by_address: dict[str, Source] = {}
    by_key: dict[str, Source] = {}
    fruitless = []
    for argument in arguments:
        found = False
        for source in _sources(argument, skip):
            found = True
            if (address := source.address) in by_address:
                continue
            if other := by_key.get(source.key):
                raise SourceError(
                    f"{other.name} and {source.name} would both be written as {source.key}; "
                    "explain them in two calls with different --output folders"
                )
            by_address[address] = by_key[source.key] = source
        if not found:
            fruitless.append(str(argument))
    return list(by_address.values()), fruitless


def _sources(argument: str | Path | StoredObject, skip: Callable[[Path], bool]) -> Iterator[Source]:
    """Yield the images of one argument."""
    if isinstance(argument, str) and is_url(argument):
        stored = [StoredObject(url) for url in list_objects(argument, SUFFIXES)]
    elif isinstance(argument, StoredObject):
        stored = [argument]
    else:
        for path, root in _expand(argument, skip):
            if _is_archive(path) and path.is_file():
                key = _key(path, root)
                yield from _origins(members(StoredObject(os.fspath(path)), key, SUFFIXES))
            else:
                yield Source(path=path, key=_key(path, root))
        return
    for each in stored:
        if each.suffix in ARCHIVES:
            yield from _origins(members(each, each.key, SUFFIXES))
        else:
            yield from _origins([(each, each.key)])


def _origins(found: Iterable[tuple[Origin, str]]) -> Iterator[Source]:
    for origin, key in found:
        yield Source(path=Path(key), key=key, origin=origin)


def _expand(argument: str | Path, skip: Callable[[Path], bool]) -> Iterator[tuple[Path, Path]]:
    """Yield the images of one argument, each with the folder that its key is relative to."""
    path = Path(argument)
    if argument == "":
        return
    if os.path.isdir(argument):  # noqa: PTH112 (has an answer for every name)
        yield from ((each, _absolute(path).parent) for each in _inside(path, skip))
    elif isinstance(argument, str) and glob.has_magic(argument) and not os.path.lexists(argument):
        fixed = _fixed_part(path)
        pattern = path.parts[len(fixed.parts) :]
        walked = "**" in pattern[:-1]  # into all that matches, already
        for match, closed in sorted(set(_matches(fixed, pattern)), key=lambda each: str(each[0])):
            if os.path.isdir(match) and not closed:  # noqa: PTH112
                inside = () if walked else _inside(match, skip)
                yield from ((each, _absolute(fixed)) for each in inside)
            elif closed or _is_archive(match) or (_is_image(match) and not skip(match)):
                yield match, _absolute(fixed)
    else:
        yield path, _absolute(path).parent


def _inside(top: Path, skip: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield the images below a folder in a fixed order; hidden files and folders are passed over.

    What cannot be looked into stays among them, to fail when it is read: what it holds is missing.
    """
    for folder, files in _folders(top):
        if files is None:
            yield folder
        else:
            yield from (each for each in files if not skip(each))


def _folders(top: Path) -> Iterator[tuple[Path, list[Path] | None]]:
    """Yield a folder and those below it, each with its images; None for one that is closed to us.

    Links to folders are followed, except those into a folder that contains them. A stack, since
    folders can lie deeper than calls.

    Raises:
        SourceError: Links multiply the names of a folder without end.
    """
    pending: list[tuple[Path, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    names: Counter[tuple[int, int]] = Counter()
    while pending:
        folder, above = pending.pop()
        try:
            status = folder.stat()
            own = (status.st_dev, status.st_ino)
            if own in above:
                continue
            entries = _entries(folder)
        except OSError:
            yield folder, None
            continue
        names[own] += 1
        if names[own] > _NAMES:
            raise SourceError(
                f"links in {top} lead to one folder by more than {_NAMES} names, {folder} among "
                "them; give the folders that you mean"
            )
        shown = [(folder / each.name, each) for each in entries if not each.name.startswith(".")]
        below = [path for path, each in shown if _is_folder(each)]
        yield folder, [p for p, e in shown if not _is_folder(e) and (_is_image(p) or _is_lost(e))]
        pending += ((path, above | {own}) for path in reversed(below))


def _matches(folder: Path, pattern: tuple[str, ...]) -> Iterator[tuple[Path, bool]]:
    """Yield what a glob matches below a folder, and, marked, what is closed to it.

    Python's own passes over what it may not read, and follows links that lead back up.
    """
    part, *rest = pattern
    if part == "**":
        for each, files in _folders(folder) if folder.is_dir() else ():
            if files is None:
                yield each, True
            elif rest:
                yield from _matches(each, tuple(rest))
        if not rest:
            yield folder, False
    elif glob.has_magic(part):
        for path, entry in _named(folder, part):
            if entry is None or (rest and _is_lost(entry)):
                yield path, True
            elif not rest:
                yield path, False
            elif _is_folder(entry):
                yield from _matches(path, tuple(rest))
    elif rest:
        yield from _matches(folder / part, tuple(rest))
    else:
        try:
            (folder / part).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError:
            yield folder / part, True
        else:
            yield folder / part, False


def _named(folder: Path, pattern: str) -> Iterator[tuple[Path, os.DirEntry[str] | None]]:
    """Yield the entries of a folder that match; the folder itself, without one, if it is closed."""
    try:
        entries = _entries(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError:
        yield folder, None
        return
    for each in entries:
        hidden = each.name.startswith(".") and not pattern.startswith(".")
        if not hidden and fnmatch.fnmatch(each.name, pattern):
            yield folder / each.name, each


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_lost(entry: os.DirEntry[str]) -> bool:
    """Tell of a link that leads nowhere, or where we may not look, whether a folder is meant."""
    return entry.is_symlink() and "." not in entry.name and not os.path.exists(entry)  # noqa: PTH110


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() in ARCHIVES


def identity(path: Path) -> str:
    """Return what two names of one file have in common."""
    # Hard links stay two images, unlike `runs.records._file_at`; a file need not exist.
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # no such file can be: its name is all there is
        return str(path)


def _absolute(path: Path) -> Path:
    """Make a path absolute and resolve its "..", without following links."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _fixed_part(pattern: Path) -> Path:
    """Return the folder that a glob starts from: its parts before the first wildcard."""
    magic = next(index for index, part in enumerate(pattern.parts) if glob.has_magic(part))
    return Path(*pattern.parts[:magic])


def _key(path: Path, root: Path) -> str:
    """Name a source relative to the working directory if it lies inside, else to its root."""
    absolute, here = _absolute(path), Path.cwd()
    return absolute.relative_to(here if absolute.is_relative_to(here) else root).as_posix()
