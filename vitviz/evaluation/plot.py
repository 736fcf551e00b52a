"""The curves of an evaluation as a picture; only this room needs matplotlib, an extra."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np

# The Figure itself rather than pyplot, which would keep every figure and choose a window system.
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Entry", "Panel", "draw_figure", "draw_pixels"]

_DPI = 150
_WIDTH, _HEIGHT = 13.6, 5.0  # inches, of a legend of up to _ROWS rows
_ROWS = 14
_ROW_HEIGHT = 0.27  # inches, of each row that the legend has beyond
_WIDTHS = (1.0, 1.0, 0.84)  # two panels and the legend
_NAME, _NUMBERS = 0.13, (0.77, 1.0)  # where the legend's columns stand, as shares of its width

_INK, _SOFT, _GRID = "#212529", "#6c757d", "#e5e8ec"
_MUTED = ("#adb5bd", "#6c757d", "#495057")
# Okabe and Ito's colours, which people who see colours differently tell apart. Yellow and black
# make way for two that can be seen on white, and told from text.
_BRIGHT = (
    *("#d55e00", "#0072b2", "#009e73", "#cc79a7"),
    *("#e69f00", "#56b4e9", "#7550d2", "#5a3c1e"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """Curves in one pair of axes.

    Attributes:
        heading: Above it.
        label: Under its horizontal axis, which is in per cent.
        column: Heading of its numbers in the legend.
        x: (points,) in [0, 1].
        curves: Of each entry, its heights (points,).
    """

    heading: str
    label: str
    column: str
    x: NDArray[np.floating]
    curves: Sequence[NDArray[np.floating]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the legend says of a curve.

    Attributes:
        name: Of what is plotted.
        numbers: One for each panel.
        muted: Whether it is there for comparison only: dashed, in grey.
    """

    name: str
    numbers: tuple[str, ...]
    muted: bool = False


def draw_pixels(
    title: str, remark: str, panels: Sequence[Panel], entries: Sequence[Entry]
) -> NDArray[np.uint8]:
    """Draw the same as ``draw_figure``, as RGB pixels (height, width, 3)."""
    # The same numbers give the same pixels, whatever style a user has chosen for other plots.
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a model's name
        file = io.BytesIO()
        draw_figure(title, remark, panels, entries).savefig(file, format="png")
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def draw_figure(
    title: str, remark: str, panels: Sequence[Panel], entries: Sequence[Entry]
) -> Figure:
    """Draw panels side by side, and a legend with numbers at the right.

    Args:
        title: Above all.
        remark: Above each panel: what its vertical axis shows.
        panels: Two pairs of axes.
        entries: What is plotted, in the order of the panels' curves.
    """
    height = _HEIGHT + _ROW_HEIGHT * max(0, len(entries) - _ROWS)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.03)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout=layout)
    figure.suptitle(title, x=0.012, ha="left", size=14, weight="bold", color=_INK, parse_math=False)
    *plots, legend = figure.subplots(1, len(panels) + 1, width_ratios=_WIDTHS)
    colors = _colors([entry.muted for entry in entries])
    levels = _levels(panels)
    bottom = min(0.0, float(levels[0]))
    for axes, panel in zip(plots, panels, strict=True):
        for y, entry, color in zip(panel.curves, entries, colors, strict=True):
            _draw_line(axes, 100 * panel.x, y, entry, color)
        _dress(axes, panel, remark)
        axes.set(ylim=(bottom, levels[-1]), yticks=levels)
    _draw_legend(legend, [panel.column for panel in panels], entries, colors)
    return figure


def _levels(panels: Sequence[Panel]) -> NDArray[np.floating]:
    """Return the ticks of the vertical axes: from 0, or below, to the first above all curves."""
    heights = [0.0, *(end for panel in panels for y in panel.curves for end in _ends(y))]
    lowest, highest = min(heights), max(heights)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(lowest, highest or 1.0)
    return np.asarray(ticks)


def _ends(y: NDArray[np.floating]) -> tuple[float, float]:
    return float(y.min()), float(y.max())


def _draw_line(
    axes: Axes, x: NDArray[np.floating], y: NDArray[np.floating], entry: Entry, color: str
) -> None:
    # What lies on the edge of the axes is drawn whole.
    if entry.muted:
        axes.plot(x, y, "--", color=color, linewidth=1.6, label=entry.name, clip_on=False)
    else:
        axes.plot(
            *(x, y, "o-"), color=color, linewidth=2, markersize=4.5, label=entry.name, clip_on=False
        )


def _dress(axes: Axes, panel: Panel, remark: str) -> None:
    axes.set_title(panel.heading, loc="left", size=12.5, color=_INK, pad=24)
    axes.annotate(remark, (0, 1), (0, 8), "axes fraction", "offset points", size=10, color=_SOFT)
    axes.set_xlabel(panel.label, size=10, color=_SOFT, labelpad=8)
    axes.set(xlim=(0, 100))
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", labelsize=10, labelcolor=_SOFT, color=_SOFT)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)


def _draw_legend(
    axes: Axes, columns: Sequence[str], entries: Sequence[Entry], colors: Sequence[str]
) -> None:
    """List the entries with their numbers, in rows counted from the top."""
    axes.set(xlim=(0, 1), ylim=(max(len(entries), _ROWS) + 0.5, -0.5))
    axes.set_axis_off()
    for place, column in zip(_NUMBERS, columns, strict=True):
        axes.text(place, 0, column, size=10, color=_SOFT, ha="right", va="center_baseline")
    for row, (entry, color) in enumerate(zip(entries, colors, strict=True), start=1):
        _draw_line(axes, np.array([0, 0.09]), np.array([row, row]), entry, color)
        axes.text(_NAME, row, entry.name, size=10.5, color=_INK, va="center_baseline")
        for place, number in zip(_NUMBERS, entry.numbers, strict=True):
            axes.text(place, row, number, size=10.5, color=_INK, ha="right", va="center_baseline")


def _colors(muted: Sequence[bool]) -> list[str]:
    """Give each curve a colour of its kind, in order; those that come again come paler."""
    counts = {True: 0, False: 0}
    colors = []
    for kind in muted:
        palette = _MUTED if kind else _BRIGHT
        turn, place = divmod(counts[kind], len(palette))
        levels = bytes.fromhex(palette[place].removeprefix("#"))
        colors.append("#" + bytes(255 - (255 - level) // 2**turn for level in levels).hex())
        counts[kind] += 1
    return colors
