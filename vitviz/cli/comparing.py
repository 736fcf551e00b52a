"""What ``compare`` takes, and what it does beside the commands that explain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from vitviz.cli.completion import complete_methods
from vitviz.cli.explaining import Plan, explain_images
from vitviz.cli.options import RunOptions
from vitviz.cli.parameters import EXPLAIN, PICTURES, declare
from vitviz.methods.comparison import DEFAULT_COLUMNS, Comparison
from vitviz.methods.table import PUBLISHED, variants
from vitviz.options import Saved

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.images.sources import Source
    from vitviz.models.model import Model
    from vitviz.runs.job import Job
    from vitviz.runs.pipeline import Item

__all__ = ["CompareRun", "compare_images"]


@dataclass(frozen=True, kw_only=True)
class CompareRun(RunOptions):
    """The options of ``compare``."""

    methods: Annotated[
        list[str],
        declare(
            EXPLAIN,
            autocompletion=complete_methods,
            metavar="NAME",
            help=f"{', '.join((*variants(), *PUBLISHED))}, with @2 after one for maps twice as "
            "fine; repeatable, or several with commas between them.",
        ),
    ] = DEFAULT_COLUMNS  # type: ignore[assignment]  # a default must not be mutable
    targets: Annotated[
        list[str],
        declare(
            EXPLAIN,
            "--class",
            metavar="C",
            help="Class to explain: an index, a label, top1 or topK. Repeatable, one row for each.",
        ),
    ] = ("top1",)  # type: ignore[assignment]  # a default must not be mutable
    versus: Annotated[
        str | None,
        declare(
            EXPLAIN,
            metavar="C",
            help="Explain the difference to this class's logit instead: an index, a label, or "
            "topK, the K-th best alone.",
        ),
    ] = None
    save: list[Saved] = (Saved.PANEL,)  # type: ignore[assignment]  # the sheet alone
    max_size: Annotated[
        int,
        declare(PICTURES, metavar="N", help="Longest side of each picture of a sheet, in pixels."),
    ] = 512


def compare_images(run: CompareRun) -> None:
    """Do what ``compare`` asks for."""
    comparison = Comparison.of(run.methods, tuple(run.targets), run.versus)

    def plan(model: Model, sources: Sequence[Source], job: Job) -> Plan:
        from vitviz.explaining.comparing import compared

        def finish(model: Model, items: Iterator[Item]) -> Iterator[Item]:
            return compared(items, comparison)

        return Plan(job, finish)

    explain_images(run, comparison, plan)
