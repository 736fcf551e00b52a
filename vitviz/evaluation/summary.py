"""Methods side by side: what the measurements of many images amount to, for people and machines."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vitviz.evaluation.baselines import BASELINES
from vitviz.evaluation.measuring import ImageScores, method_names
from vitviz.evaluation.metrics import Bootstrap, Interval, bootstrap
from vitviz.evaluation.options import EvaluationOptions
from vitviz.evaluation.perturbation import PERTURBATIONS
from vitviz.evaluation.scores import ClassScores
from vitviz.evaluation.wording import explain_numbers
from vitviz.methods.table import named_method
from vitviz.models.model import Model
from vitviz.models.record import versions
from vitviz.options import Convention, ValueRange

__all__ = ["CSV_HEADER", "Evaluation", "METRICS", "Metric", "MethodSummary", "Summary", "summarize"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that each map gets.

    Attributes:
        name: In records.
        title: In tables.
        lower: Whether lower is better.
        table: Which table it stands in.
    """

    name: str
    title: str
    lower: bool = False
    table: Literal["faithfulness", "localisation", "classes"] = "faithfulness"


METRICS = (
    Metric(name="deletion", title="deletion", lower=True),
    Metric(name="insertion", title="insertion"),
    Metric(name="difference", title="difference"),
    Metric(name="positive", title="positive", lower=True),
    Metric(name="negative", title="negative"),
    Metric(name="pointing", title="pointing", table="localisation"),
    Metric(name="energy", title="energy", table="localisation"),
    Metric(name="average_precision", title="precision", table="localisation"),
    Metric(name="best_miou", title="best mIoU", table="localisation"),
    Metric(name="specificity", title="specificity", table="localisation"),
    Metric(name="class_correlation", title="correlation", lower=True, table="classes"),
)
"""What is measured, in order."""

_COLUMNS = ("source", "class_index", "class_label", "truth", "method")
CSV_HEADER = ",".join([*_COLUMNS, *(metric.name for metric in METRICS)])
"""First line of every table of numbers, by which vitviz knows its own."""

_AREAS = ("deletion", "insertion", "difference")  # which conventions have titles of their own for
_ORDERS = ("most_relevant_first", "least_relevant_first")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric of one method, over all images that have it.

    Attributes:
        interval: The mean, and where it may lie.
        images: How many images it is the mean of.
        versus: This mean less that of each baseline, on the same images.
        versus_best: The same for the best method, by its name; nothing of the best itself.
        better: Whether it is better than every baseline, the intervals of the differences without
            0 in them.
    """

    interval: Interval
    images: int
    versus: Mapping[str, Interval]
    versus_best: Mapping[str, Interval]
    better: bool

    @property
    def near_best(self) -> bool:
        """Whether it is the best, or the interval of its difference to the best has 0 in it."""
        return not math.isnan(self.interval.low) and all(
            each.low <= 0 <= each.high for each in self.versus_best.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as a record."""
        return {
            **asdict(self.interval),
            "images": self.images,
            "versus": {name: asdict(interval) for name, interval in self.versus.items()},
            "versus_best": {name: asdict(each) for name, each in self.versus_best.items()},
            "better_than_baselines": self.better,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class MethodSummary:
    """One method.

    Attributes:
        name: Of the method or baseline.
        options: How its maps are computed.
        cost: Time of its maps over that of a plain forward pass, the median of the batches.
        summaries: By metric; those that no image has are not there.
        score: (orders, shares), means over the images of what curves are of.
        accuracy: (orders, shares), the same.
    """

    name: str
    options: Mapping[str, Any]
    cost: float
    summaries: Mapping[str, Summary]
    score: NDArray[np.floating]
    accuracy: NDArray[np.floating]

    @property
    def is_baseline(self) -> bool:
        """Whether it knows nothing of the images."""
        return self.name in BASELINES

    def to_dict(self, score: str) -> dict[str, Any]:
        """Return it as a record, with the name of what curves are of."""
        curves = {score: self.score, "accuracy": self.accuracy}
        return {
            "options": dict(self.options),
            "cost": self.cost,
            "metrics": {name: summary.to_dict() for name, summary in self.summaries.items()},
            "curves": {
                name: dict(zip(_ORDERS, curve.tolist(), strict=True))
                for name, curve in curves.items()
            },
        }


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Evaluation:
    """Methods side by side.

    Attributes:
        convention: How faithfulness was measured.
        explanations: What each number means, in words.
        methods: One a method, the baselines first.
        measurements: What became of each image.
        settings: The model and the options, for records.
    """

    convention: Convention
    explanations: Mapping[str, str]
    methods: tuple[MethodSummary, ...]
    measurements: tuple[ImageScores, ...]
    settings: Mapping[str, Any]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that there is anything to say of."""
        known = {name for method in self.methods for name in method.summaries}
        titles = dict(zip(_AREAS, PERTURBATIONS[self.convention].titles, strict=True))
        return tuple(
            replace(metric, title=titles.get(metric.name, metric.title))
            for metric in METRICS
            if metric.name in known
        )

    @property
    def failed(self) -> tuple[ImageScores, ...]:
        """The images that failed."""
        return tuple(each for each in self.measurements if each.error is not None)

    @property
    def images(self) -> int:
        """How many images were measured."""
        return len(self.measurements) - len(self.failed)

    @property
    def masked(self) -> int:
        """How many of them have a mask of an object."""
        return sum(map(_is_masked, self.measurements))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, as JSON can hold it."""
        failed = {each.source.name: each.error for each in self.failed}
        document = {
            **self.settings,
            "images": self.images,
            "masked": self.masked,
            "failed": [{"source": source, "error": error} for source, error in failed.items()],
            "convention": {
                "name": self.convention.value,
                **asdict(PERTURBATIONS[self.convention]),
                "in_words": dict(self.explanations),
            },
            "methods": {
                method.name: method.to_dict(PERTURBATIONS[self.convention].score)
                for method in self.methods
            },
            "cases": [
                _record(measurement, case)
                for measurement in self.measurements
                for case in measurement.cases
            ],
        }
        return dict(_plain(document))

    def __repr__(self) -> str:
        """Say what was compared, in one short line."""
        return f"<Evaluation of {len(self.methods)} methods on {self.images} images>"

    def to_csv(self) -> str:
        """Return a table of the numbers of each map, a line each."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(CSV_HEADER.split(","))
        for measurement in self.measurements:
            for case in measurement.cases:
                writer.writerows(_rows(measurement, case))
        return buffer.getvalue()


def summarize(
    model: Model, options: EvaluationOptions, measurements: Sequence[ImageScores]
) -> Evaluation:
    """Put measurements together.

    Args:
        model: The model that was measured with.
        options: What was measured, and how.
        measurements: One an image.
    """
    names = method_names(model, options)
    numbered = [(number, case) for number, each in enumerate(measurements) for case in each.cases]
    images, cases = [number for number, _ in numbered], [case for _, case in numbered]
    _require_known({score for case in cases for each in case.scores.values() for score in each})
    values = np.full((len(cases), len(names), len(METRICS)), np.nan)
    for row, case in enumerate(cases):
        for column, name in enumerate(names):
            values[row, column] = [case.scores[name].get(each.name, np.nan) for each in METRICS]
    drawn = bootstrap(values, images, resamples=options.resamples, seed=options.seed)
    of_image = np.array(images)
    counts = [
        [len(np.unique(of_image[known])) for known in of_method.T]
        for of_method in np.isfinite(values).transpose(1, 0, 2)
    ]
    return Evaluation(
        convention=options.convention,
        explanations=explain_numbers(model, options, cases),
        methods=tuple(
            _method_summary(name, cases, _summaries(name, names, drawn, of_metrics))
            for name, of_metrics in zip(names, counts, strict=True)
        ),
        measurements=tuple(measurements),
        settings=_settings(model, options),
    )


def _require_known(scores: Set[str]) -> None:
    """Make sure that no score is left out of the tables: each must be one of ``METRICS``."""
    if unknown := scores - {metric.name for metric in METRICS}:
        raise LookupError(f"scores without a metric: {', '.join(sorted(unknown))}")


def _summaries(
    name: str, names: Sequence[str], drawn: Bootstrap, counts: Sequence[int]
) -> dict[str, Summary]:
    """Summarise the metrics of a method, those that there are.

    Args:
        name: The method.
        names: All of them.
        drawn: Of (methods, metrics).
        counts: How many images have each metric.
    """
    row, baselines = names.index(name), [each for each in BASELINES if each != name]
    summaries = {}
    for column, (metric, images) in enumerate(zip(METRICS, counts, strict=True)):
        if not images:
            continue
        best = _best(metric, names, drawn.means[:, column])
        versus, versus_best = (
            {each: drawn.difference((row, column), (names.index(each), column)) for each in others}
            for others in (baselines, [best] if best not in (None, name) else [])
        )
        summaries[metric.name] = Summary(
            interval=drawn.interval((row, column)),
            images=images,
            versus=versus,
            versus_best=versus_best,
            better=all(_is_better(metric, difference) for difference in versus.values()),
        )
    return summaries


def _best(metric: Metric, names: Sequence[str], means: NDArray[np.floating]) -> str | None:
    """Return the method, no baseline, of the best mean; None where no method has any."""
    known = {
        name: mean * (-1 if metric.lower else 1)
        for name, mean in zip(names, means.tolist(), strict=True)
        if name not in BASELINES and not math.isnan(mean)
    }
    return max(known, key=lambda name: known[name], default=None)


def _is_better(metric: Metric, difference: Interval) -> bool:
    return difference.high < 0 if metric.lower else difference.low > 0


def _method_summary(
    name: str, cases: Sequence[ClassScores], summaries: Mapping[str, Summary]
) -> MethodSummary:
    return MethodSummary(
        name=name,
        options=_method_options(name),
        cost=float(np.median([case.costs[name] for case in cases])) if cases else math.nan,
        summaries=summaries,
        score=_mean([case.curves[name].score for case in cases]),
        accuracy=_mean([case.curves[name].accuracy for case in cases]),
    )


def _method_options(name: str) -> dict[str, Any]:
    if name in BASELINES:
        return {}
    method = named_method(name).method
    return {"method": method.name, **method.to_record()}


def _mean(curves: Sequence[NDArray[np.float32]]) -> NDArray[np.floating]:
    return np.mean(curves, axis=0, dtype=float) if curves else np.zeros((len(_ORDERS), 0))


def _settings(model: Model, options: EvaluationOptions) -> dict[str, Any]:
    """Return what the numbers hang on, for records."""
    return {
        "versions": versions(),
        "model": model.name,
        "weights": {"source": model.weights, "sha256": model.digest},
        "score_kind": model.score_kind,
        "options": {
            "class": options.target,
            **({} if options.versus is None else {"versus": options.versus}),
            "fit": options.fit.value,
            **ValueRange.to_record(options.value_range),
            "size": list(model.preprocessing.size),
            "mean": list(model.preprocessing.mean),
            "std": list(model.preprocessing.std),
            "dtype": str(model.dtype).removeprefix("torch."),
            "labels": model.labels.source,
            "seed": options.seed,
            "bootstrap": options.resamples,
        },
    }


def _is_masked(measurement: ImageScores) -> bool:
    return any("pointing" in each for case in measurement.cases for each in case.scores.values())


def _record(measurement: ImageScores, case: ClassScores) -> dict[str, Any]:
    other = {"versus_index": case.versus_index, "versus_label": case.versus_label}
    return {
        "source": measurement.source.name,
        "class_index": case.class_index,
        "class_label": case.class_label,
        **({} if case.versus_index is None else other),
        "truth": case.truth,
        "scores": {name: dict(scores) for name, scores in case.scores.items()},
    }


def _rows(measurement: ImageScores, case: ClassScores) -> Iterator[list[Any]]:
    """Yield a table's rows, one per method; what is not known is empty."""
    source = measurement.source.name
    for name, scores in case.scores.items():
        numbers = [scores.get(metric.name) for metric in METRICS]
        yield [source, case.class_index, case.class_label, case.truth, name, *numbers]


def _plain(value: Any) -> Any:
    """Put what JSON has no word for as it can: NaN as null, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
