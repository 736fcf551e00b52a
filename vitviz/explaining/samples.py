"""Samples → explanations or failures: in order, in bounded memory, and without files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitviz.errors import ImageError, ModelError, OptionError, VitvizError, reason
from vitviz.explaining.batch import BatchMaps, class_requests, explain_batch
from vitviz.explaining.explanation import Diagnostics, Explanation, Prediction
from vitviz.explaining.parallel import batch_size_for
from vitviz.explaining.passes import shared_passes
from vitviz.images.fitting import InputTransform
from vitviz.images.samples import ImageSample
from vitviz.images.sources import Source
from vitviz.methods.method import Method
from vitviz.models.labels import ClassRequest
from vitviz.models.model import Model
from vitviz.options import Fit, PictureOptions, ValueRange, whole
from vitviz.pictures.heat import contrast, share_on
from vitviz.streaming import AdaptiveBatches, in_batches

__all__ = [
    "Explained",
    "Explainer",
    "Failed",
    "batch_size_of",
    "explain_samples",
    "images_at_once",
    "input_transform",
    "to_tensor",
]

_Passed = TypeVar("_Passed")

_NOTHING = object()  # where one of two lists has ended
_TOP = 5  # predictions that are kept of each image


@dataclass(frozen=True, kw_only=True, eq=False)
class Explained:
    """An image with all its maps.

    Attributes:
        sample: The image.
        maps: One for each class asked for; one for a method that explains no class. Of several
            methods side by side, those of each together, in the order of their forward passes.
    """

    sample: ImageSample
    maps: tuple[Explanation, ...]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """An image that cannot be explained.

    Attributes:
        source: The image.
        error: Why, in one line.
    """

    source: Source
    error: str

    @classmethod
    def because(cls, source: Source, error: VitvizError | MemoryError) -> Failed:
        """Put into words why an image failed."""
        return cls(source=source, error=reason(error))


def explain_samples(
    model: Model,
    samples: Iterable[ImageSample | _Passed],
    method: Method,
    *,
    class_indices: Iterable[int] | None = None,
    target: Callable[[Tensor], Tensor] | None = None,
    pictures: PictureOptions | None = None,
    batch_size: int | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Iterator[Explained | Failed | _Passed]:
    """Explain samples as they come.

    Samples of one shape share batches; no more than a few batches are held at once. Where memory
    is short, batches become smaller.

    Args:
        model: The model; it is left as it was.
        samples: From ``images.samples``; anything else among them (an image that failed to load,
            say) is passed on in its place.
        method: The method, with its options.
        class_indices: The class to explain of each sample, in place of those that the method
            names; of no account to a method that explains no class.
        target: A function of logits (batch, classes) to scores (batch), explained in place of a
            class; likewise.
        pictures: How the maps draw themselves; None: as by default.
        batch_size: Images run at once; None: chosen by the number of tokens.
        warn: Is told what the user should know while the work goes on.

    Yields:
        What became of each sample, in their order.

    Raises:
        VitvizError: The method does not fit the model.
    """
    # Checks all before a sample is asked for.
    explainer = Explainer(model, method, pictures, target=target)
    size = batch_size_of(batch_size) or images_at_once(model)
    batches = AdaptiveBatches(size, warn, copies=method.refine**2)

    def explain(tasks: list[_Task]) -> list[Explained | Failed]:
        given = [each.class_index for each in tasks if each.class_index is not None]
        samples = [each.sample for each in tasks]
        return explainer.explain(samples, given or None, at_once=batches.size)

    tasks: Iterable[_Task | _Passed] = (
        _Task(item, class_index) if isinstance(item, ImageSample) else item
        for item, class_index in _beside(model, samples, class_indices)
    )
    return in_batches(tasks, _shape, size, partial(batches.work, function=explain, fail=_too_large))


def images_at_once(model: Model) -> int:
    """Return how many images are run at once where nobody says it."""
    return batch_size_for(model.layout.tokens, model.device)


def input_transform(model: Model, fit: Fit, values: ValueRange | None = None) -> InputTransform:
    """Return how images are brought to what a model takes.

    Raises:
        ModelError: ``native`` is asked of a model that was built for one size.
    """
    expected = model.preprocessing
    if fit is Fit.NATIVE and not expected.dynamic:
        raise ModelError(
            f"{model.name} was built for images of {expected.size[0]}×{expected.size[1]} alone; "
            "load it with fit='native' to keep their aspect ratio, or use squash or crop"
        )
    return InputTransform(
        fit=fit,
        size=expected.size,
        patch=expected.patch,
        resample=Image.Resampling[expected.interpolation.upper()],
        crop_pct=expected.crop_pct,
        values=values,
    )


def to_tensor(model: Model, samples: Iterable[ImageSample]) -> Tensor:
    """Stack and normalise pixels: (batch, 3, height, width) on the model's device."""
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
    images = pixels.to(model.device).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in (model.preprocessing.mean, model.preprocessing.std)
    )
    return images.sub_(mean).div_(std).to(model.dtype)


@dataclass(frozen=True)
class _Task:
    """A sample, and the class to explain of it where the method does not say."""

    sample: ImageSample
    class_index: int | None


def batch_size_of(given: object) -> int | None:
    """Read a number of images; None leaves it open.

    Raises:
        OptionError: It is no number from 1 up.
    """
    if given is None:
        return None
    if (count := whole("batch_size", given)) < 1:
        raise OptionError(f"batch_size is {count}; give a number from 1 up, or None")
    return count


def _beside(
    model: Model, samples: Iterable[_Passed], class_indices: Iterable[int] | None
) -> Iterator[tuple[_Passed, int | None]]:
    """Put each sample's class beside it; raises ``OptionError``."""
    if class_indices is None:
        yield from ((sample, None) for sample in samples)
        return
    pairs = zip_longest(samples, class_indices, fillvalue=_NOTHING)
    for number, (sample, given) in enumerate(pairs):
        if sample is _NOTHING or given is _NOTHING:
            raise OptionError(f"samples or class_indices end after {number}; give as many of both")
        class_index = whole("class_indices", given)
        if model.num_classes and not 0 <= class_index < model.num_classes:
            last = model.num_classes - 1
            raise OptionError(f"class_indices has {class_index}; give indices from 0 to {last}")
        yield cast("_Passed", sample), class_index


def _too_large(task: _Task, error: MemoryError) -> Explained | Failed:
    return Failed.because(task.sample.source, error)


def _shape(item: object) -> tuple[int, ...] | None:
    """Return what samples of one batch have in common; None for what is not to be run."""
    return item.sample.pixels.shape if isinstance(item, _Task) else None


class Explainer:
    """Explains batches of samples with a method, whose classes are resolved once."""

    def __init__(
        self,
        model: Model,
        method: Method,
        pictures: PictureOptions | None = None,
        *,
        target: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Check that the method fits the model, and resolve the classes that it asks for.

        Args:
            model: The model; it is left as it was.
            method: The method, with its options.
            pictures: How the maps draw themselves; None: as by default.
            target: As for ``explain_samples``.

        Raises:
            VitvizError: The method does not fit the model.
        """
        self._model = model
        requests = [class_requests(model, each, target) for each in method.members]
        self._requests = next(filter(None, requests), ())  # all that explain a class ask the same
        self._passes = shared_passes(model, method.members)
        self._pictures = pictures or PictureOptions()

    def explain(
        self,
        samples: Sequence[ImageSample],
        class_indices: Sequence[int] | None = None,
        versus_indices: Sequence[int] | None = None,
        *,
        at_once: int,
    ) -> list[Explained | Failed]:
        """Explain samples of one shape in one batch.

        Args:
            samples: The samples.
            class_indices: As for ``explain_samples``.
            versus_indices: The class that each of these is compared with.
            at_once: How many images may be run together, where refinement makes more of them.

        Raises:
            MemoryError: The device has too little memory for this batch.
        """
        try:
            images = to_tensor(self._model, samples)
            found: list[tuple[Method, BatchMaps]] = []
            for leader, *others in self._passes:
                maps = explain_batch(
                    *(self._model, images, leader),
                    requests=self._requests,
                    class_indices=_given(leader, class_indices, versus_indices),
                    at_once=at_once,
                    beside=others,
                )
                found += zip((leader, *others), (maps, *maps.beside), strict=True)
        except OptionError as error:  # other shapes may have the patch that is asked for
            return [Failed.because(sample.source, error) for sample in samples]
        given = [None] * len(samples) if class_indices is None else class_indices
        return [
            self._picked(sample, class_index, found, row)
            for row, (sample, class_index) in enumerate(zip(samples, given, strict=True))
        ]

    def _picked(
        self,
        sample: ImageSample,
        given: int | None,
        found: Sequence[tuple[Method, BatchMaps]],
        row: int,
    ) -> Explained | Failed:
        """Pick one image's maps out of what each method made of a batch."""
        logits = found[0][1].logits[row : row + 1].flatten()
        if not all(each.relevance[row].isfinite().all() for _, each in found) or not (
            logits.isfinite().all()
        ):
            return Failed.because(sample.source, _not_finite(self._model, logits))
        scores = logits.sigmoid() if self._model.multi_label else logits.softmax(dim=0)
        predictions = tuple(
            Prediction(
                class_index=index,
                class_label=self._model.labels[index],
                score=float(scores[index]),
            )
            for index in logits.argsort(descending=True, stable=True)[:_TOP].tolist()
        )
        maps = (
            Explanation(
                method=method,
                relevance=values.numpy(),
                sample=sample,
                model=self._model.name,
                predictions=predictions,
                pictures=self._pictures,
                diagnostics=_diagnostics(batch, row, position, values.numpy()),
                outliers=batch.outlier_tokens[row].numpy(),
                **_of_class(self._model, given, batch, row, position, scores),
            )
            for method, batch in found
            for position, values in enumerate(batch.relevance[row])
        )
        return Explained(sample=sample, maps=tuple(maps))


def _given(method: Method, *classes: Sequence[int] | None) -> Tensor | None:
    """Put the classes of samples, and what they are compared with, as batches take them."""
    known = [torch.tensor(each) for each in classes if each is not None]
    return torch.stack(known, dim=1).unsqueeze(1) if known and method.explains_class else None


def _not_finite(model: Model, logits: Tensor) -> ImageError:
    cause = (
        "the pooling attention sums to 0: no token supports this class"
        if model.layout.tail and logits.isfinite().all()
        else "attention or gradients overflow, or a token is masked from all others"
    )
    if model.dtype is torch.float16:
        cause += "; fp16 ends at 65504, --precision bf16 or fp32 do not"
    return ImageError(f"gives numbers that are not finite: {cause}")


def _diagnostics(
    batch: BatchMaps, row: int, position: int, relevance: NDArray[np.float32]
) -> Diagnostics:
    products = batch.gradient_norm_product
    return Diagnostics(
        prefix_attention=float(batch.prefix_attention[row]),
        outlier_tokens=int(batch.outlier_tokens[row].sum()),
        outlier_share=share_on(relevance, batch.outlier_tokens[row].numpy()),
        contrast=contrast(relevance),
        gradient_norm_product=None if products is None else float(products[row, position]),
    )


def _of_class(
    model: Model, given: int | None, batch: BatchMaps, row: int, position: int, scores: Tensor
) -> dict[str, Any]:
    """Say what a map is about; nothing where it is about no class."""
    if batch.targets is None or batch.scores is None:
        return {}
    if batch.requests[0].score is not None:
        score = float(batch.scores[row, position])
        return {"request": batch.requests[position].key, "class_score": score}
    versus = batch.requests[0].versus
    asked = (
        batch.requests[position]
        if given is None
        else ClassRequest(class_index=given, versus=versus)
    )
    found: dict[str, Any] = {"request": asked.key}
    for word, index in zip(
        ("class", "versus"), batch.targets[row, position].tolist(), strict=False
    ):
        found[f"{word}_index"] = index
        found[f"{word}_label"] = model.labels[index]
        found[f"{word}_score"] = float(scores[index])
    return found
