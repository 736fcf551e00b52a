"""What each method's map of each image scores; streams like the pipeline, and never prints.

Every method, the two baselines among them, goes the same way: a map of each image for one class,
on the model's grid. Of an image, only its numbers are kept.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitviz.annotations import find_mask, fit_mask, load_mask, true_class
from vitviz.engine import class_requests, explain_batch, predict_batch
from vitviz.errors import ImageError, LabelError, OptionError, VitvizError, reason
from vitviz.images import ImageSample, Source, load_sample, read_file, sample_of
from vitviz.labels import parse_requests
from vitviz.lanes import batch_size_for
from vitviz.metrics import average_precision, best_miou, energy_inside, pointing_game, specificity
from vitviz.models import Model
from vitviz.options import VARIANTS, EvaluationOptions, variant
from vitviz.perturbation import (
    PERTURBATIONS,
    Curves,
    Perturbation,
    Untouched,
    measure_curves,
    seen_size,
    upsample,
)
from vitviz.pipeline import frame_of, to_tensor
from vitviz.streaming import Portions, in_batches, map_ahead, worker_threads

__all__ = [
    "BASELINES",
    "CENTRE_SIGMA",
    "Case",
    "Measurement",
    "Subject",
    "contenders",
    "examine",
    "subjects_of",
]

Floats = NDArray[np.floating]
Mask = NDArray[np.bool_]
Grid = tuple[int, int]
_Made = TypeVar("_Made")

CENTRE_SIGMA = 0.25
"""Of the centre's Gaussian, as a share of each side of the grid."""


def _random(grid: Grid, generator: np.random.Generator) -> Floats:
    """Draw each cell's relevance by lot."""
    return generator.random(grid)


def _centre(grid: Grid, generator: np.random.Generator) -> Floats:
    """Return a Gaussian around the middle."""
    rows, cols = (
        np.exp(-((((np.arange(side) + 0.5) / side - 0.5) / CENTRE_SIGMA) ** 2) / 2) for side in grid
    )
    return np.outer(rows, cols)


BASELINES: Mapping[str, Callable[[Grid, np.random.Generator], Floats]] = MappingProxyType(
    {"random": _random, "centre": _centre}
)
"""Maps that know nothing of the image: of a grid (rows, cols) and a generator."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One class of one image.

    Attributes:
        class_index: The class that the maps explain.
        class_label: Its name, if it has one.
        truth: The image's true class, where it is known; else the class explained counts as right.
        scores: Of each method's map, the metrics by name; without a mask, those that need none.
        curves: What the model says as parts of the image go, (shares) in each of two orders, for
            each method.
        costs: Time of each method's maps over that of a plain forward pass of the same batch.
    """

    class_index: int
    class_label: str | None
    truth: int | None
    scores: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Curves]
    costs: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """What became of one image.

    Attributes:
        source: The image.
        cases: One for each class that its maps explain; none when it failed.
        error: Why it failed.
    """

    source: Source
    cases: tuple[Case, ...] = ()
    error: str | None = None


def subjects_of(
    sources: Iterable[Source],
    *,
    masks: Path | None = None,
    truth: Mapping[str, int] | None = None,
) -> list[Subject]:
    """Put together what is known about images.

    Args:
        sources: The images.
        masks: Folder with their masks.
        truth: Their true classes, by name.

    Raises:
        OptionError: The folder is not there, or knows none of the images; as the classes do.
    """
    if masks is not None and not masks.is_dir():
        raise OptionError(f"--masks {masks} is no folder")
    subjects = [
        Subject(
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


def contenders(model: Model, options: EvaluationOptions) -> tuple[str, ...]:
    """Return the names of the methods to measure, the baselines first.

    Raises:
        OptionError: A method that was asked for is not for this model, or no method is.
    """
    if not model.num_classes:
        raise OptionError(
            f"{model.name} has no classification head, so there is no score to measure maps by; "
            "give a fine-tuned checkpoint with --weights"
        )
    for name in options.methods:
        class_requests(model, variant(name))
    names = options.methods or tuple(name for name in VARIANTS if _suits(model, name))
    return tuple(dict.fromkeys([*BASELINES, *names]))


def examine(
    model: Model,
    subjects: Sequence[Subject],
    options: EvaluationOptions,
    *,
    warn: Callable[[str], None] = warnings.warn,
    advance: Callable[[float], None] = lambda images: None,
) -> Generator[Measurement, None, None]:
    """Measure methods on images, yielding one measurement an image in the order given.

    Args:
        model: The model; it is left as it was.
        subjects: The images. When one has a true class, all must.
        options: What to measure, and how.
        warn: Is told what the user should know while the work goes on.
        advance: Is told how much was done since, in images, and in parts of them.

    Raises:
        VitvizError: The options do not fit the model; an image that fails is a measurement.
    """
    _expect_classes(model, subjects)
    examiner, desk = _Examiner(model, options, warn, advance), _Desk(model, subjects, options)
    locate = partial(_locate, model, PERTURBATIONS[options.convention])
    depth = 2 * examiner.batch_size
    with worker_threads(options.workers) as pool:
        tasks = chain.from_iterable(map_ahead(pool, desk.prepare, enumerate(subjects), depth))
        cases: list[Case | str] = []
        for item, case in map_ahead(pool, locate, examiner.examine(tasks), depth, drain=True):
            cases.append(case)
            if item.is_last:
                yield _measurement(subjects[item.number].source, cases)
                cases = []


def _expect_classes(model: Model, subjects: Iterable[Subject]) -> None:
    """Make sure that true classes are some of the model's."""
    for subject in subjects:
        if subject.truth is not None and not 0 <= subject.truth < model.num_classes:
            raise LabelError(
                f"the true class of {subject.source.path} is {subject.truth}, but {model.name} has "
                f"{model.num_classes} classes; give an index from 0 to {model.num_classes - 1}"
            )


def _suits(model: Model, name: str) -> bool:
    """Tell whether a method is defined for a model."""
    try:
        class_requests(model, variant(name))
    except VitvizError:
        return False
    return True


@dataclass(frozen=True, kw_only=True, eq=False)
class _Task:
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
class _Failure:
    """An image, or one class of it, that failed."""

    number: int
    error: str
    is_last: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class _Finding:
    """What the model gave of a task; relevance (rows, cols) by method."""

    task: _Task
    class_index: int
    relevance: Mapping[str, Tensor]
    curves: Mapping[str, Curves]
    costs: Mapping[str, float]


class _Desk:
    """Makes tasks of images: decodes them, fits their masks, finds their classes."""

    def __init__(
        self, model: Model, subjects: Sequence[Subject], options: EvaluationOptions
    ) -> None:
        self._model = model
        self._frame = frame_of(model, options.fit)
        self._judged = any(subject.truth is not None for subject in subjects)
        masked = any(subject.mask is not None for subject in subjects)
        self._wanted = _wanted_class(model, options.target, judged=self._judged, masked=masked)

    def prepare(self, numbered: tuple[int, Subject]) -> list[_Task | _Failure]:
        """Return an image's tasks, one for each class that its maps explain."""
        number, subject = numbered
        try:
            if self._judged and subject.truth is None:
                raise ImageError("has no true class, though others have; add a line to --truth")
            sample = self._load(subject)
            mask = self._mask(subject, sample)
            choices = self._choices(mask, subject.truth)
            return [
                _Task(
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
            return [_Failure(number=number, error=reason(error))]

    def _load(self, subject: Subject) -> ImageSample:
        if subject.image is None:
            return load_sample(read_file(subject.source), self._frame, max_size=1)
        return sample_of(subject.image, subject.source.key, self._frame, max_size=1)

    def _mask(self, subject: Subject, sample: ImageSample) -> NDArray[np.int32] | None:
        """Return the mask's values on the part of the image that tokens see."""
        if subject.mask is None:
            return None
        mask = load_mask(subject.mask) if isinstance(subject.mask, Path) else subject.mask
        height, width = _seen(self._model, sample)
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


class _Examiner:
    """Runs tasks through the model: maps, their costs, and what taking parts away does."""

    def __init__(
        self,
        model: Model,
        options: EvaluationOptions,
        warn: Callable[[str], None],
        advance: Callable[[float], None],
    ) -> None:
        size = options.batch_size or batch_size_for(model.layout.tokens, model.device)
        self._model = model
        self._advance = advance
        self._seed = options.seed
        self._names = contenders(model, options)
        self._perturbation = PERTURBATIONS[options.convention]
        finest = max(variant(name).refine for name in self._names if name not in BASELINES)
        copies = max(2 * len(self._perturbation.shares), finest**2)
        self._portions = Portions(size, warn, copies=copies)

    @property
    def batch_size(self) -> int:
        """Images at once."""
        return self._portions.size

    def examine(self, tasks: Iterable[_Task | _Failure]) -> Iterator[_Finding | _Failure]:
        """Examine tasks in batches; pass failures through; keep the order."""
        work = partial(self._portions.work, function=self._examine_at_once, fail=_too_large)
        return in_batches(tasks, _shape, self.batch_size, work)

    def _examine_at_once(self, tasks: list[_Task]) -> list[_Finding | _Failure]:
        batch = self._untouched(tasks)
        maps, costs = self._explain(batch, tasks)
        curves = {}
        for name, each in maps.items():
            curves[name] = measure_curves(
                self._model, batch, each, self._perturbation, self.batch_size
            )
            self._tell_half_a_method(tasks)
        return [
            self._finding(row, task, batch, maps, curves, costs) for row, task in enumerate(tasks)
        ]

    def _untouched(self, tasks: list[_Task]) -> Untouched:
        images = to_tensor(self._model, [task.sample for task in tasks])
        logits = predict_batch(self._model, images)
        predicted = logits.argmax(dim=1).tolist()
        classes = [
            found if task.class_index is None else task.class_index
            for task, found in zip(tasks, predicted, strict=True)
        ]
        targets = [
            explained if task.truth is None else task.truth
            for task, explained in zip(tasks, classes, strict=True)
        ]
        return Untouched(
            images=images,
            logits=logits,
            classes=torch.tensor(classes),
            targets=torch.tensor(targets),
            ties=self._baseline("random", tasks),
        )

    def _explain(
        self, batch: Untouched, tasks: list[_Task]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the maps (batch, rows, cols) of each method, and their costs."""
        images, classes = batch.images, batch.classes.unsqueeze(1)

        def explain(name: str) -> Tensor:
            if name in BASELINES:
                return self._baseline(name, tasks)
            found = explain_batch(
                self._model,
                images,
                variant(name),
                class_indices=classes,
                at_once=self.batch_size,
            )
            return found.relevance[:, 0]

        _, plain = _timed(lambda: predict_batch(self._model, images))
        timed = {}
        for name in self._names:
            timed[name] = _timed(partial(explain, name))
            self._tell_half_a_method(tasks)
        maps = {name: relevance for name, (relevance, _) in timed.items()}
        return maps, {name: seconds / plain for name, (_, seconds) in timed.items()}

    def _tell_half_a_method(self, tasks: list[_Task]) -> None:
        """Tell that a method's maps of a batch are made, or its curves."""
        self._advance(sum(task.share for task in tasks) / (2 * len(self._names)))

    def _baseline(self, name: str, tasks: list[_Task]) -> Tensor:
        """Make a baseline's maps; what is drawn hangs on the seed and on the image alone."""
        maps = []
        for task in tasks:
            generator = np.random.default_rng([self._seed, int(task.sample.digest, 16)])
            maps.append(BASELINES[name](_grid(self._model, task.sample), generator))
        return torch.from_numpy(np.stack(maps)).float()

    def _finding(
        self,
        row: int,
        task: _Task,
        batch: Untouched,
        maps: Mapping[str, Tensor],
        curves: Mapping[str, list[Curves]],
        costs: Mapping[str, float],
    ) -> _Finding | _Failure:
        """Pick one task's part out of a batch."""
        for name in self._names:
            sound = maps[name][row].isfinite().all() and curves[name][row].finite
            if not sound:
                return _failed(task, f"gives numbers that are not finite with {name}")
        return _Finding(
            task=task,
            class_index=int(batch.classes[row]),
            relevance={name: each[row] for name, each in maps.items()},
            curves={name: each[row] for name, each in curves.items()},
            costs=costs,
        )


def _locate(
    model: Model, perturbation: Perturbation, item: _Finding | _Failure
) -> tuple[_Task | _Failure, Case | str]:
    """Score the maps of a task, those that have a mask against it too.

    Returns:
        The task, and what was found or why it failed.
    """
    if isinstance(item, _Failure):
        return item, item.error
    case = Case(
        class_index=item.class_index,
        class_label=model.labels[item.class_index],
        truth=item.task.truth,
        scores={
            name: {
                **_faithfulness(item.curves[name], perturbation),
                **_localisation(model, item.task, relevance),
            }
            for name, relevance in item.relevance.items()
        },
        curves=item.curves,
        costs=item.costs,
    )
    return item.task, case


def _faithfulness(curves: Curves, perturbation: Perturbation) -> dict[str, float]:
    """Sum up curves.

    Deletion is what is left of the probability as the most relevant parts go. Insertion at a share
    shows the parts that removing the least relevant ones leaves: the same pictures, read
    backwards, so its area is that of the second order. Positive and negative perturbation are the
    same two orders, in accuracy.
    """
    deletion, insertion = perturbation.area(curves.probability).tolist()
    positive, negative = perturbation.area(curves.accuracy).tolist()
    return {
        "deletion": deletion,
        "insertion": insertion,
        "difference": insertion - deletion,
        "positive": positive,
        "negative": negative,
    }


def _localisation(model: Model, task: _Task, relevance: Tensor) -> dict[str, float]:
    """Compare a map, interpolated to the pixels that tokens see, with the mask."""
    if task.asked is None:
        return {}
    pixels = upsample(relevance.unsqueeze(0), _seen(model, task.sample))[0].numpy()
    scores = {
        "pointing": pointing_game(pixels, task.asked),
        "energy": energy_inside(pixels, task.asked),
        "average_precision": average_precision(pixels, task.asked),
        "best_miou": best_miou(pixels, task.asked),
    }
    if task.objects is not None:
        scores["specificity"] = specificity(pixels, task.asked, task.objects)
    return scores


def _measurement(source: Source, cases: list[Case | str]) -> Measurement:
    """Put an image's cases together; it fails with any of them."""
    for case in cases:
        if isinstance(case, str):
            return Measurement(source=source, error=case)
    return Measurement(source=source, cases=tuple(each for each in cases if isinstance(each, Case)))


def _wanted_class(model: Model, word: str, *, judged: bool, masked: bool) -> int | str:
    """Read the class that maps are asked to explain: an index, or top1, truth or mask.

    Raises:
        OptionError: It is several, or there is nothing to take it from.
        LabelError: It is none of the model's.
    """
    known = {"truth": judged, "mask": masked}
    if word in known:
        if not known[word]:
            raise OptionError(
                f"--class {word} has nothing to go by: no image has one; see --masks and --truth"
            )
        return word
    requests = parse_requests([word], model.labels, model.num_classes)
    if len(requests) != 1:
        raise OptionError(f"--class {word} is several classes; give top1, an index or a label")
    return "top1" if requests[0].class_index is None else requests[0].class_index


def _seen(model: Model, sample: ImageSample) -> Grid:
    """Return the (height, width) of the pixels that tokens see."""
    height, width = sample.pixels.shape[:2]
    return seen_size((height, width), model.preprocessing.patch)


def _grid(model: Model, sample: ImageSample) -> Grid:
    """Return the (rows, cols) of an image's patch tokens."""
    if sample.pixels.shape[:2] == model.preprocessing.size:
        return model.layout.grid
    (height, width), patch = _seen(model, sample), model.preprocessing.patch
    return height // patch[0], width // patch[1]


def _shape(item: object) -> tuple[int, ...] | None:
    """Return what tasks of one batch have in common; None for what is not to be run."""
    return item.sample.pixels.shape if isinstance(item, _Task) else None


def _too_large(task: _Task, error: MemoryError) -> _Failure:
    return _failed(task, reason(error))


def _failed(task: _Task, error: str) -> _Failure:
    return _Failure(number=task.number, error=error, is_last=task.is_last)


def _timed(work: Callable[[], _Made]) -> tuple[_Made, float]:
    """Return what is made, and the seconds that it takes: the faster of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        made = work()
        seconds.append(time.perf_counter() - start)
    return made, min(seconds)
