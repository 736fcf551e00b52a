"""Methods and options under test, and the map that each must give by the package and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np

import linear_oracles
import oracles
from fixtures_methods import make_method
from linear_oracles import ImageTrace, LinearSteps, LinearTrace, Rules
from oracles import Array
from tiny import TinyCase
from vitviz.explaining.batch import explain_batch
from vitviz.methods.method import Method
from vitviz.models.model import Model, load_model
from vitviz.options import AttentionRule, HeadFusion, ResidualRule

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

    @property
    def is_shared(self) -> bool:
        return False

    def options(self, classes: tuple[str, ...] = ("top1",)) -> Method:
        """Say the same to the package."""
        return make_method(
            "grad-rollout" if self.is_gradient else "rollout",
            discard=self.discard,
            start_layer=self.start_layer,
            head_fusion=HeadFusion.MAX if self.is_gradient else HeadFusion(self.fusion),
            classes=classes,
        )

    def __str__(self) -> str:
        start = f"-from-{self.start_layer}" if self.start_layer else ""
        return f"{self.fusion}-{self.discard:g}{start}"


@dataclass(frozen=True, kw_only=True)
class LinearSetting:
    """A method that carries relevance back through the network, with its options.

    Attributes:
        name: "relevance" or "classic" for the two forms of relevance, "value" or "shared" for the
            two rules of evidence.
        start_layer: Blocks before this one are left out; None: as many as the method says.
        residual: "plain" or "balanced", how evidence passes residual additions.
    """

    name: str
    start_layer: int | None = None
    residual: str = "plain"

    @property
    def is_gradient(self) -> bool:
        return True

    @property
    def is_evidence(self) -> bool:
        return self.name in ("value", "shared")

    @property
    def is_shared(self) -> bool:
        return self.name == "shared"

    @property
    def rules(self) -> Rules:
        """Say the same to the reference."""
        right = linear_oracles.SHARED if self.is_shared else linear_oracles.VALUE
        if self.residual == "balanced":
            return replace(right, residual=linear_oracles.balanced)
        return right

    def options(self, classes: tuple[str, ...] = ("top1",), refine: int = 1) -> Method:
        """Say the same to the package."""
        return make_method(
            "evidence" if self.is_evidence else "relevance",
            classic=self.name == "classic",
            rule=AttentionRule(self.name) if self.is_evidence else AttentionRule.VALUE,
            residual=ResidualRule(self.residual),
            start_layer=self.start_layer,
            classes=classes,
            refine=refine,
        )

    def __str__(self) -> str:
        start = "" if self.start_layer is None else f"-from-{self.start_layer}"
        residual = "-balanced" if self.residual == "balanced" else ""
        return ("evidence-" if self.is_evidence else "") + self.name + residual + start


AnySetting = Setting | LinearSetting

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
RELEVANCE, CLASSIC, EVIDENCE, SHARED_EVIDENCE = UNBALANCED = tuple(
    LinearSetting(name=name) for name in ("relevance", "classic", "value", "shared")
)
BALANCED = (BALANCED_EVIDENCE, BALANCED_SHARED) = (
    replace(EVIDENCE, residual="balanced"),
    replace(SHARED_EVIDENCE, residual="balanced"),
)
LINEAR = UNBALANCED + BALANCED
LINEAR_STARTED = (
    LinearSetting(name="relevance", start_layer=0),
    LinearSetting(name="relevance", start_layer=1),
    LinearSetting(name="classic", start_layer=1),
)

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


@lru_cache(maxsize=1)  # with its graph, the largest of all, and of each mistake there is one
def linear_traced(case: TinyCase, rules: Rules) -> LinearTrace:
    """Run a tiny model linearised by hand; a model of its own, never seen by the package."""
    return linear_oracles.linear_trace(case.build(), case.images(), rules)


@lru_cache(maxsize=256)  # what the right rules ask of all cases, and some of the mistakes
def linear_about(
    case: TinyCase, rules: Rules, class_of_image: tuple[int, ...], versus: tuple[int, ...] | None
) -> list[ImageTrace]:
    """Return what the formulas ask of one class of each image, by hand."""
    return linear_traced(case, rules).about(class_of_image, versus)


@cache
def found(case: TinyCase, setting: AnySetting) -> Array:
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


def linear_by_hand(
    case: TinyCase,
    setting: LinearSetting,
    *,
    rules: Rules | None = None,
    steps: LinearSteps = linear_oracles.STEPS,
    readout: Array | None = None,
    classes: tuple[int, ...] | None = None,
    versus: int | None = None,
) -> Array:
    """Compute relevance or evidence (batch, maps, rows, cols) from the formulas.

    Args:
        case: The tiny model.
        setting: The method.
        rules: Mistaken rules for what is a constant on the way back.
        steps: Mistaken formulas.
        readout: Mistaken w of the classic form.
        classes: Mistaken classes, in place of the two that are asked for by number.
        versus: The class that all of these are compared with.
    """
    trace = traced(case)
    count = len(trace.logits)
    of_maps = [[index] * count for index in classes or case.classes] + [trace.top_class()]
    others = None if versus is None else [versus] * count
    maps = [_linear_tokens(case, setting, each, others, rules, steps, readout) for each in of_maps]
    return np.stack(
        [
            np.stack([oracles.on_grid(each[image], case.prefix_tokens, case.grid) for each in maps])
            for image in range(count)
        ]
    )


def reference(case: TinyCase, setting: AnySetting) -> Array:
    """Compute maps (batch, maps, rows, cols) from the formulas, whatever the method."""
    if isinstance(setting, LinearSetting):
        return linear_by_hand(case, setting)
    return by_hand(case, setting)


def _linear_tokens(
    case: TinyCase,
    setting: LinearSetting,
    class_of_image: list[int],
    versus: list[int] | None,
    rules: Rules | None,
    steps: LinearSteps,
    readout: Array | None,
) -> list[Array]:
    """Compute one map of each image (tokens)."""
    if setting.name == "classic":
        gradients = traced(case).gradients(class_of_image, versus)
        return [
            linear_oracles.classic_relevance(
                [block[image] for block in traced(case).attention],
                [block[image] for block in gradients],
                readout=case.readout(case.tokens) if readout is None else readout,
                first_block=setting.start_layer or 0,
                steps=steps,
            )
            for image in range(len(class_of_image))
        ]
    others = None if versus is None else tuple(versus)
    images = linear_about(case, rules or setting.rules, tuple(class_of_image), others)
    if setting.is_evidence:
        return [linear_oracles.token_evidence(image, steps=steps) for image in images]
    return [
        linear_oracles.token_relevance(image, first_block=setting.start_layer, steps=steps)
        for image in images
    ]


def distance(maps: Array, reference: Array) -> Array:
    """Return the largest difference (batch, maps) as a share of each reference map's range.

    From a map of nothing, which has no range, it is the difference itself.
    """
    assert maps.shape == reference.shape, f"{maps.shape} is not {reference.shape}"
    span = reference.max(axis=(2, 3)) - reference.min(axis=(2, 3))
    span[~reference.any(axis=(2, 3))] = 1
    return np.abs(maps - reference).max(axis=(2, 3)) / span
