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
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitviz.errors import LabelError, OptionError, VitvizError, reason
from vitviz.evaluation.baselines import BASELINES
from vitviz.evaluation.options import EvaluationOptions
from vitviz.evaluation.perturbation import PERTURBATIONS, Curves, Untouched, measure_curves
from vitviz.evaluation.scores import ClassScores, ModelOutput, failed, locate
from vitviz.evaluation.tasks import AnnotatedImage, Failure, Task, TaskLoader, seen
from vitviz.explaining.batch import predict_batch
from vitviz.explaining.samples import Explained, Explainer, Failed, images_at_once, to_tensor
from vitviz.explaining.targets import targets_of
from vitviz.images.remarks import Tally
from vitviz.images.samples import ImageSample
from vitviz.images.sources import Source
from vitviz.methods.method import Method
from vitviz.methods.table import named_method, variants
from vitviz.models.labels import ClassRequest, parse_versus
from vitviz.models.model import Model
from vitviz.streaming import AdaptiveBatches, in_batches, map_ahead, worker_threads

__all__ = ["ImageScores", "measure", "method_names"]

Grid = tuple[int, int]
_Made = TypeVar("_Made")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageScores:
    """What became of one image.

    Attributes:
        source: The image.
        cases: One for each class that its maps explain; none when it failed.
        error: Why it failed.
    """

    source: Source
    cases: tuple[ClassScores, ...] = ()
    error: str | None = None


def method_names(model: Model, options: EvaluationOptions) -> tuple[str, ...]:
    """Return the names of the methods to measure, the baselines first.

    Raises:
        OptionError: A method that was asked for is not for this model, or no method is.
    """
    if not model.num_classes:
        raise OptionError(
            f"{model.name} has no classification head, so there is no score to measure maps by; "
            "give a fine-tuned checkpoint with --weights"
        )
    return tuple(dict.fromkeys([*BASELINES, *_methods(model, options)]))


def _methods(model: Model, options: EvaluationOptions) -> dict[str, Method]:
    """Return the methods to measure by name: those asked for, or all that suit the model."""
    if options.methods:
        chosen = {name: named_method(name).method for name in options.methods}
        for method in chosen.values():
            Explainer(model, method)  # raises where a method is not for this model
        return chosen
    return {name: method for name, method in variants().items() if _suits(model, method)}


def measure(
    model: Model,
    subjects: Sequence[AnnotatedImage],
    options: EvaluationOptions,
    *,
    warn: Callable[[str], None] = warnings.warn,
    advance: Callable[[float], None] = lambda images: None,
) -> Generator[ImageScores, None, None]:
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
    measuring = _Measuring(model, options, warn, advance)
    loader = TaskLoader(model, subjects, options)
    score = partial(locate, model, PERTURBATIONS[options.convention])
    depth = 2 * measuring.batch_size
    with worker_threads(options.workers) as pool:
        tasks = chain.from_iterable(map_ahead(pool, loader.prepare, enumerate(subjects), depth))
        counted = _count_remarks(tasks, warn)
        cases: list[ClassScores | str] = []
        for item, case in map_ahead(pool, score, measuring.measure(counted), depth, drain=True):
            cases.append(case)
            if item.is_last:
                yield _measurement(subjects[item.number].source, cases)
                cases = []


def _expect_classes(model: Model, subjects: Iterable[AnnotatedImage]) -> None:
    """Make sure that true classes are some of the model's."""
    for subject in subjects:
        if subject.truth is not None and not 0 <= subject.truth < model.num_classes:
            raise LabelError(
                f"the true class of {subject.source.name} is {subject.truth}, but {model.name} has "
                f"{model.num_classes} classes; give an index from 0 to {model.num_classes - 1}"
            )


def _count_remarks(
    tasks: Iterable[Task | Failure], warn: Callable[[str], None]
) -> Iterator[Task | Failure]:
    """Pass tasks on, and say at the end what people should know of their images."""
    tally = Tally()
    for task in tasks:
        if isinstance(task, Task) and task.is_last:
            tally.add(task.sample.remarks, "image", task.sample.source.name)
        yield task
    tally.tell(warn)


def _suits(model: Model, method: Method) -> bool:
    """Tell whether a method is defined for a model."""
    try:
        Explainer(model, method)
    except VitvizError:
        return False
    return True


class _Measuring:
    """Runs tasks through the model: maps, their costs, and what taking parts away does."""

    def __init__(
        self,
        model: Model,
        options: EvaluationOptions,
        warn: Callable[[str], None],
        advance: Callable[[float], None],
    ) -> None:
        size = options.batch_size or images_at_once(model)
        self._model = model
        self._advance = advance
        self._seed = options.seed
        self._versus = (
            None
            if options.versus is None
            else parse_versus(options.versus, model.labels, model.num_classes)
        )
        self._names = method_names(model, options)
        self._perturbation = PERTURBATIONS[options.convention]
        self._methods = _methods(model, options)
        self._explainers = {name: Explainer(model, each) for name, each in self._methods.items()}
        finest = max(method.refine for method in self._methods.values())
        copies = max(2 * len(self._perturbation.shares), finest**2)
        self._batches = AdaptiveBatches(size, warn, copies=copies)

    @property
    def batch_size(self) -> int:
        """Images at once."""
        return self._batches.size

    def measure(self, tasks: Iterable[Task | Failure]) -> Iterator[ModelOutput | Failure]:
        """Measure tasks in batches; pass failures through; keep the order."""
        work = partial(self._batches.work, function=self._measure_at_once, fail=_too_large)
        return in_batches(tasks, _shape, self.batch_size, work)

    def _measure_at_once(self, tasks: list[Task]) -> list[ModelOutput | Failure]:
        batch = self._untouched(tasks)
        maps, costs = self._explain(batch, tasks)
        rivals = self._explain_rivals(batch, tasks)
        curves = {}
        for name, each in maps.items():
            curves[name] = measure_curves(
                self._model, batch, each, self._perturbation, self.batch_size
            )
            self._tell_half_a_method(tasks)
        return [
            self._model_output(row, task, batch, maps, rivals, curves, costs)
            for row, task in enumerate(tasks)
        ]

    def _untouched(self, tasks: list[Task]) -> Untouched:
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
        explained = torch.tensor(classes).view(-1, 1, 1)
        pairs = targets_of(logits, (ClassRequest(versus=self._versus),), explained)[:, 0]
        return Untouched(
            images=images,
            logits=logits,
            classes=pairs[:, 0],
            targets=torch.tensor(targets),
            ties=self._baseline("random", tasks),
            versus=None if self._versus is None else pairs[:, 1],
        )

    def _explain(
        self, batch: Untouched, tasks: list[Task]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the maps (batch, rows, cols) of each method, and their costs."""
        samples, classes = [task.sample for task in tasks], batch.classes.tolist()
        versus = None if batch.versus is None else batch.versus.tolist()

        def explain(name: str) -> Tensor:
            if name in BASELINES:
                return self._baseline(name, tasks)
            make = self._explainers[name].explain
            return _stacked(make(samples, classes, versus, at_once=self.batch_size))

        _, plain = _timed(lambda: predict_batch(self._model, batch.images))
        timed = {}
        for name in self._names:
            timed[name] = _timed(partial(explain, name))
            self._tell_half_a_method(tasks)
        maps = {name: relevance for name, (relevance, _) in timed.items()}
        return maps, {name: seconds / plain for name, (_, seconds) in timed.items()}

    def _explain_rivals(self, batch: Untouched, tasks: list[Task]) -> dict[str, Tensor]:
        """Return the maps of methods that explain a class for the best of the other classes."""
        if batch.versus is not None or batch.logits.shape[1] < 2:
            return {}
        own = F.one_hot(batch.classes, batch.logits.shape[1]).bool()
        others = batch.logits.masked_fill(own, -torch.inf).argmax(dim=1).tolist()
        samples = [task.sample for task in tasks]
        return {
            name: _stacked(self._explainers[name].explain(samples, others, at_once=self.batch_size))
            for name, method in self._methods.items()
            if method.explains_class
        }

    def _tell_half_a_method(self, tasks: list[Task]) -> None:
        """Tell that a method's maps of a batch are made, or its curves."""
        self._advance(sum(task.share for task in tasks) / (2 * len(self._names)))

    def _baseline(self, name: str, tasks: list[Task]) -> Tensor:
        """Make a baseline's maps; what is drawn hangs on the seed and on the image alone."""
        maps = []
        for task in tasks:
            generator = np.random.default_rng([self._seed, int(task.sample.digest, 16)])
            maps.append(BASELINES[name](_grid(self._model, task.sample), generator))
        return torch.from_numpy(np.stack(maps)).float()

    def _model_output(
        self,
        row: int,
        task: Task,
        batch: Untouched,
        maps: Mapping[str, Tensor],
        rivals: Mapping[str, Tensor],
        curves: Mapping[str, list[Curves]],
        costs: Mapping[str, float],
    ) -> ModelOutput | Failure:
        """Pick one task's part out of a batch."""
        versus = None if batch.versus is None else int(batch.versus[row])
        if versus == batch.classes[row]:
            return failed(
                task,
                f"would have class {versus} compared with itself: it is the one explained, and "
                "the one of --versus",
            )
        for name in self._names:
            sound = maps[name][row].isfinite().all() and curves[name][row].finite
            if not sound:
                return failed(task, f"gives numbers that are not finite with {name}")
        return ModelOutput(
            task=task,
            class_index=int(batch.classes[row]),
            versus_index=versus,
            relevance={name: each[row] for name, each in maps.items()},
            rivals={name: each[row] for name, each in rivals.items()},
            curves={name: each[row] for name, each in curves.items()},
            costs=costs,
        )


def _stacked(found: Sequence[Explained | Failed]) -> Tensor:
    """Stack the maps (batch, rows, cols) of a batch; of an image that failed, NaN."""
    maps = [
        torch.from_numpy(each.maps[0].relevance) for each in found if isinstance(each, Explained)
    ]
    nothing = torch.full_like(maps[0], torch.nan) if maps else torch.full((1, 1), torch.nan)
    rest = iter(maps)
    return torch.stack([next(rest) if isinstance(each, Explained) else nothing for each in found])


def _measurement(source: Source, cases: list[ClassScores | str]) -> ImageScores:
    """Put an image's cases together; it fails with any of them."""
    for case in cases:
        if isinstance(case, str):
            return ImageScores(source=source, error=case)
    return ImageScores(
        source=source, cases=tuple(each for each in cases if isinstance(each, ClassScores))
    )


def _grid(model: Model, sample: ImageSample) -> Grid:
    """Return the (rows, cols) of an image's patch tokens."""
    if sample.pixels.shape[:2] == model.preprocessing.size:
        return model.layout.grid
    (height, width), patch = seen(model, sample), model.preprocessing.patch
    return height // patch[0], width // patch[1]


def _shape(item: object) -> tuple[int, ...] | None:
    """Return what tasks of one batch have in common; None for what is not to be run."""
    return item.sample.pixels.shape if isinstance(item, Task) else None


def _too_large(task: Task, error: MemoryError) -> Failure:
    return failed(task, reason(error))


def _timed(work: Callable[[], _Made]) -> tuple[_Made, float]:
    """Return what is made, and the seconds that it takes: the faster of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        made = work()
        seconds.append(time.perf_counter() - start)
    return made, min(seconds)
