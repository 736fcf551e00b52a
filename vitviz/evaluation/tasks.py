"""Images to measure on, and the tasks that they make: one for each class explained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitviz.errors import ImageError, OptionError, reason
from vitviz.evaluation.annotations import find_mask, fit_mask, load_mask, true_class
from vitviz.evaluation.options import EvaluationOptions
from vitviz.evaluation.perturbation import seen_size
from vitviz.explaining.samples import input_transform
from vitviz.images.decoding import read_file
from vitviz.images.samples import ImageSample, load_sample, sample_of
from vitviz.images.sources import Source
from vitviz.models.labels import parse_requests
from vitviz.models.model import Model

__all__ = ["TaskLoader", "Failure", "AnnotatedImage", "Task", "seen", "annotated_images"]

Mask = NDArray[np.bool_]
Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnotatedImage:
    """An image to measure on, and what others know about it.

    Attributes:
        source: Its file, or its name.
        image: Its pixels, where there is no file to read.
        mask: A file or an array (height, width) of integers, 0 for the background.
        truth: Its true class.
    """

    source: Source
    image: Image.Image | NDArray[Any] | None = None
    mask: Path | NDArray[Any] | None = None
    truth: int | None = None


def annotated_images(
    sources: Iterable[Source],
    *,
    masks: Path | None = None,
    truth: Mapping[str, int] | None = None,
) -> list[AnnotatedImage]:
    """Put together what is known about images.

    Args:
        sources: The images.
        masks: Folder with their masks.
        truth: Their true classes, by name.

    Raises:
        OptionError: The folder is not there, or knows none of the images; as the classes do.
    """
    if masks is not None and not masks.is_dir():
        raise OptionError(f"--masks {masks} is not a folder")
    subjects = [
        AnnotatedImage(
            source=source,
            mask=find_mask(masks, source) if masks else None,
            truth=true_class(truth, source) if truth is not None else None,
        )
        for source in sources
    ]
    if masks is not None and all(subject.mask is None for subject in subjects):
        raise OptionError(f"--masks {masks} has no PNG of the name of any image")
    if truth is not None and all(subject.truth is None for subject in subjects):
        raise OptionError("--truth has no line with the name of any image")
    return subjects


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One class of one image, to be examined.

    Attributes:
        number: Of the image.
        is_last: Whether it is the last one of its image.
        sample: Its pixels.
        class_index: The class that maps explain; None for the one that is predicted.
        truth: The image's true class.
        asked: (height, width) of the part that tokens see, true on what maps should show.
        objects: The same, true on all objects, where there are others than the one asked for.
        share: Part of the image's work that it is.
    """

    number: int
    is_last: bool
    sample: ImageSample
    class_index: int | None
    truth: int | None
    asked: Mask | None
    objects: Mask | None
    share: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An image, or one class of it, that failed."""

    number: int
    error: str
    is_last: bool = True


class TaskLoader:
    """Makes tasks of images: decodes them, fits their masks, finds their classes."""

    def __init__(
        self, model: Model, subjects: Sequence[AnnotatedImage], options: EvaluationOptions
    ) -> None:
        """Find out which class is wanted of each image."""
        self._model = model
        self._frame = input_transform(model, options.fit, options.value_range)
        self._judged = any(subject.truth is not None for subject in subjects)
        masked = any(subject.mask is not None for subject in subjects)
        self._wanted = _wanted_class(model, options, judged=self._judged, masked=masked)

    def prepare(self, numbered: tuple[int, AnnotatedImage]) -> list[Task | Failure]:
        """Return an image's tasks, one for each class that its maps explain."""
        number, subject = numbered
        try:
            if self._judged and subject.truth is None:
                raise ImageError("has no true class, though others have; add a line to --truth")
            sample = self._load(subject)
            mask = self._mask(subject, sample)
            choices = self._choices(mask, subject.truth)
            return [
                Task(
                    number=number,
                    is_last=place == len(choices),
                    sample=sample,
                    class_index=class_index,
                    truth=subject.truth,
                    asked=asked,
                    objects=mask != 0 if mask is not None and len(choices) > 1 else None,
                    share=1 / len(choices),
                )
                for place, (class_index, asked) in enumerate(choices, start=1)
            ]
        except (ImageError, MemoryError) as error:
            return [Failure(number=number, error=reason(error))]

    def _load(self, subject: AnnotatedImage) -> ImageSample:
        if subject.image is None:
            return load_sample(read_file(subject.source), self._frame, max_size=1)
        return sample_of(subject.image, subject.source.key, self._frame, max_size=1)

    def _mask(self, subject: AnnotatedImage, sample: ImageSample) -> NDArray[np.int32] | None:
        """Return the mask's values on the part of the image that tokens see."""
        if subject.mask is None:
            return None
        mask = load_mask(subject.mask) if isinstance(subject.mask, Path) else subject.mask
        height, width = seen(self._model, sample)
        return fit_mask(np.asarray(mask), self._frame, sample.size)[:height, :width]

    def _choices(
        self, mask: NDArray[np.int32] | None, truth: int | None
    ) -> list[tuple[int | None, Mask | None]]:
        """Return the classes to explain, None for the predicted one, and where each is."""
        if self._wanted != "mask":
            fixed = self._wanted if isinstance(self._wanted, int) else None
            objects = mask != 0 if mask is not None and mask.any() else None
            return [(truth if self._wanted == "truth" else fixed, objects)]
        values = [] if mask is None else [int(value) for value in np.unique(mask[mask != 0])]
        if mask is None or not values:
            raise ImageError("has no mask that names a class, which --class mask asks for")
        if values[0] < 0 or values[-1] > self._model.num_classes:
            raise ImageError(
                f"has a mask with values from {values[0]} to {values[-1]}; for --class mask they "
                f"are class indices + 1, up to {self._model.num_classes}"
            )
        return [(value - 1, mask == value) for value in values]


def _wanted_class(
    model: Model, options: EvaluationOptions, *, judged: bool, masked: bool
) -> int | str:
    """Read the class that maps are asked to explain: an index, or top1, truth or mask.

    Raises:
        OptionError: It is several, or there is nothing to take it from.
        LabelError: It is none of the model's.
    """
    word, known = options.target, {"truth": judged, "mask": masked}
    if word in known:
        if not known[word]:
            option = "--masks DIR" if word == "mask" else "--truth FILE"
            raise OptionError(
                f"--class {word} has nothing to go by: no image has one; give {option}"
            )
        return word
    requests = parse_requests([word], model.labels, model.num_classes, options.versus)
    if len(requests) != 1:
        raise OptionError(f"--class {word} is several classes; give top1, an index or a label")
    return "top1" if requests[0].class_index is None else requests[0].class_index


def seen(model: Model, sample: ImageSample) -> Grid:
    """Return the (height, width) of the pixels that tokens see."""
    height, width = sample.pixels.shape[:2]
    return seen_size((height, width), model.preprocessing.patch)
