"""Methods and options under test, and the map that each must give by the package and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

import oracles
from oracles import Array
from tiny import TinyCase
from vitviz.engine import explain_batch
from vitviz.models import Model, load_model
from vitviz.options import HeadFusion, Method, MethodOptions

TOLERANCE = 1e-4  # of a map's range, the contract's


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method with its options.

    Attributes:
        fusion: Head fusion of a rollout; "gradient" for grad-rollout.
        discard: Share of the lowest entries set to 0.
        start_layer: Blocks before this one are left out.
    """

    fusion: str
    discard: float
    start_layer: int = 0

    @property
    def is_gradient(self) -> bool:
        return self.fusion == "gradient"

    def options(self, classes: tuple[str, ...] = ("top1",)) -> MethodOptions:
        """Say the same to the package."""
        return MethodOptions(
            method=Method.GRAD_ROLLOUT if self.is_gradient else Method.ROLLOUT,
            discard=self.discard,
            start_layer=self.start_layer,
            head_fusion=HeadFusion.MAX if self.is_gradient else HeadFusion(self.fusion),
            classes=classes,
        )

    def __str__(self) -> str:
        start = f"-from-{self.start_layer}" if self.start_layer else ""
        return f"{self.fusion}-{self.discard:g}{start}"


ROLLOUTS = tuple(
    Setting(fusion=fusion, discard=discard)
    for fusion in ("mean", "max", "min")
    for discard in (0, 0.9)
)
GRADIENTS = (Setting(fusion="gradient", discard=0), Setting(fusion="gradient", discard=0.9))
STARTED = (
    Setting(fusion="max", discard=0.9, start_layer=1),
    Setting(fusion="gradient", discard=0.9, start_layer=1),
)
SETTINGS = ROLLOUTS + GRADIENTS + STARTED

Mistake = Callable[[list[Array], list[Array] | None], tuple[list[Array], list[Array] | None]]


def requested(case: TinyCase) -> tuple[str, ...]:
    """Return the classes that grad-rollout is asked for: two by number, and the best one."""
    return (*map(str, case.classes), "top1")


@cache
def loaded(case: TinyCase) -> Model:
    """Load a tiny model with the package."""
    return load_model(case.build(), device="cpu")


@cache
def traced(case: TinyCase) -> oracles.Trace:
    """Read attention from a tiny model by hand; a model of its own, never seen by the package."""
    return oracles.trace(case.build(), case.images(), blocks=case.blocks)


@cache
def class_gradients(case: TinyCase) -> list[list[Array]]:
    """Return gradients by hand: for each requested class, for each block."""
    trace = traced(case)
    count = len(trace.logits)
    classes = [[index] * count for index in case.classes] + [trace.top_class()]
    return [trace.gradients(class_of_image) for class_of_image in classes]


@cache
def found(case: TinyCase, setting: Setting) -> Array:
    """Compute relevance (batch, maps, rows, cols) by the package."""
    options = setting.options(requested(case))
    return np.asarray(explain_batch(loaded(case), case.images(), options).relevance, np.float64)


def by_hand(
    case: TinyCase,
    setting: Setting,
    *,
    mistake: Mistake | None = None,
    steps: oracles.Steps | None = None,
    readout: Array | None = None,
    shift: int = 0,
    discarded_images: int | None = None,
    gradient_sets: list[list[Array]] | None = None,
) -> Array:
    """Compute relevance (batch, maps, rows, cols) from the formulas.

    Args:
        case: The tiny model.
        setting: The method.
        mistake: Changes one image's attention and gradients before the formulas see them.
        steps: Mistaken formulas.
        readout: Mistaken w.
        shift: How many places too late the patch tokens are taken; round the end, if need be.
        discarded_images: In how many images of the batch anything is discarded.
        gradient_sets: Mistaken gradients: for each requested class, for each block.
    """
    trace = traced(case)
    sets: list[list[Array]] | list[None] = [None]
    if setting.is_gradient:
        sets = gradient_sets or class_gradients(case)
    images = []
    for image in range(len(trace.logits)):
        maps = []
        for blocks in sets:
            attention = [block[image] for block in trace.attention]
            gradients = None if blocks is None else [block[image] for block in blocks]
            if mistake:
                attention, gradients = mistake(attention, gradients)
            spared = discarded_images is not None and image >= discarded_images
            tokens = oracles.token_relevance(
                attention,
                gradients,
                readout=case.readout(case.tokens) if readout is None else readout,
                fusion=setting.fusion,
                discard=0 if spared else setting.discard,
                start_layer=setting.start_layer,
                steps=steps,
            )
            maps.append(oracles.on_grid(np.roll(tokens, -shift), case.prefix_tokens, case.grid))
        images.append(np.stack(maps))
    return np.stack(images)


def distance(maps: Array, reference: Array) -> Array:
    """Return the largest difference (batch, maps) as a share of each reference map's range."""
    assert maps.shape == reference.shape, f"{maps.shape} is not {reference.shape}"
    span = reference.max(axis=(2, 3)) - reference.min(axis=(2, 3))
    return np.abs(maps - reference).max(axis=(2, 3)) / span
