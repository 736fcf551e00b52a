"""How costs grow with tokens, images and batch size: measured, and drawn as one plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import vitviz
from tests.bench import runs
from tests.bench.figures import Figure, Goal, Report, Setting
from tests.bench.photographs import many_photographs
from tests.bench.rounds import alternate
from tests.bench.subject import build, forward, images_for
from vitviz.explaining.batch import explain_batch
from vitviz.methods.rollout import Rollout

__all__ = ["draw", "measure"]

_INK, _PALE, _HEAT = "#333333", "#8a8f98", "#c8452f"
_GOALS = {(197, 1): Goal(limit=1.25), (785, 1): Goal(limit=1.4), (3137, 1): Goal(limit=2.0)}
"""By the number of tokens and the batch; the others have none."""

_WIDTH, _HEIGHT = 8, 3  # inches; at 100 dots an inch as wide as a README shows it


def measure(setting: Setting) -> Report:
    """Measure all three curves on deit_tiny, as by default (max, discard 0.9)."""
    tokens = [_maps(setting, 1, side) for side in setting.pick((224, 448, 896, 1024), (224, 448))]
    batches = [_maps(setting, batch, 224) for batch in setting.pick((4, 16, 64), (4, 16))]
    images = _images(setting, setting.pick((1, 10, 100, 1000), (1, 10, 100)))
    return Report(
        figures=[
            Figure(
                label=f"rollout ÷ forward, {each['tokens']:,} tokens, batch {each['batch']}",
                values=each.pop("ratios"),
                goal=_GOALS.get((each["tokens"], each["batch"])),
            )
            for each in (*tokens, *batches)
        ],
        notes={"tokens": tokens, "batches": [tokens[0], *batches], "images": images},
    )


def draw(curves: Mapping[str, Any], path: Path) -> None:
    """Draw the curves.

    Args:
        curves: The notes that ``measure`` reported.
        path: The picture to write.
    """
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(_WIDTH, _HEIGHT), dpi=200, layout="constrained")
    tokens, images, batches = plot.subplots(1, 3)
    _draw_maps(tokens, curves["tokens"], "tokens")
    _draw_images(images, curves["images"])
    _draw_maps(batches, curves["batches"], "batch")
    tokens.set(yscale="log", title="ms an image, one at a time", xlabel="tokens")
    for axes in (images, batches):
        axes.yaxis.get_major_locator().set_params(integer=True)
    images.set(ylim=(0, None), title="images a second, file to file", xlabel="images in a run")
    batches.set(ylim=(0, None), title="ms an image, 197 tokens", xlabel="images in a batch")
    for axes in (tokens, images, batches):
        _calm(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path)


def _maps(setting: Setting, batch: int, side: int) -> dict[str, Any]:
    """Time maps and plain forwards of a batch of square images."""
    module, pixels = build(img_size=side), images_for(batch, img_size=side)
    model = vitviz.load_model(module)
    times = alternate(
        setting.rounds(3),
        forward=lambda: forward(module, pixels),
        rollout=lambda: explain_batch(model, pixels, Rollout()),
    )
    return {
        "tokens": model.layout.tokens,
        "batch": batch,
        "ms_per_image": times.milliseconds(batch),
        "ratios": times.ratios("rollout", "forward"),
    }


def _images(setting: Setting, counts: Sequence[int]) -> list[dict[str, float]]:
    """Time the whole pipeline on more and more photographs; the model is in memory."""
    model = vitviz.load_model(build())
    sources = runs.sources_in(many_photographs(setting))

    def rate(count: int) -> float:
        many = count > 100  # warm by then, and long enough to tell in one round
        times = alternate(
            1 if many else setting.rounds(3),
            warm_up=0 if many else 1,
            after=runs.clearing(setting),
            pipeline=lambda: runs.explain(setting, model, sources[:count]),
        )
        return 1000 / times.milliseconds(count)["pipeline"]

    return [{"images": count, "images_per_second": rate(count)} for count in counts]


def _draw_maps(axes: Any, points: Sequence[Mapping[str, Any]], across: str) -> None:
    """Draw rollout and the plain forward, each named where its line ends."""
    where = [point[across] for point in points]
    ends = points[-1]["ms_per_image"]
    for side, color in (("rollout", _HEAT), ("forward", _PALE)):
        axes.plot(where, [point["ms_per_image"][side] for point in points], "o-", color=color)
        align = "bottom" if ends[side] == max(ends.values()) else "top"
        axes.annotate(f" {side}", (where[-1], ends[side]), va=align, color=color, fontsize=9)


def _draw_images(axes: Any, points: Sequence[Mapping[str, float]]) -> None:
    counts = [point["images"] for point in points]
    axes.plot(counts, [point["images_per_second"] for point in points], "o-", color=_HEAT)


def _calm(axes: Any) -> None:
    """Leave of the frame what is read: the points measured across, round numbers up."""
    where = [int(each) for each in axes.lines[0].get_xdata()]
    # A number too near to the next one would run into it.
    apart = [each for each, after in pairwise([*where, math.inf]) if after > 1.6 * each]
    axes.set_xscale("log")
    axes.set_xticks(apart, [f"{tick:,}" for tick in apart])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_PALE)
    axes.tick_params(colors=_INK, labelsize=8, length=3)
    axes.grid(axis="y", color=_PALE, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.title.set(fontsize=9, color=_INK)
    axes.xaxis.label.set(fontsize=9, color=_INK)
    for line in axes.lines:
        line.set(linewidth=1.6, markersize=4)
