"""What Python users give → what the other rooms take; opens no image and runs no model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from vitviz.errors import OptionError, SourceError
from vitviz.evaluation.options import EvaluationOptions
from vitviz.evaluation.tasks import AnnotatedImage, annotated_images
from vitviz.images.sources import Source, find_sources
from vitviz.models.model import Model
from vitviz.options import Convention, Fit, ValueRange, real, whole
from vitviz.runs.provenance import read_provenance

__all__ = [
    "Classes",
    "Images",
    "OneImage",
    "Target",
    "Values",
    "Versus",
    "class_words",
    "evaluation_options",
    "images_in",
    "names_of_methods",
    "one_class",
    "option_value",
    "require_inputs",
    "subjects_of",
]

OneImage = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor
Images = OneImage | Iterable[OneImage]
Values = ValueRange | str | tuple[float, float] | None
Classes = int | str | Iterable[int | str]
Versus = int | str | None
Target = Callable[[Tensor], Tensor]


def option_value(name: str, hint: Any, value: Any) -> Any:
    """Bring what is given to the type of an option.

    Raises:
        OptionError: It is nothing of that kind.
    """
    if hint == tuple[str, ...]:
        return class_words(value)
    if str in get_args(hint):
        return one_class(name, value)
    if value is None and type(None) in get_args(hint):
        return None
    for kind in (hint, *get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, Enum):
            return kind(value)
    if tuple in (getattr(each, "__origin__", None) for each in (hint, *get_args(hint))):
        return _whole_numbers(name, value)
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


def one_class(name: str, value: Any) -> str | None:
    """Write one class as it is typed; None stays what it is.

    Raises:
        OptionError: It is none, or several.
    """
    words = (None,) if value is None else class_words(value)
    if len(words) != 1:
        raise OptionError(f"{name} is {value!r}; give one index or one label")
    return words[0]


def names_of_methods(value: Any) -> tuple[str, ...]:
    """Write names of methods as they are typed: one, or several.

    Raises:
        OptionError: One is no text.
    """
    names = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(each, str) for each in names):
        raise OptionError(f"methods is {value!r}; give the name of a method, or several")
    return names


def evaluation_options(
    methods: Any,
    target: Any,
    versus: Any,
    convention: Convention,
    fit: Fit,
    value_range: ValueRange | None,
    batch_size: int | None,
    seed: Any,
    resamples: Any,
) -> EvaluationOptions:
    """Bring what ``evaluate`` is given to its options.

    Raises:
        OptionError: Something is no option.
    """
    return EvaluationOptions(
        methods=names_of_methods(methods),
        target=one_class("target", target) or "top1",
        versus=one_class("versus", versus),
        convention=convention,
        fit=fit,
        value_range=value_range,
        batch_size=batch_size,
        seed=whole("seed", seed),
        resamples=whole("resamples", resamples),
    )


def require_inputs(model: object, images: object) -> None:
    """Make sure that this is a model, and that these may be images.

    Raises:
        OptionError: They are not.
    """
    if not isinstance(model, Model):
        raise OptionError(
            f"expected a model from vitviz.load_model, and got {type(model).__name__}"
        )
    if not _is_one(images) and not isinstance(images, Iterable):
        raise OptionError(f"expected images, and got {type(images).__name__}")


def images_in(images: Images) -> Iterator[Any]:
    """Yield images, in place of a folder those in it, as on the command line.

    Args:
        images: One, or several; tensors are (3, height, width) or (height, width).

    Raises:
        SourceError: There are none in a folder.
    """
    for image in [images] if _is_one(images) else images:  # type: ignore[union-attr]  # then many
        if isinstance(image, Tensor):
            yield _array(image)
            continue
        if not isinstance(image, (str, os.PathLike)) or not Path(image).is_dir():
            yield image
            continue
        found, _ = find_sources([Path(image)], skip=lambda path: read_provenance(path) is not None)
        if not found:
            raise SourceError(f"no images in {image}; give images or folders of them")
        yield from (source.path for source in found)


def _is_one(images: object) -> bool:
    one = isinstance(images, (str, os.PathLike, Image.Image))
    return one or getattr(images, "ndim", None) in (2, 3)


def _array(image: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor (channels, height, width) as an array (height, width, channels)."""
    image = image.detach().cpu()
    if image.ndim == 3:
        image = image.permute(1, 2, 0) if len(image) > 1 else image[0]
    return np.asarray((image.float() if image.is_floating_point() else image).numpy())


def _whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """Read several whole numbers; raises ``OptionError`` where they are none."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise OptionError(f"{name} is {values!r}; give whole numbers, like (3, 5)")
    return tuple(whole(name, each) for each in values)


def _source_of(number: int, image: Any) -> Source:
    """Name an image, by its path if it has one."""
    if not isinstance(image, (str, os.PathLike)):
        return Source(path=Path(f"image {number}"), key=f"image {number}")
    path = Path(image)
    whole_path = Path(os.path.abspath(path))  # noqa: PTH100 (".." is taken out, links stay)
    return Source(path=path, key=whole_path.relative_to(whole_path.anchor).as_posix())


def subjects_of(
    model: Model,
    images: Images,
    masks: str | os.PathLike[str] | Sequence[Any] | None,
    truth: Sequence[int] | None,
) -> list[AnnotatedImage]:
    """Put together what is known about each image, as ``evaluate`` takes it.

    Raises:
        OptionError: There is not one of each an image.
    """
    require_inputs(model, images)
    given = list(images_in(images))
    if isinstance(masks, (str, os.PathLike)):
        found = annotated_images(map(_source_of, range(len(given)), given), masks=Path(masks))
        of_each: list[Any] = [subject.mask for subject in found]
    else:
        found = annotated_images(map(_source_of, range(len(given)), given))
        of_each = [None] * len(given) if masks is None else list(masks)
    classes = [None] * len(given) if truth is None else list(truth)
    if not len(given) == len(of_each) == len(classes):
        raise OptionError(
            f"{len(given)} images, {len(of_each)} masks, {len(classes)} true classes: give one of "
            "each per image"
        )
    return [
        replace(
            subject,
            image=None if isinstance(image, (str, os.PathLike)) else image,
            mask=Path(mask) if isinstance(mask, (str, os.PathLike)) else mask,
            truth=None if true_class is None else whole("truth", true_class),
        )
        for subject, image, mask, true_class in zip(found, given, of_each, classes, strict=True)
    ]
