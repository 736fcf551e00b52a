"""What a run needs before its first picture of features: the colours, or what to compare with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from vitviz.errors import ImageError
from vitviz.explaining.coloring import features_at, fit_colors, patches_in, reference_at
from vitviz.explaining.samples import (
    Explained,
    Failed,
    explain_samples,
    images_at_once,
    input_transform,
)
from vitviz.images.decoding import read_file
from vitviz.images.fitting import InputTransform
from vitviz.images.samples import ImageSample, load_sample
from vitviz.images.sources import Source
from vitviz.methods.features import Features, Similarity
from vitviz.models.model import Model
from vitviz.pictures.components import ColorSpace, spread
from vitviz.runs.job import Job
from vitviz.runs.pipeline import Item
from vitviz.streaming import map_ahead, worker_threads

__all__ = ["Coloring", "compared"]


@dataclass(frozen=True)
class Coloring:
    """Gives the features of all images of a run colours that are fitted on some of them.

    They are fitted when the first image needs them: not at all where all files are there.

    Attributes:
        chosen: The images that they are fitted on.
        method: How features are computed.
        given: What to do with them.
    """

    chosen: Sequence[Source]
    method: Features
    given: Job
    _fitted: list[ColorSpace] = field(default_factory=list)  # once a process, by whichever part

    @classmethod
    def of(cls, sources: Sequence[Source], method: Features, given: Job) -> Coloring:
        """Choose images of a run."""
        return cls([sources[each] for each in spread(len(sources))], method, given)

    @cached_property
    def job(self) -> Job:
        """What to do, with the digest of what colours are fitted on: it decides the pictures."""
        digest = hashlib.sha256()
        for source in self.chosen:
            try:
                digest.update(read_file(source).digest.encode())
            except (ImageError, MemoryError):  # it fails in its turn
                digest.update(b"unreadable")
        return replace(self.given, method=replace(self.method, fitted_on=digest.hexdigest()))

    def finish(self, model: Model, items: Iterable[Item]) -> Iterator[Item]:
        """Give each image that is explained its colours."""
        for item in items:
            if isinstance(item, Explained):
                if not self._fitted:
                    self._fitted.append(self._fit(model, item))
                maps = tuple(replace(each, colors=self._fitted[0]) for each in item.maps)
                item = replace(item, maps=maps)
            yield item

    def _fit(self, model: Model, first: Explained) -> ColorSpace:
        """Fit colours; on the first image that can be read where none of those chosen can be."""
        explained = _explained(model, self.chosen, self.method, self.given)
        patches = patches_in(explained, len(self.chosen)) or patches_in([first], 1)
        return fit_colors(self.method, patches)


def compared(model: Model, source: Source, method: Similarity, job: Job) -> Job:
    """Return what to do, with the features of the patch that all others are compared with.

    Args:
        model: The model.
        source: The image that it is a patch of.
        method: The similarity.
        job: What to do.

    Raises:
        ImageError: It cannot be read or explained.
        OptionError: It has no such patch, or the model has no such block.
    """
    (item,) = _explained(model, [source], features_at(method), job)
    if isinstance(item, Failed):
        raise ImageError(f"{item.source.name}: {item.error}")
    return replace(job, method=reference_at(method, item.maps[0]))


def _explained(
    model: Model, sources: Sequence[Source], method: Features, job: Job
) -> Iterator[Explained | Failed]:
    """Explain images for what a run needs before its pictures."""
    transform = input_transform(model, job.fit, job.value_range)
    depth = job.batch_size or images_at_once(model)
    with worker_threads(job.workers) as pool:
        samples = map_ahead(pool, partial(_load, transform), sources, depth)
        yield from explain_samples(
            model, samples, method, batch_size=job.batch_size, warn=lambda text: None
        )


def _load(transform: InputTransform, source: Source) -> ImageSample | Failed:
    try:
        return load_sample(read_file(source), transform, max_size=1)
    except (ImageError, MemoryError) as error:
        return Failed.because(source, error)
