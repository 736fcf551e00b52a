"""What Python users call: the methods as functions of a model and images.

The functions of the methods follow from ``methods.table``; ``__init__.pyi`` has their signatures
for editors and type checkers.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from vitviz.errors import ImageError, OptionError
from vitviz.evaluation.measuring import measure
from vitviz.evaluation.summary import Evaluation, summarize
from vitviz.explaining import samples as explaining
from vitviz.explaining.explanation import Explanation
from vitviz.explaining.grids import Explanations
from vitviz.explaining.grids import grid as grid_of
from vitviz.explaining.samples import (
    Explained,
    Failed,
    batch_size_of,
    images_at_once,
    input_transform,
)
from vitviz.images.decoding import read_file
from vitviz.images.remarks import Tally
from vitviz.images.samples import ImageSample, load_sample, sample_of
from vitviz.images.sources import Source
from vitviz.methods.method import ClassMethod, Method, options_of
from vitviz.methods.table import METHODS
from vitviz.models import model as models
from vitviz.models.model import Model
from vitviz.options import Convention, Fit, PictureOptions, ValueRange
from vitviz.python_values import (
    Images,
    Target,
    Values,
    Versus,
    evaluation_options,
    images_in,
    option_value,
    require_inputs,
    subjects_of,
)
from vitviz.python_words import in_python_words, warn, warn_of_maps
from vitviz.runs.pipeline import count_caveats
from vitviz.streaming import map_ahead, worker_threads

__all__ = [
    "attention",
    "evaluate",
    "evidence",
    "explain_samples",
    "grad_rollout",
    "grid",
    "load_model",
    "load_samples",
    "relevance",
    "rollout",
]

_Found = Explained | Failed
_Function = TypeVar("_Function", bound=Callable[..., Any])

_SHARED = """\
        model: From ``load_model``; it is left as it was.
        images: Paths of images and folders, Pillow images, arrays (height, width, 3) or tensors
            (3, height, width), of uint8 or of floats in [0, 1]; one of these, or several.
{options}
        fit: ``squash``, ``crop`` or ``native``.
        value_range: Pixel values that become black and white, (0, 4095), or percentiles of each
            image, "1%:99%"; None: 0 and the largest integer of their type, 0 and 1 for floats.
        batch_size: Images run at once; None: chosen by the number of tokens.
        pictures: How the maps draw themselves; None: as by default.
        errors: ``raise``, or ``skip`` to leave out images that fail, with a warning.
{target}
    Returns:
        One explanation for each image{and_class}.

    Raises:
        VitvizError: An option or an image is not usable.
"""


_TARGET = """\
        target: What to explain in place of a class: a function of logits (batch, classes) to
            scores (batch), tensors both, ``lambda logits: logits[:, 3] - logits[:, 5]``.
"""


load_model = in_python_words(models.load_model)
explain_samples = in_python_words(explaining.explain_samples)
grid = in_python_words(grid_of)


@in_python_words
def load_samples(
    model: Model,
    images: Images,
    *,
    fit: Fit | str = Fit.SQUASH,
    value_range: Values = None,
    max_size: int = 1024,
) -> Iterator[ImageSample | Failed]:
    """Read and fit images for ``explain_samples``, a few ahead of the one that is asked for.

    Args:
        model: From ``load_model``.
        images: Paths of images and folders, Pillow images, arrays (height, width, 3) or tensors
            (3, height, width), of uint8 or of floats in [0, 1]; one of these, or several.
        fit: ``squash``, ``crop`` or ``native``.
        value_range: As for ``rollout``.
        max_size: Longest side of the pictures, in pixels.

    Yields:
        A sample for each image; a failure for one that cannot be read.

    Raises:
        VitvizError: An option is not usable, or an image in memory is no image.
    """
    require_inputs(model, images)
    transform = input_transform(model, Fit(fit), ValueRange.ensure(value_range))

    def load(numbered: tuple[int, Any]) -> ImageSample | Failed:
        number, image = numbered
        if not isinstance(image, (str, os.PathLike)):
            return in_python_words(sample_of)(image, f"image {number}", transform, max_size)
        source = Source(path=Path(image), key=Path(image).name)
        try:
            return in_python_words(load_sample)(read_file(source), transform, max_size)
        except (ImageError, MemoryError) as error:
            return Failed.because(source, error)

    def loaded() -> Iterator[ImageSample | Failed]:
        with worker_threads(None) as pool:
            yield from map_ahead(
                pool, load, enumerate(images_in(images)), 2 * images_at_once(model)
            )

    return loaded()


def explain(
    model: Model,
    images: Images,
    method: Method,
    *,
    pictures: PictureOptions | None = None,
    fit: Fit = Fit.SQUASH,
    value_range: Values = None,
    batch_size: int | None = None,
    errors: str = "raise",
    target: Target | None = None,
    finish: Callable[[Iterator[_Found]], Iterator[_Found]] = iter,
) -> list[Explanation]:
    """Explain images and return their maps, image by image, class by class.

    Args:
        model: The model; it is left as it was.
        images: Paths of images and folders, Pillow images, arrays (height, width, 3) or tensors
            (3, height, width), of uint8 or of floats in [0, 1]; one of these, or several.
        method: The method, with its options.
        pictures: How the maps draw themselves; None: as by default.
        fit: How images are brought to the model's size.
        value_range: As for ``load_samples``.
        batch_size: Images run at once; None: chosen by the number of tokens.
        errors: ``raise``, or ``skip`` to leave out images that fail, with a warning.
        target: As for ``explain_samples``.
        finish: What is done to what became of each image.

    Raises:
        ImageError: An image cannot be read or explained.
        VitvizError: The options do not fit the model.
    """
    require_inputs(model, images)
    if errors not in ("raise", "skip"):
        raise OptionError(f"errors is {errors!r}; give 'raise' or 'skip'")
    pictures = pictures or PictureOptions()
    if fit is not Fit.NATIVE:
        method.require_grid(model.layout.grid)
    samples = load_samples(
        model, images, fit=fit, value_range=value_range, max_size=pictures.max_size
    )
    explained = explaining.explain_samples(
        *(model, samples, method),
        target=target,
        pictures=pictures,
        batch_size=batch_size,
        warn=warn,
    )
    return _maps_of(finish(explained), skip=errors == "skip")


def _maps_of(items: Iterable[_Found], *, skip: bool) -> list[Explanation]:
    """Gather the maps; at an image that failed, raise, or skip it and warn in the end."""
    explanations = Explanations()
    failed: list[Failed] = []
    tally = Tally()
    for item in count_caveats(items, tally):
        if isinstance(item, Explained):
            explanations += item.maps
        elif skip:
            failed.append(item)
        else:
            raise ImageError(f"{item.source.name} {item.error}")
    tally.tell(warn_of_maps)
    _warn_of_failures(failed)
    return explanations


def _warn_of_failures(failed: Sequence[Failed]) -> None:
    if failed:
        images = "1 image" if len(failed) == 1 else f"{len(failed)} images"
        were = "was" if len(failed) == 1 else "were"
        first = f"{failed[0].source.name}: {failed[0].error}"
        warn(f"{images} failed and {were} left out, the first: {first}")


def _function(method: type[Method], name: str) -> Callable[..., list[Explanation]]:
    """Make a method's function: its options and what all methods share as parameters."""

    def explain_images(
        model: Model,
        images: Images,
        *,
        fit: Fit | str = Fit.SQUASH,
        value_range: Values = None,
        batch_size: int | None = None,
        pictures: PictureOptions | None = None,
        errors: str = "raise",
        target: Target | None = None,
        **options: Any,
    ) -> list[Explanation]:
        made = method(
            **{each: option_value(each, hints[each], value) for each, value in options.items()}
        )
        return explain(
            *(model, images, made),
            fit=Fit(fit),
            value_range=value_range,
            batch_size=batch_size,
            pictures=pictures,
            errors=errors,
            target=target,
        )

    hints = get_type_hints(method)
    declared = _ordered(method)
    shared = list(inspect.signature(explain_images).parameters.values())
    own = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=_annotation(hints[each.name]),
        )
        for each in declared
    ]
    # A target stands in the place of a class.
    last = -1 if issubclass(method, ClassMethod) else -2
    parameters = [*shared[:2], *own, *shared[2:last]]
    wrapper = _checked(in_python_words(explain_images), {each.name for each in parameters})
    wrapper.__name__ = wrapper.__qualname__ = name
    wrapper.__doc__ = _docstring(method)
    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        parameters, return_annotation="list[Explanation]"
    )
    return wrapper


def _checked(function: _Function, names: set[str]) -> _Function:
    """Refuse parameters that a function does not have, as Python does."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if unknown := [each for each in kwargs if each not in names]:
            raise TypeError(
                f"{wrapper.__name__}() got an unexpected keyword argument {unknown[0]!r}"
            )
        return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def _ordered(method: type[Method]) -> list[Any]:
    """Return a method's fields in the order of its function: classes, its own, refine."""
    found = {each.name: each for each in options_of(method)}
    first, last = [found.pop("classes", None)], [found.pop("refine")]
    return [each for each in (*first, *found.values(), *last) if each is not None]


def _annotation(hint: Any) -> str:
    """Say what a Python user may give for an option of this type."""
    if hint == tuple[str, ...]:
        return "Classes"
    if str in get_args(hint):
        return "Versus"
    if any(isinstance(each, type) and issubclass(each, Enum) for each in get_args(hint)):
        return "str | None"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"{hint.__name__} | str"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _docstring(method: type[Method]) -> str:
    summary, _, _ = inspect.cleandoc(method.__doc__ or "").partition("\n\nAttributes:")
    options = "\n".join(
        f"        {each.name}: {each.metadata['option'].doc}" for each in _ordered(method)
    )
    about_class = issubclass(method, ClassMethod)
    shared = _SHARED.format(
        options=options,
        target=_TARGET if about_class else "",
        and_class=" and class, image by image" if about_class else "",
    )
    return f"{summary}\n\n    Args:\n{shared}"


rollout = _function(METHODS["rollout"], "rollout")
grad_rollout = _function(METHODS["grad-rollout"], "grad_rollout")
relevance = _function(METHODS["relevance"], "relevance")
evidence = _function(METHODS["evidence"], "evidence")
attention = _function(METHODS["attention"], "attention")


@functools.partial(in_python_words, class_parameter="target")
def evaluate(
    model: Model,
    images: Images,
    *,
    methods: Iterable[str] = (),
    masks: str | os.PathLike[str] | Sequence[Any] | None = None,
    target: int | str = "top1",
    versus: Versus = None,
    truth: Sequence[int] | None = None,
    convention: Convention | str = Convention.VITVIZ,
    fit: Fit | str = Fit.SQUASH,
    value_range: Values = None,
    batch_size: int | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Evaluation:
    """Measure methods side by side, always with a random map and a centred one.

    Args:
        model: From ``load_model``; it is left as it was.
        images: As for ``rollout``.
        methods: Names like ``evidence``, or ``evidence@2``, twice as fine; none: all that suit.
        masks: A folder with PNGs of the images' names, or one mask an image: an array (height,
            width) of integers, 0 for the background, a path, or None.
        target: Class explained: an index, a label, ``top1``, ``truth`` or ``mask`` (values - 1).
        versus: Class that it is compared with: an index, a label, or ``topK``.
        truth: The true class of each image.
        convention: ``vitviz``, ``chefer2021`` or ``srg``; see ``perturbation.PERTURBATIONS``.
        fit: As for ``rollout``.
        value_range: As for ``rollout``.
        batch_size: As for ``rollout``.
        seed: Of the random map and of the bootstrap.
        resamples: Bootstrap samples behind the intervals.

    Returns:
        The methods side by side; images that failed are named in its ``failed``.

    Raises:
        VitvizError: An option is not usable.
    """
    options = evaluation_options(
        *(methods, target, versus, Convention(convention)),
        *(Fit(fit), ValueRange.ensure(value_range), batch_size_of(batch_size)),
        *(seed, resamples),
    )
    subjects = subjects_of(model, images, masks, truth)
    return summarize(model, options, list(measure(model, subjects, options, warn=warn)))
