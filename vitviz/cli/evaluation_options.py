"""The options of ``evaluate`` as a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from vitviz.cli.completion import complete_methods
from vitviz.cli.options import SharedOptions
from vitviz.cli.parameters import EXPLAIN, OUTPUT, RUNNING, SCRIPTING, declare
from vitviz.methods.table import PUBLISHED, variants
from vitviz.options import Convention

__all__ = ["EvaluationRun"]


@dataclass(frozen=True, kw_only=True)
class EvaluationRun(SharedOptions):
    """The options of ``evaluate``."""

    as_json: Annotated[
        bool,
        declare(SCRIPTING, "--json", help="Print one JSON document to stdout instead of tables."),
    ] = False
    nul: Annotated[
        bool,
        declare(
            SCRIPTING, "-0", "--null", help="Separate paths by NUL instead of newlines, on stdin."
        ),
    ] = False
    methods: Annotated[
        list[str],
        declare(
            EXPLAIN,
            autocompletion=complete_methods,
            metavar="NAME",
            help=f"{', '.join(variants())} (by default all of these that suit the model), or "
            f"{' or '.join(PUBLISHED)} to compare with; @2 after one for maps twice as fine; "
            "repeatable, or several with commas between them. The baselines random and centre are "
            "always there.",
            show_default=False,
        ),
    ] = ()  # type: ignore[assignment]  # a default must not be mutable
    targets: Annotated[
        list[str],
        declare(
            EXPLAIN,
            "--class",
            metavar="C",
            help="Class to explain: top1, an index, a label, truth, or mask: each class in the "
            "image's mask (its values are class indices + 1).",
        ),
    ] = ("top1",)  # type: ignore[assignment]  # a default must not be mutable
    versus: Annotated[
        str | None,
        declare(
            EXPLAIN,
            metavar="C",
            help="Measure on the difference to this class's logit instead: an index, a label, or "
            "topK, the K-th best alone.",
            show_default=False,
        ),
    ] = None
    masks: Annotated[
        Path | None,
        declare(
            EXPLAIN,
            metavar="DIR",
            help="Folder of PNG masks named like the images, 0 for background; adds localisation "
            "metrics.",
            show_default=False,
        ),
    ] = None
    truth: Annotated[
        Path | None,
        declare(
            EXPLAIN,
            metavar="FILE",
            help="File of true classes: one line per image, its name and its class.",
            show_default=False,
        ),
    ] = None
    convention: Annotated[
        Convention,
        declare(
            EXPLAIN,
            metavar="vitviz|chefer2021|srg",
            help="Which pixels are removed, and how the curves are summed up.",
        ),
    ] = Convention.VITVIZ
    explain: Annotated[
        bool,
        declare(OUTPUT, "--explain", help="Explain below the tables what each number means."),
    ] = False
    csv: Annotated[
        Path | None,
        declare(
            OUTPUT, metavar="FILE", help="Write the numbers of each map as CSV.", show_default=False
        ),
    ] = None
    plot: Annotated[
        Path | None,
        declare(
            OUTPUT,
            metavar="FILE",
            help="Write the curves as PNG. Needs the plot extra.",
            show_default=False,
        ),
    ] = None
    seed: Annotated[
        int,
        declare(RUNNING, metavar="N", help="Random seed of the random baseline and the bootstrap."),
    ] = 0
    resamples: Annotated[
        int,
        declare(
            RUNNING, "--bootstrap", metavar="N", help="Bootstrap resamples behind the intervals."
        ),
    ] = 2000
