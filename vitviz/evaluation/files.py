"""The files of an evaluation: the plot of its curves and the table of its numbers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vitviz.errors import OptionError
from vitviz.evaluation.options import require_matplotlib
from vitviz.evaluation.perturbation import PERTURBATIONS, score_name
from vitviz.evaluation.summary import CSV_HEADER, Evaluation
from vitviz.images.sources import identity
from vitviz.runs.provenance import Provenance, encode_picture, read_provenance
from vitviz.runs.writing import require_own, write_own

__all__ = ["draw_curves", "require_places", "save"]


_COMMAND = "evaluate"
_PLOTTED = ("deletion", "insertion")  # their names in records


def require_places(table: Path | None, plot: Path | None) -> None:
    """Make sure, before the work, that nothing of others is in the way of its files.

    Raises:
        OutputError: Something is.
        OptionError: One file is asked for as both, or a plot under another name than a PNG's.
    """
    if table is not None and plot is not None and identity(table) == identity(plot):
        raise OptionError(f"--csv and --plot are both {table}; give each a file of its own")
    if plot is not None and plot.suffix.lower() != ".png":
        raise OptionError(f"--plot is {plot}, but a plot is a PNG; give a name that ends in .png")
    for path, is_own in ((table, _is_table), (plot, _is_plot)):
        if path is not None:
            require_own(path, is_own)


def save(evaluation: Evaluation, table: Path | None, plot: Path | None) -> None:
    """Write the files that are asked for, whole or not at all, if there is anything to write.

    The table has the numbers of each map as CSV, the plot the curves as PNG. Only a file whose
    first line is that of such a table, or such a plot, is replaced.

    Raises:
        OutputError: Another file is in the way, or a place cannot be written to.
    """
    if table is not None and evaluation.images:
        write_own(table, os.fsencode(evaluation.to_csv()), _is_table)
    if plot is not None and evaluation.images:
        made_of = Provenance(
            recipe={"command": _COMMAND, "convention": evaluation.convention.value},
            source=f"{evaluation.images} images",
            source_id=_COMMAND,
            versions=evaluation.settings["versions"],
        )
        write_own(plot, encode_picture(draw_curves(evaluation), made_of), _is_plot)


def draw_curves(evaluation: Evaluation) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Draw deletion and insertion of all methods: (height, width, 3) RGB.

    Raises:
        OptionError: matplotlib, which draws them, is not installed.
    """
    require_matplotlib()
    from vitviz.evaluation.plot import Entry, Panel, draw_pixels

    perturbation = PERTURBATIONS[evaluation.convention]
    removed = np.array(perturbation.shares)
    most, least, _ = perturbation.titles
    methods = [each for each in evaluation.methods if each.score.size]
    deletion = Panel(
        heading=f"{_capitalized(most)}: lower is better",
        label=f"% of {perturbation.unit} removed, most relevant first",
        column=most,
        x=removed,
        curves=[each.score[0] for each in methods],
    )
    insertion = Panel(
        heading=f"{_capitalized(least)}: higher is better",
        label=f"% of {perturbation.unit} shown, most relevant first",
        column=least,
        x=1 - removed[::-1],
        curves=[each.score[1][::-1] for each in methods],
    )
    return draw_pixels(
        f"{evaluation.settings['model']}, {evaluation.images} images",
        score_name(
            perturbation,
            evaluation.settings["score_kind"],
            evaluation.settings["options"].get("versus"),
        ),
        (deletion, insertion),
        [
            Entry(
                name=each.name,
                numbers=tuple(f"{each.summaries[name].interval.mean:.3f}" for name in _PLOTTED),
                muted=each.is_baseline,
            )
            for each in methods
        ],
    )


def _capitalized(title: str) -> str:
    return title[0].upper() + title[1:]


def _is_table(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(len(CSV_HEADER) + 1) == f"{CSV_HEADER}\n"
    except OSError:
        return False


def _is_plot(path: Path) -> bool:
    found = read_provenance(path)
    return found is not None and found.recipe.get("command") == _COMMAND
