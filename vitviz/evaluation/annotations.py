"""What others know about images: masks of their objects, and their true classes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitviz.errors import ImageError, LabelError, OptionError
from vitviz.images.decoding import read_file
from vitviz.images.fitting import InputTransform
from vitviz.images.sources import Source, identity
from vitviz.models.labels import Labels, parse_requests

__all__ = ["Mask", "find_mask", "fit_mask", "load_mask", "read_truth", "true_class"]


Mask = NDArray[np.int32]

_SHAPE = 0.01  # by how much the aspect ratios of an image and its mask may differ


def find_mask(folder: Path, source: Source) -> Path | None:
    """Find the mask of an image: a PNG of its name, in folders of the same names or in none.

    Of ``photos/cats/tom.jpg``: ``photos/cats/tom.png``, ``cats/tom.png`` or ``tom.png`` in the
    folder, the first that is there and not the image itself.
    """
    names = (folder / PurePosixPath(tail).with_suffix(".png") for tail in _tails(source))
    own = identity(source.path)
    return next((path for path in names if path.is_file() and identity(path) != own), None)


def load_mask(path: Path) -> Mask:
    """Read a mask file, (height, width): one value a pixel, 0 for the background.

    Raises:
        ImageError: It cannot be read, or has colours.
    """
    try:
        content = read_file(Source(path=path, key=path.name)).content
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if len(image.getbands()) > 1:
                raise ImageError(f"has {image.mode} pixels; expected one value per pixel")
            return np.asarray(image).astype(np.int32)  # of a palette, the indices
    except ImageError as error:
        raise ImageError(f"has a mask, {path}, which {error}") from error
    except Exception as error:  # damaged files make decoders raise almost anything
        raise ImageError(f"has a mask, {path}, which is no PNG that can be read") from error


def fit_mask(mask: NDArray[Any], frame: InputTransform, size: tuple[int, int]) -> Mask:
    """Bring a mask to what the model sees, as its image is, each pixel taken from the nearest.

    Args:
        mask: (height, width), of whole numbers.
        frame: How the image was fitted.
        size: (height, width) of the image.

    Raises:
        ImageError: It has not the image's shape, or fractions in it.
    """
    height, width = mask.shape if mask.ndim == 2 else (0, 0)
    if not height or not width or abs(height * size[1] / (width * size[0]) - 1) > _SHAPE:
        found = "×".join(map(str, mask.shape))
        raise ImageError(f"has {size[0]}×{size[1]} pixels, but its mask has {found}")
    whole = np.rint(mask).astype(np.int32)
    if not np.array_equal(whole, mask):
        raise ImageError("has a mask with fractions; expected whole numbers, 0 where no object is")
    nearest = replace(frame, resample=Image.Resampling.NEAREST)
    fitted, _ = nearest.apply(Image.fromarray(whole), size)
    return np.asarray(fitted)


def read_truth(path: Path, labels: Labels, num_classes: int) -> Mapping[str, int]:
    """Read the true classes of images.

    Args:
        path: A file with one image a line: its name, a tab or blanks, its class as an index or a
            label. A name that has blanks in it needs the tab.
        labels: The model's labels.
        num_classes: Number of logits.

    Returns:
        The class index of each name.

    Raises:
        OptionError: The file cannot be read, or a line is not of that form.
        LabelError: A class is none of the model's.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise OptionError(f"--truth {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"--truth {path} is no UTF-8 text: {error}") from error
    classes = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parts = line.strip().split("\t" if "\t" in line.strip() else None, 1)
        if len(parts) < 2:
            raise OptionError(f"--truth {path}, line {number}: expected a name and a class")
        try:
            classes[parts[0]] = _class_index(parts[1], labels, num_classes)
        except LabelError as error:
            raise LabelError(f"--truth {path}, line {number}: {error}") from error
    return classes


def true_class(truth: Mapping[str, int], source: Source) -> int | None:
    """Look up an image's true class by its path, or the end of it; None where it is not there."""
    return next((truth[tail] for tail in _tails(source) if tail in truth), None)


def _class_index(word: str, labels: Labels, num_classes: int) -> int:
    requests: Sequence[Any] = parse_requests([word], labels, num_classes)
    if len(requests) != 1 or requests[0].class_index is None:
        raise LabelError(f"{word!r} is a rank; give an index or a label")
    return int(requests[0].class_index)


def _tails(source: Source) -> Iterator[str]:
    """Yield a source's key, and what is left of it without its first folders one by one."""
    parts = PurePosixPath(source.key).parts
    for start in range(len(parts)):
        yield "/".join(parts[start:])
