"""The comparisons that several rows make, each with the plain pass through the same model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

import vitviz
from tests.bench import runs
from tests.bench.figures import Figure, Goal, Report, Setting
from tests.bench.photographs import photographs
from tests.bench.rounds import MEGABYTE, alternate, peak
from tests.bench.subject import NAME, backward, build, forward, images_for
from vitviz.explaining.batch import explain_batch
from vitviz.explaining.parallel import map_parts
from vitviz.methods.method import Method
from vitviz.methods.rollout import GradRollout, Rollout
from vitviz.options import OutputKind

__all__ = ["BATCH", "long_sequence", "overhead", "throughput"]

BATCH = 16

_Pass = Callable[[nn.Module, Tensor], None]


def overhead(
    setting: Setting,
    options: Method,
    *,
    plain: _Pass = forward,
    goal: Goal | None = None,
    goal_in_parts: Goal | None = None,
    name: str = NAME,
    device: str = "cpu",
    with_floor: bool = False,
) -> Report:
    """Compare a batch of maps with plain passes of the same batch.

    On a processor vitviz works on parts of a batch side by side, from which plain passes gain,
    too: a second figure compares with those and has a goal of its own. With a floor, a third one
    says what a backward pass costs that any method with gradients needs.
    """
    module = build(name, device=device).requires_grad_(False)
    images = images_for(BATCH, device=device)
    model = vitviz.load_model(module)
    run = partial(plain, module)
    in_parts = partial(map_parts, tokens=model.layout.tokens)
    floor = {"floor": lambda: in_parts(partial(backward, module), images)} if with_floor else {}
    times = alternate(
        setting.rounds(9 if name == NAME else 2),
        plain=lambda: run(images),
        side_by_side=lambda: in_parts(run, images),
        vitviz=lambda: explain_batch(model, images, options),
        **floor,
    )
    of_model = "" if name == NAME else f" of {name.partition('_patch')[0]}"
    label = f"{_described(options)}{of_model}, batch {BATCH} ÷ {_named(plain)}{_on(device)}"
    return Report(
        figures=[
            Figure(label=label, values=times.ratios("vitviz", "plain"), goal=goal),
            Figure(
                label=f"{label}, side by side",
                values=times.ratios("vitviz", "side_by_side"),
                goal=goal_in_parts,
            ),
            *(
                Figure(
                    label=f"{_named(backward)} ÷ {_named(plain)}, side by side",
                    values=times.ratios(side, "side_by_side"),
                )
                for side in floor
            ),
        ],
        notes={"ms_per_image": times.milliseconds(BATCH), **_card(device)},
    )


def throughput(
    setting: Setting, kind: OutputKind, *, goal: Goal | None = None, device: str = "cpu"
) -> Report:
    """Compare images/s from files to files with those of the plain forward."""
    module = build(device=device)
    model = vitviz.load_model(module)
    sources = runs.sources_in(photographs(setting))
    batch = runs.batch_size(model)
    images = images_for(batch, device=device)

    def plain() -> None:
        for start in range(0, len(sources), batch):
            forward(module, images[: len(sources) - start])

    times = alternate(
        setting.rounds(3),
        after=runs.clearing(setting),
        plain=plain,
        vitviz=lambda: runs.explain(setting, model, sources, kind),
    )
    rates = [len(sources) / seconds for seconds in times.seconds["vitviz"]]
    return Report(
        figures=[
            Figure(
                label=f"photographs → {kind}, images/s ÷ forward{_on(device)}",
                values=times.ratios("plain", "vitviz"),
                goal=goal,
            )
        ],
        notes={
            "images": len(sources),
            "batch": batch,
            "images_per_second": median(rates),
            "png": "OpenCV's defaults: zlib level 1 on run lengths",
            "ms_per_image": times.milliseconds(len(sources)),
            **_card(device),
        },
    )


def long_sequence(
    setting: Setting,
    options: Method,
    *,
    slower: float,
    megabytes: float,
    plain: _Pass = forward,
) -> Report:
    """Compare time and peak memory of one map of 1024×1024 pixels with a plain pass."""
    module = build(img_size=1024).requires_grad_(False)
    images = images_for(1, img_size=1024)
    model = vitviz.load_model(module)
    sides = {
        "plain": lambda: plain(module, images),
        "vitviz": lambda: explain_batch(model, images, options),
    }
    times = alternate(setting.rounds(3), **sides)
    peaks = [(peak(sides["vitviz"]), peak(sides["plain"])) for _ in range(2)]
    label = f"{_described(options)}, 4,097 tokens"
    return Report(
        figures=[
            Figure(
                label=f"{label} ÷ {_named(plain)}",
                values=times.ratios("vitviz", "plain"),
                goal=Goal(limit=slower),
            ),
            Figure(
                label=f"{label}, peak memory above {_named(plain)}",
                values=[
                    (ours - theirs) / MEGABYTE
                    for ours, theirs in peaks
                    if ours is not None and theirs is not None
                ],
                unit="MB",
                goal=Goal(limit=megabytes),
            ),
        ],
        notes={"ms": times.milliseconds()},
    )


def _described(options: Method) -> str:
    if isinstance(options, Rollout):
        return f"{options.name} {options.head_fusion} {options.discard:g}"
    if isinstance(options, GradRollout):
        return f"{options.name} {options.discard:g}"
    return options.name


def _named(plain: _Pass) -> str:
    return "forward + backward" if plain is backward else "forward"


def _on(device: str) -> str:
    return "" if device == "cpu" else f", on {device}"


def _card(device: str) -> dict[str, str]:
    return {} if device == "cpu" else {"device": torch.cuda.get_device_name(device)}
