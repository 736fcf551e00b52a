"""What a user may choose: enums and frozen dataclasses, checked once, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vitviz.errors import OptionError

__all__ = [
    "AttentionRule",
    "Colormap",
    "Convention",
    "EvaluationOptions",
    "Fit",
    "HeadFusion",
    "Job",
    "OutputKind",
    "Method",
    "MethodOptions",
    "PictureOptions",
    "Precision",
    "VARIANTS",
    "variant",
]


class _Word(str, Enum):
    """An enum whose members are the words that a user types."""

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise OptionError(f"{value!r} is none of {', '.join(cls)}")


class Method(_Word):
    """How attention becomes relevance."""

    ROLLOUT = "rollout"
    GRAD_ROLLOUT = "grad-rollout"
    RELEVANCE = "relevance"
    EVIDENCE = "evidence"
    ATTENTION = "attention"

    @property
    def explains_class(self) -> bool:
        """Whether its maps are about a class."""
        return self not in (Method.ROLLOUT, Method.ATTENTION)

    @property
    def is_signed(self) -> bool:
        """Whether its maps speak for (positive) and against (negative)."""
        return self is Method.EVIDENCE


class HeadFusion(_Word):
    """How the heads of one block become one map."""

    MEAN = "mean"
    MAX = "max"
    MIN = "min"


class AttentionRule(_Word):
    """How relevance passes attention on its way back in ``evidence``."""

    VALUE = "value"
    SHARED = "shared"


class Fit(_Word):
    """How an image of any shape is brought to what the model takes."""

    SQUASH = "squash"
    CROP = "crop"
    NATIVE = "native"


class Precision(_Word):
    """The numbers that a model computes with; relevance is float32 in any case."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Convention(_Word):
    """How faithfulness is measured: what is taken away, how much of it, and how it is summed up."""

    VITVIZ = "vitviz"
    CHEFER2021 = "chefer2021"


class OutputKind(_Word):
    """What is written for each map."""

    OVERLAY = "overlay"
    HEATMAP = "heatmap"
    PANEL = "panel"
    NPY = "npy"


class Colormap(_Word):
    """Colour tables: OpenCV's, and one for maps with a sign, blue over white to red."""

    REDBLUE = "redblue"
    TURBO = "turbo"
    JET = "jet"
    HOT = "hot"
    VIRIDIS = "viridis"
    PLASMA = "plasma"
    INFERNO = "inferno"
    MAGMA = "magma"
    CIVIDIS = "cividis"
    PARULA = "parula"
    BONE = "bone"


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """How maps are computed.

    Attributes:
        method: Which of the methods.
        discard: Share of the lowest fused attention set to 0, per image and block, in [0, 1);
            ``rollout`` and ``grad-rollout`` only.
        start_layer: Blocks before this one are left out; blocks count from 0. None: none are;
            ``relevance`` that is not classic then averages what it gives from each block. Not for
            ``evidence`` and ``attention``.
        head_fusion: Reduction over heads; ``rollout`` only.
        classes: Class requests as typed (an index, a label, ``top1``, ``top5``); for methods that
            explain a class.
        classic: Chefer, Gur & Wolf's relevance (ICCV 2021); ``relevance`` only.
        rule: How attention is passed; ``evidence`` only.
        query: (row, col) of the patch whose attention is shown; None: the tokens that the head
            reads; ``attention`` only.
        refine: How many times finer than patches maps are, along each side.
    """

    method: Method = Method.ROLLOUT
    discard: float = 0.9
    start_layer: int | None = None
    head_fusion: HeadFusion = HeadFusion.MAX
    classes: tuple[str, ...] = ("top1",)
    classic: bool = False
    rule: AttentionRule = AttentionRule.VALUE
    query: tuple[int, int] | None = None
    refine: int = 1

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: A value is outside its range.
        """
        if not 0 <= self.discard < 1:
            raise OptionError(
                f"--discard is {self.discard:g}, but it is the share of attention set to zero: "
                "give a number from 0 up to, not including, 1 (0.9, say)"
            )
        if self.start_layer is not None and self.start_layer < 0:
            raise OptionError(f"--start-layer is {self.start_layer}; blocks count from 0")
        if self.refine < 1:
            raise OptionError(
                f"--refine is {self.refine}; give how many times finer than patches a map is, "
                "from 1 up"
            )
        if self.query is not None and self.refine > 1:
            raise OptionError(
                "--query names a patch of the image where it is, and --refine moves the image "
                "under the patches; use one of them"
            )

    @property
    def first_block(self) -> int:
        """The first block that takes part; of evidence and raw attention, all do."""
        all_take_part = self.method in (Method.EVIDENCE, Method.ATTENTION)
        return 0 if all_take_part else self.start_layer or 0

    @property
    def averages_starts(self) -> bool:
        """Whether maps are averages over all blocks that relevance can start from."""
        is_averaged = self.method is Method.RELEVANCE and not self.classic
        return is_averaged and self.start_layer is None

    def to_record(self) -> dict[str, Any]:
        """Return the options that shape this method's maps, for records and provenance."""
        options: dict[str, Any] = {"refine": self.refine}
        if self.method is Method.ATTENTION:
            return {**options, "query": self.query}
        if self.method is Method.EVIDENCE:
            return {**options, "rule": self.rule.value}
        if self.method is Method.RELEVANCE:
            start = "every" if self.averages_starts else self.first_block
            return {**options, "classic": self.classic, "start_layer": start}
        options |= {"discard": self.discard, "start_layer": self.first_block}
        if self.method is Method.ROLLOUT:
            options["head_fusion"] = self.head_fusion.value
        return options


VARIANTS: Mapping[str, MethodOptions] = MappingProxyType(
    {
        "rollout": MethodOptions(method=Method.ROLLOUT),
        "grad-rollout": MethodOptions(method=Method.GRAD_ROLLOUT),
        "relevance": MethodOptions(method=Method.RELEVANCE),
        "relevance-classic": MethodOptions(method=Method.RELEVANCE, classic=True),
        "evidence": MethodOptions(method=Method.EVIDENCE),
        "evidence-shared": MethodOptions(method=Method.EVIDENCE, rule=AttentionRule.SHARED),
    }
)
"""The methods that ``evaluate`` sets side by side, by name."""


def variant(name: str) -> MethodOptions:
    """Return a method to evaluate: one of ``VARIANTS``, ``@2`` after it for maps twice as fine.

    Raises:
        OptionError: There is no such method.
    """
    word, at, finer = name.partition("@")
    if word not in VARIANTS or (at and not finer.isdecimal()):
        raise OptionError(
            f"--methods {name} is unknown; choose among {', '.join(VARIANTS)}, with @2 after one "
            "for maps twice as fine (the baselines are always there)"
        )
    return replace(VARIANTS[word], refine=int(finer) if at else 1)


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How maps become files.

    Attributes:
        kinds: What to write for each map.
        colormap: Table from relevance to colour; None: the one for the method.
        alpha: Weight of the heat in an overlay, in [0, 1].
        max_size: Longest side of the pictures, in pixels.
    """

    kinds: tuple[OutputKind, ...] = (OutputKind.OVERLAY,)
    colormap: Colormap | None = None
    alpha: float = 0.5
    max_size: int = 1024

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: A value is outside its range.
        """
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"--alpha is {self.alpha:g}; give the weight of the heat from 0 to 1")
        if self.max_size < 1:
            raise OptionError(f"--max-size is {self.max_size}; give a side of at least 1 pixel")

    def table(self, method: Method) -> Colormap:
        """Return the colour table for a method's maps."""
        return self.colormap or (Colormap.REDBLUE if method.is_signed else Colormap.TURBO)

    def to_record(self, kind: OutputKind, method: Method) -> dict[str, str | float]:
        """Return the options that shape a file of this kind, for records and provenance."""
        if kind is OutputKind.NPY:
            return {}
        options: dict[str, str | float] = {
            "colormap": self.table(method).value,
            "max_size": self.max_size,
        }
        if kind is not OutputKind.HEATMAP:
            options["alpha"] = self.alpha
        return options


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do with each image.

    Attributes:
        method: How maps are computed.
        pictures: How they become files.
        fit: How images are brought to the model's size.
        output: Folder to write to.
        skip_existing: Leave out images whose files are there, made by the same recipe.
        batch_size: Images run at once; None: chosen by the number of tokens.
        workers: Threads for decoding and for writing; None: as many as cores.
    """

    method: MethodOptions = MethodOptions()
    pictures: PictureOptions = PictureOptions()
    fit: Fit = Fit.SQUASH
    output: Path = Path("vitviz-out")
    skip_existing: bool = False
    batch_size: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: A value is outside its range.
        """
        _require_counts(self.batch_size, self.workers)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How methods are measured.

    Attributes:
        methods: Names that ``variant`` knows, without baselines; none: all that suit the model.
        target: The class that maps explain: ``top1``, an index, a label, ``mask`` for each class
            that the image's mask names, or ``truth`` for the image's true class.
        convention: How faithfulness is measured.
        fit: How images are brought to the model's size.
        batch_size: Images run at once; None: chosen by the number of tokens.
        workers: Threads for decoding and for locating; None: as many as cores.
        seed: Of the random baseline and of the bootstrap.
        resamples: Bootstrap samples.
    """

    methods: tuple[str, ...] = ()
    target: str = "top1"
    convention: Convention = Convention.VITVIZ
    fit: Fit = Fit.SQUASH
    batch_size: int | None = None
    workers: int | None = None
    seed: int = 0
    resamples: int = 2000

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: A value is outside its range.
        """
        for name in self.methods:
            variant(name)
        _require_counts(self.batch_size, self.workers)
        if self.seed < 0:
            raise OptionError(f"--seed is {self.seed}; give a number from 0 up")
        if self.resamples < 1:
            raise OptionError(f"--bootstrap is {self.resamples}; give a number from 1 up")


def _require_counts(batch_size: int | None, workers: int | None) -> None:
    for name, count in (("--batch-size", batch_size), ("--workers", workers)):
        if count is not None and count < 1:
            raise OptionError(f"{name} is {count}; give a number from 1 up, or auto")
