"""What Python users give → what the other rooms take; opens no image and runs no model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from vitviz.errors import OptionError, SourceError
from vitviz.images.sources import Source, find_sources
from vitviz.models.model import Model
from vitviz.options import ValueRange, real, whole
from vitviz.runs.provenance import read_provenance

__all__ = [
    "Classes",
    "Images",
    "Values",
    "class_words",
    "images_in",
    "option_value",
    "require_inputs",
    "source_of",
]

Images = (
    str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]]
)
Values = ValueRange | str | tuple[float, float] | None
Classes = int | str | Iterable[int | str]


def option_value(name: str, hint: Any, value: Any) -> Any:
    """Bring what is given to the type of an option.

    Raises:
        OptionError: It is nothing of that kind.
    """
    if hint == tuple[str, ...]:
        return class_words(value)
    if value is None and type(None) in get_args(hint):
        return None
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if tuple in (getattr(each, "__origin__", None) for each in (hint, *get_args(hint))):
        return tuple(whole(name, each) for each in value)
    for kind, read in ((int, whole), (float, real)):
        if kind in (hint, *get_args(hint)):
            return read(name, value)
    return value


def class_words(value: Any) -> tuple[str, ...]:
    """Write classes as they are typed: an index, a label, or several of these.

    Raises:
        OptionError: One is neither.
    """
    if isinstance(value, (bytes, bytearray)):
        raise OptionError(f"classes is {value!r}; give an index, a label, or several of these")
    several = np.ndim(value) if hasattr(value, "ndim") else not isinstance(value, (str, int, float))
    try:
        given = list(value) if several else [value]
    except TypeError:
        given = [value]
    return tuple(each if isinstance(each, str) else str(whole("classes", each)) for each in given)


def require_inputs(model: object, images: object) -> None:
    """Make sure that this is a model, and that these are images, and not one.

    Raises:
        OptionError: It is not, or it is one.
    """
    if not isinstance(model, Model):
        raise OptionError(
            f"expected a model from vitviz.load_model, and got {type(model).__name__}"
        )
    is_folder = isinstance(images, (str, os.PathLike)) and Path(images).is_dir()
    is_one = isinstance(images, (str, os.PathLike, Image.Image))
    if (is_one and not is_folder) or getattr(images, "ndim", 4) in (2, 3):
        raise OptionError("expected a list of images, and got one; write [image]")


def images_in(images: Images) -> Iterator[Any]:
    """Yield images, in place of a folder those in it, as on the command line.

    Raises:
        SourceError: There are none in a folder.
    """
    for image in [images] if isinstance(images, (str, os.PathLike)) else images:
        if not isinstance(image, (str, os.PathLike)) or not Path(image).is_dir():
            yield image
            continue
        found, _ = find_sources([Path(image)], skip=lambda path: read_provenance(path) is not None)
        if not found:
            raise SourceError(f"no images in {image}; give images or folders of them")
        yield from (source.path for source in found)


def source_of(number: int, image: Any) -> Source:
    """Name an image, by its path if it has one."""
    if not isinstance(image, (str, os.PathLike)):
        return Source(path=Path(f"image {number}"), key=f"image {number}")
    path = Path(image)
    whole_path = Path(os.path.abspath(path))  # noqa: PTH100 (".." is taken out, links stay)
    return Source(path=path, key=whole_path.relative_to(whole_path.anchor).as_posix())
