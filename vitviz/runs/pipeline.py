"""Sources → results: the one place where the rooms meet; streams, and never prints.

Three stages pull on each other: threads read and decode, the calling thread runs the model in
full batches, threads draw and write. Each holds only a bounded number of images.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitviz.errors import ImageError, ModelError, OptionError, OutputError
from vitviz.explaining.batch import BatchMaps, class_requests, expect_query, explain_batch
from vitviz.explaining.explanation import Caveat, Diagnostics, Explanation, Prediction
from vitviz.explaining.parallel import batch_size_for
from vitviz.images.decoding import read_file
from vitviz.images.fitting import InputTransform
from vitviz.images.samples import ImageSample, load_sample, sample_of
from vitviz.images.sources import Source
from vitviz.models.model import Model
from vitviz.options import Fit, Job, MethodOptions, PictureOptions
from vitviz.pictures.heat import contrast
from vitviz.runs.files import sweep
from vitviz.runs.records import Ledger, Result, failure
from vitviz.streaming import AdaptiveBatches, in_batches, map_ahead, stop_with, worker_threads

__all__ = ["explain", "input_transform", "require_inputs", "run", "to_tensor"]


_TOP = 5


def run(
    model: Model,
    sources: Sequence[Source],
    job: Job,
    *,
    warn: Callable[[str], None] = warnings.warn,
) -> Generator[Result, None, None]:
    """Explain images and write their maps, yielding one result an image in the order given.

    Results of what is being written when an error is thrown in are yielded before it is raised.

    Args:
        model: The model; it is left as it was.
        sources: The images.
        job: What to do with them.
        warn: Is told what the user should know while the work goes on.

    Raises:
        VitvizError: The options do not fit the model, or the model cannot be explained; an image
            that fails is a result, not an error.
        SourceError: An output would overwrite a source.
        OutputError: Nothing can be written any more, as on a full disk: of ten thousand images all
            would fail alike, each after the model has run for it.
    """
    requests = tuple(request.key for request in class_requests(model, job.method)) or (None,)
    ledger = Ledger(model=model, job=job, requests=requests)
    frame = _frame(model, job)
    ledger.refuse_overwriting(sources)
    sweep({job.output, *(path.parent for each in sources for path, _, _ in ledger.files(each))})
    with worker_threads(job.workers) as pool:
        depth = _ahead(job, model)
        prepared = map_ahead(pool, partial(_prepare, ledger, frame), sources, depth)
        explained = _explained(model, prepared, job, warn)
        written = map_ahead(pool, partial(_write, ledger), explained, depth, drain=True)
        yield from _up_to_obstacle(written)


def explain(
    model: Model,
    images: Iterable[str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]],
    method: MethodOptions,
    *,
    pictures: PictureOptions | None = None,
    fit: Fit = Fit.SQUASH,
    batch_size: int | None = None,
) -> list[Explanation]:
    """Explain images and return their maps, image by image, class by class.

    Args:
        model: The model; it is left as it was.
        images: Paths, Pillow images or arrays (height, width, 3) of uint8.
        method: How maps are computed.
        pictures: How they draw themselves; None: as by default.
        fit: How images are brought to the model's size.
        batch_size: Images run at once; None: chosen by the number of tokens.

    Raises:
        ImageError: An image cannot be read or explained.
        VitvizError: The options do not fit the model.
    """
    require_inputs(model, images)
    pictures = pictures or PictureOptions()
    job = Job(method=method, pictures=pictures, fit=fit, batch_size=batch_size)
    class_requests(model, method)
    frame = _frame(model, job)

    def load(numbered: tuple[int, Any]) -> ImageSample | Result:
        number, image = numbered
        if isinstance(image, (str, os.PathLike)):
            source = Source(path=Path(image), key=Path(image).name)
            try:
                return load_sample(read_file(source), frame, pictures.max_size)
            except (ImageError, MemoryError) as error:
                return failure(source, error)
        return sample_of(image, f"image {number}", frame, pictures.max_size)

    explanations: list[Explanation] = []
    with worker_threads(None) as pool:
        samples = map_ahead(pool, load, enumerate(images), _ahead(job, model))
        for item in _explained(model, samples, job, warnings.warn):
            if isinstance(item, Result):
                raise ImageError(f"{item.source.path} {item.error}")
            explanations += item.maps
    return explanations


def require_inputs(model: object, images: object) -> None:
    """Make sure that this is a model, and that these are images, and not one.

    Raises:
        OptionError: It is not, or it is one.
    """
    if not isinstance(model, Model):
        raise OptionError(
            f"expected a model from vitviz.load_model, and got {type(model).__name__}"
        )
    if isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) in (2, 3):
        raise OptionError("expected a list of images, and got one; write [image]")


def input_transform(model: Model, fit: Fit) -> InputTransform:
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
    )


def _frame(model: Model, job: Job) -> InputTransform:
    """Return how images are brought to the model, once it is sure that the job fits that."""
    if job.method.query and job.fit is not Fit.NATIVE:  # there, grids differ
        expect_query(job.method.query, model.layout.grid)
    return input_transform(model, job.fit)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Explained:
    """An image with all its maps."""

    sample: ImageSample
    maps: list[Explanation]


def _prepare(ledger: Ledger, frame: InputTransform, source: Source) -> ImageSample | Result:
    """Load an image, or find that it needs no work."""
    try:
        file = read_file(source)
        if ledger.job.skip_existing and (result := ledger.skipped(file)):
            return result
        return load_sample(file, frame, ledger.job.pictures.max_size)
    except (ImageError, MemoryError) as error:
        return failure(source, error)


def _write(ledger: Ledger, item: _Explained | Result) -> Result:
    """Write the files of an image that is explained."""
    return item if isinstance(item, Result) else ledger.write(item.sample, item.maps)


def _up_to_obstacle(
    results: Generator[Result, None, None],
) -> Generator[Result, None, None]:
    """Pass results on until one meets what the others would meet too; it alone tells of that."""
    for result in results:
        stop: BaseException | None = OutputError(result.obstacle) if result.obstacle else None
        try:
            yield result
        except (KeyboardInterrupt, SystemExit) as interruption:
            stop = interruption
        if stop:
            rest = stop_with(results, stop)
            yield from (each for each in rest if each.outputs or not each.obstacle)


def _explained(
    model: Model,
    items: Iterable[ImageSample | Result],
    job: Job,
    warn: Callable[[str], None],
) -> Iterator[_Explained | Result]:
    """Run the model over the samples in batches; pass the rest through; keep the order."""
    size = _batch_size(job, model)
    runner = _Runner(model, job, size, warn)
    yield from in_batches(items, _shape, size, runner.explain)
    runner.tell_caveats()


def _shape(item: object) -> tuple[int, ...] | None:
    """Return what images of one batch have in common; None for what is not to be run."""
    return item.pixels.shape if isinstance(item, ImageSample) else None


class _Runner:
    """Runs samples of one shape through the model, as many at once as there is memory for."""

    def __init__(self, model: Model, job: Job, size: int, warn: Callable[[str], None]) -> None:
        self._model = model
        self._job = job
        self._portions = AdaptiveBatches(size, warn, copies=job.method.refine**2)
        self._warn = warn
        self._caveats: Counter[Caveat] = Counter()
        self._first: dict[Caveat, Path] = {}

    def explain(self, samples: list[ImageSample]) -> Iterator[_Explained | Result]:
        """Explain samples; only one that there is no memory for by itself fails."""
        return self._portions.work(
            samples, self._explain_at_once, lambda sample, error: failure(sample.source, error)
        )

    def tell_caveats(self) -> None:
        """Say once for each reason how many maps may mislead."""
        for caveat, count in self._caveats.items():
            (what, why), maps = caveat.value, "1 map" if count == 1 else f"{count} maps"
            self._warn(f"{what} in {maps}, the first of {self._first[caveat]}: {why}")

    def _explain_at_once(self, samples: list[ImageSample]) -> list[_Explained | Result]:
        images, method = to_tensor(self._model, samples), self._job.method
        try:
            maps = explain_batch(self._model, images, method, at_once=self._portions.size)
        except OptionError as error:  # other shapes may have the patch that is asked for
            return [failure(sample.source, error) for sample in samples]
        explained = [
            _explanations(self._model, sample, maps, row, self._job)
            for row, sample in enumerate(samples)
        ]
        for item in explained:
            if isinstance(item, _Explained):
                self._count_caveats(item)
        return explained

    def _count_caveats(self, item: _Explained) -> None:
        for explanation in item.maps:
            for caveat in explanation.sanity.caveats() if explanation.sanity else ():
                self._caveats[caveat] += 1
                self._first.setdefault(caveat, item.sample.source.path)


def to_tensor(model: Model, samples: list[ImageSample]) -> Tensor:
    """Stack and normalise pixels: (batch, 3, height, width) on the model's device."""
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
    images = pixels.to(model.device).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in (model.preprocessing.mean, model.preprocessing.std)
    )
    return images.sub_(mean).div_(std).to(model.dtype)


def _explanations(
    model: Model, sample: ImageSample, batch: BatchMaps, row: int, job: Job
) -> _Explained | Result:
    """Pick one image's maps out of a batch."""
    relevance, logits = batch.relevance[row], batch.logits[row : row + 1].flatten()
    if not (relevance.isfinite().all() and logits.isfinite().all()):
        cause = (
            "the pooling attention sums to 0: no token speaks for this class"
            if model.layout.tail and logits.isfinite().all()
            else "attention or gradients overflow, or a token is masked from all others"
        )
        if model.dtype is torch.float16:
            cause += "; fp16 ends at 65504, --precision bf16 or fp32 do not"
        return failure(sample.source, ImageError(f"gives numbers that are not finite: {cause}"))
    scores = logits.sigmoid() if model.multi_label else logits.softmax(dim=0)
    predictions = tuple(
        Prediction(class_index=index, class_label=model.labels[index], score=float(scores[index]))
        for index in logits.argsort(descending=True, stable=True)[:_TOP].tolist()
    )
    maps = []
    for position, values in enumerate(relevance):
        leverage = None if batch.leverage is None else float(batch.leverage[row, position])
        common = {
            "method": job.method.method,
            "sanity": Diagnostics(
                prefix_attention=float(batch.prefix_attention[row]),
                outlier_tokens=int(batch.outlier_tokens[row]),
                contrast=contrast(values.numpy()),
                leverage=leverage,
            ),
            "relevance": values.numpy(),
            "sample": sample,
            "predictions": predictions,
            "pictures": job.pictures,
        }
        if batch.class_indices is None:
            maps.append(Explanation(**common))
            continue
        class_index = int(batch.class_indices[row, position])
        maps.append(
            Explanation(
                **common,
                request=batch.requests[position].key,
                class_index=class_index,
                class_label=model.labels[class_index],
                class_score=float(scores[class_index]),
            )
        )
    return _Explained(sample=sample, maps=maps)


def _ahead(job: Job, model: Model) -> int:
    """How many images each stage may be ahead of the next: enough for the model to have a batch."""
    return 2 * _batch_size(job, model)


def _batch_size(job: Job, model: Model) -> int:
    return job.batch_size or batch_size_for(model.layout.tokens, model.device)
