"""What ``features`` and ``similarity`` take, and what they do beside the commands that explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitviz.cli.explaining import Plan, explain_images
from vitviz.cli.options import RunOptions, WritingRun
from vitviz.cli.parameters import EXPLAIN, PICTURES, declare, method_from
from vitviz.errors import OptionError
from vitviz.methods.features import Features, Similarity
from vitviz.options import Saved

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.images.sources import Source
    from vitviz.models.model import Model
    from vitviz.runs.job import Job

__all__ = ["FeaturesRun", "SimilarityRun", "draw_features", "draw_similarity"]


@dataclass(frozen=True, kw_only=True)
class FeaturesRun(WritingRun):
    """The options of ``features``."""

    save: Annotated[
        list[Saved],
        declare(
            PICTURES,
            metavar="KIND",
            help="heatmap (the colours alone), overlay, panel (image, overlay and colours side by "
            "side), npy (the features), table (the features, in the table of --records) or none; "
            "repeatable.",
        ),
    ] = (Saved.HEATMAP,)  # type: ignore[assignment]  # a default must not be mutable


@dataclass(frozen=True, kw_only=True)
class SimilarityRun(RunOptions):
    """The options of ``similarity``."""

    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE",
            help="The image that has the patch; further ones are as after --to.",
            show_default=False,
        ),
    ]
    others: Annotated[
        list[str],
        declare(
            EXPLAIN,
            "--to",
            metavar="SOURCE",
            help="Other images to compare with the patch: images, folders (recursive) or quoted "
            "globs; repeatable.",
            show_default=False,
        ),
    ] = ()  # type: ignore[assignment]  # a default must not be mutable


def draw_features(run: FeaturesRun, **values: Any) -> None:
    """Do what ``features`` asks for."""

    def plan(model: Model, sources: Sequence[Source], job: Job) -> Plan:
        from vitviz.runs.features import Coloring

        coloring = Coloring.of(sources, method, job)
        return Plan(coloring.job, coloring.finish)

    method = method_from(Features, values)
    explain_images(run, method, plan)


def draw_similarity(run: SimilarityRun, **values: Any) -> None:
    """Do what ``similarity`` asks for."""

    def plan(model: Model, sources: Sequence[Source], job: Job) -> Plan:
        from vitviz.runs.features import compared

        return Plan(compared(model, sources[0], method, job))

    method = method_from(Similarity, values)
    image, *further = run.sources
    if image == "-" or Path(image).is_dir():
        raise OptionError(f"{image} is not one image; name the image that the patch is of first")
    explain_images(replace(run, sources=[image, *run.others, *further]), method, plan)
