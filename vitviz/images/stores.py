"""Object stores and web servers, by fsspec: lists what is there, and reads it patiently.

Nothing of a store is loaded before a URL asks for it.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol, TypeVar

from vitviz.errors import ImageError, SourceError, first_line

__all__ = ["Origin", "StoredObject", "is_url", "list_objects", "safe_key", "stored_file"]

_Read = TypeVar("_Read")

_ATTEMPTS = 5
_PAUSE = 0.25  # seconds before the second attempt; doubled before each further one
_PATIENCE = 60.0  # seconds that one attempt may take
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
_PACKAGES |= {"abfs": "adlfs", "abfss": "adlfs", "http": "aiohttp", "https": "aiohttp"}
_URL = re.compile(r"([a-z][a-z0-9+.-]+)://")
_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError)  # waiting mends none of these


class Origin(Protocol):
    """Where the bytes of an image are that is no file of its own; its text is its name."""

    def read(self) -> bytes:
        """Return all of them.

        Raises:
            ImageError: They cannot be read.
        """


@dataclass(frozen=True)
class StoredObject:
    """An object of a store, or a local file that is read like one.

    Attributes:
        url: Its URL or path.
    """

    url: str

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    @property
    def key(self) -> str:
        """Its path under the output folder: all but the scheme."""
        return safe_key(_URL.sub("", self.url, count=1))

    @property
    def suffix(self) -> str:
        """The ending of its name, as ``.tar``."""
        return PurePosixPath(self.url.partition("?")[0]).suffix.lower()

    def read(self) -> bytes:
        """Return all of it."""
        system, path = _opened(self.url)
        return patiently(lambda: _fetch(system, path))

    def read_part(self, start: int, size: int) -> bytes:
        """Return some of it.

        Raises:
            ImageError: It cannot be read, or ends before.
        """
        system, path = _opened(self.url)
        content = patiently(lambda: _fetch(system, path, start=start, end=start + size))
        if len(content) > size:  # all of it: not every web server can send a part
            content = content[start : start + size]
        if len(content) < size:
            raise ImageError(f"ends after {len(content):,} of its {size:,} bytes")
        return content


def is_url(text: str) -> bool:
    """Tell whether something is a URL rather than a path."""
    return _URL.match(text) is not None


def list_objects(url: str, suffixes: frozenset[str]) -> Iterator[str]:
    """Yield the URLs that a URL stands for: itself, or what lies below it, or what it matches.

    Args:
        url: Of an object, a folder or a glob.
        suffixes: Which objects of a folder are images.

    Raises:
        SourceError: The store is not known, its package is missing, or it cannot be looked into.
    """
    system, path = _opened(url)
    web = _scheme(url) in ("http", "https")  # where "?" begins a query, and there are no folders
    with _looking_into(url):
        if not web and re.search(r"[*?\[]", path):
            found = sorted(system.glob(path))
        elif not web and (url.endswith("/") or system.isdir(path)):
            everything = sorted(system.find(path))
            found = [each for each in everything if PurePosixPath(each).suffix.lower() in suffixes]
        else:
            yield url
            return
    yield from (str(system.unstrip_protocol(each)) for each in found)


@contextmanager
def stored_file(url: str) -> Iterator[BinaryIO]:
    """Open a URL or path for reading; it need not be seekable."""
    system, path = _opened(url)
    with system.open(path, "rb") as file:
        yield file


def safe_key(name: str) -> str:
    """Return a name, by whomever it was given, as a path that leads nowhere but down."""
    parts = [part.replace("\0", "%00") for part in name.split("/") if part not in ("", ".")]
    return "/".join("%2E%2E" if part == ".." else part for part in parts)


def patiently(read: Callable[[], _Read]) -> _Read:
    """Read, and try again a few times where that may help.

    Raises:
        ImageError: It cannot be read.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return read()
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # of whatever kind a store's package raises
            if attempt == _ATTEMPTS - 1 or isinstance(error, _FOR_GOOD):
                times = "" if attempt == 0 else f" after {attempt + 1} attempts"
                raise ImageError(f"cannot be read{times}: {_said(error)}") from error
            time.sleep(_PAUSE * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _fetch(system: Any, path: str, **part: int) -> bytes:
    """Read an object or a part of it, in bounded time where the store lets us."""
    if not system.async_impl:
        return bytes(system.cat_file(path, **part))
    from fsspec.asyn import sync

    return bytes(sync(system.loop, system._cat_file, path, timeout=_PATIENCE, **part))


def _opened(url: str) -> tuple[Any, str]:
    """Return the store of a URL, and the object's path in it."""
    import fsspec

    scheme = _scheme(url)
    try:
        system = fsspec.filesystem(scheme)
        return system, str(system._strip_protocol(url))
    except ImportError as error:
        package = _PACKAGES.get(scheme, "a package that is not installed")
        hint = "; try pip install 'vitviz[remote]'" if scheme in _PACKAGES else ""
        raise SourceError(f"{scheme}:// needs {package}, which is not installed{hint}") from error
    except Exception as error:  # unknown schemes, and credentials that a store's package looks for
        raise SourceError(f"{url} cannot be opened: {_said(error)}") from error


@contextmanager
def _looking_into(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise SourceError(f"{url} cannot be listed: {_said(error)}") from error


def _scheme(url: str) -> str:
    found = _URL.match(url)
    return found[1] if found else "file"


def _said(error: Exception) -> str:
    return first_line(error) if not isinstance(error, FileNotFoundError) else "no such file"
