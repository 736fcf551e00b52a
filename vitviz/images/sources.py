"""Files, folders and globs → the images of a call; opens none of them."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vitviz.errors import SourceError

__all__ = ["SUFFIXES", "Source", "find_sources", "identity"]


SUFFIXES = frozenset(
    (".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg")
    + (".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")
)
"""Endings that make a file in a folder an image; a file named by itself may have any."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image to explain.

    Attributes:
        path: Where it is, as the user may open it.
        key: Its relative path under the output folder, with "/" between the parts.
    """

    path: Path
    key: str


def find_sources(
    arguments: Iterable[str | Path], *, skip: Callable[[Path], bool] = lambda path: False
) -> tuple[list[Source], list[str]]:
    """Turn files, folders and globs into images, in order, each file once.

    Args:
        arguments: As typed; a ``Path`` is never a glob. What does not exist is taken for a file
            and fails when it is read.
        skip: Tells of an image found in a folder or by a glob that it is not to be taken.

    Returns:
        The sources, and the arguments that led to no image.

    Raises:
        SourceError: Two files would write the same outputs.
    """
    by_file: dict[str, Source] = {}
    by_key: dict[str, Source] = {}
    fruitless = []
    for argument in arguments:
        found = False
        for path, root in _expand(argument, skip):
            found = True
            if (file := identity(path)) in by_file:
                continue
            source = Source(path=path, key=_key(path, root))
            if other := by_key.get(source.key):
                raise SourceError(
                    f"{other.path} and {path} would both be written as {source.key}; "
                    "explain them in two calls with different --output folders"
                )
            by_file[file] = by_key[source.key] = source
        if not found:
            fruitless.append(str(argument))
    return list(by_file.values()), fruitless


def _expand(argument: str | Path, skip: Callable[[Path], bool]) -> Iterator[tuple[Path, Path]]:
    """Yield the images of one argument, each with the folder that its key is relative to."""
    path = Path(argument)
    if argument == "":
        return
    if os.path.isdir(argument):  # noqa: PTH112 (has an answer for every name)
        yield from _inside(path, _absolute(path).parent, skip)
    elif isinstance(argument, str) and glob.has_magic(argument) and not os.path.lexists(argument):
        root = _fixed_part(path)
        for match in sorted(glob.glob(argument, recursive=True)):  # noqa: PTH207 (any pattern)
            if os.path.isdir(match):  # noqa: PTH112
                if "**" not in argument:  # which has walked into it already
                    yield from _inside(Path(match), root, skip)
            elif _is_image(Path(match)) and not skip(Path(match)):
                yield Path(match), root
    else:
        yield path, _absolute(path).parent


def _inside(folder: Path, root: Path, skip: Callable[[Path], bool]) -> Iterator[tuple[Path, Path]]:
    """Yield the images below a folder in a fixed order; hidden files and folders are passed over.

    Links to folders are not followed, so that loops cannot arise.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(files)):
            if not path.name.startswith(".") and _is_image(path) and not skip(path):
                yield path, root


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


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
    fixed = Path()
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        fixed /= part
    return _absolute(fixed)


def _key(path: Path, root: Path) -> str:
    """Name a source relative to the working directory if it lies inside, else to its root."""
    absolute, here = _absolute(path), Path.cwd()
    return absolute.relative_to(here if absolute.is_relative_to(here) else root).as_posix()
