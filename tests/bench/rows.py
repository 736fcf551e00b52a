"""The rows of the benchmark: each compares vitviz with what would be done without it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np

import vitviz
from tests.bench import classic, growth, runs
from tests.bench.classic import ClassicRollout
from tests.bench.comparisons import BATCH, long_sequence, overhead, throughput
from tests.bench.figures import Figure, Goal, Report, Row, Setting, SkippedError
from tests.bench.photographs import large_photographs, many_photographs, photographs
from tests.bench.rounds import (
    MEGABYTE,
    allocated,
    alternate,
    command,
    peak,
    peak_so_far,
    reset_peak,
)
from tests.bench.subject import NAME, backward, build, forward, images_for, weights
from vitviz.evaluation.measuring import method_names
from vitviz.evaluation.options import EvaluationOptions
from vitviz.evaluation.perturbation import PERTURBATIONS
from vitviz.explaining.batch import explain_batch
from vitviz.methods.evidence import Evidence
from vitviz.methods.relevance import Relevance
from vitviz.methods.rollout import GradRollout, Rollout
from vitviz.options import Convention, HeadFusion, OutputKind

__all__ = ["ROWS"]

ROWS: dict[str, Row] = {}
"""All rows by name, in the order in which they run."""

_MAX = Rollout(head_fusion=HeadFusion.MAX, discard=0.9)
_MEAN = Rollout(head_fusion=HeadFusion.MEAN, discard=0.0)
_GRADIENT = GradRollout(discard=0.9)
_RELEVANCE = Relevance()
_EVIDENCE = Evidence()
_HEAVY = ("torch", "timm", "cv2", "numpy")  # what `vitviz --help` must do without
_PLAIN_COMMAND = f"""
import sys
import timm, torch
model = timm.create_model("{NAME}", pretrained=False, checkpoint_path=sys.argv[1]).eval()
with torch.inference_mode():
    model(torch.zeros(1, 3, 224, 224))
"""
_EMPTY_COMMAND = """
import typer
app = typer.Typer()
@app.command()
def nothing() -> None:
    pass
app()
"""

_Measure = Callable[[Setting], Report]


def _row(*needs: Callable[[Setting], object], cuda: bool = False) -> Callable[[_Measure], _Measure]:
    """Make a function a row: its name is the row's name, its docstring the title."""

    def register(measure: _Measure) -> _Measure:
        name = measure.__name__.replace("_", "-")
        title = (measure.__doc__ or "").rstrip(".")
        ROWS[name] = Row(name=name, title=title, measure=measure, needs=needs, cuda=cuda)
        return measure

    return register


@_row()
def rollout(setting: Setting) -> Report:
    """Rollout (max, discard 0.9), 197 tokens, batch 16 ÷ forward."""
    return overhead(setting, _MAX, goal=Goal(limit=1.25), goal_in_parts=Goal(limit=1.20))


@_row()
def rollout_mean(setting: Setting) -> Report:
    """Rollout (mean, discard 0), 197 tokens, batch 16 ÷ forward."""
    return overhead(setting, _MEAN, goal=Goal(limit=1.10), goal_in_parts=Goal(limit=1.15))


@_row()
def grad_rollout(setting: Setting) -> Report:
    """Grad-rollout (top1, discard 0.9), 197 tokens, batch 16 ÷ forward + backward."""
    return overhead(
        setting, _GRADIENT, plain=backward, goal=Goal(limit=1.25), goal_in_parts=Goal(limit=1.05)
    )


@_row()
def relevance(setting: Setting) -> Report:
    """Relevance (top1), 197 tokens, batch 16 ÷ forward."""
    return overhead(
        setting, _RELEVANCE, goal=Goal(limit=2.6), goal_in_parts=Goal(limit=2.3), with_floor=True
    )


@_row()
def evidence(setting: Setting) -> Report:
    """Evidence (top1), 197 tokens, batch 16 ÷ forward."""
    return overhead(
        setting, _EVIDENCE, goal=Goal(limit=3.0), goal_in_parts=Goal(limit=2.2), with_floor=True
    )


@_row()
def swin_evidence(setting: Setting) -> Report:
    """Evidence (top1) of Swin-T, batch 16 ÷ forward."""
    return overhead(setting, _EVIDENCE, goal=Goal(limit=4.0), name="swin_tiny_patch4_window7_224")


@_row()
def evaluation(setting: Setting) -> Report:
    """`evaluate`, all methods ÷ the forward passes that its curves need by their definition."""
    module = build()
    model, images = vitviz.load_model(module), images_for(BATCH)
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8))
    maps = len(method_names(model, EvaluationOptions()))
    shares = len(PERTURBATIONS[Convention.VITVIZ].shares)
    needed = len(pictures) * (1 + 2 * shares * maps)  # each order of each map; once as it is
    times = alternate(
        setting.rounds(2),
        plain=lambda: forward(module, images),
        vitviz=lambda: vitviz.evaluate(model, pictures),
    )
    return Report(
        figures=[
            Figure(
                label=f"evaluate ÷ {needed // len(pictures)} forward passes an image",
                values=times.ratios("vitviz", "plain", factor=BATCH / needed),
                goal=Goal(limit=1.3),
            )
        ],
        notes={"images": len(pictures), "ms_per_image": times.milliseconds(len(pictures))},
    )


@_row(photographs)
def folder_overlays(setting: Setting) -> Report:
    """Photographs of 640 px to overlays: images/s ÷ those of the forward alone."""
    return throughput(setting, OutputKind.OVERLAY, goal=Goal(limit=0.80, at_least=True))


@_row(photographs)
def folder_npy(setting: Setting) -> Report:
    """Photographs of 640 px to .npy files: images/s ÷ those of the forward alone."""
    return throughput(setting, OutputKind.NPY, goal=Goal(limit=0.90, at_least=True))


@_row(photographs, large_photographs)
def folder_large(setting: Setting) -> Report:
    """Photographs of 12 megapixels to overlays: images/s ÷ those of 640 px."""
    model = vitviz.load_model(build())
    large = runs.sources_in(large_photographs(setting))
    small = runs.sources_in(photographs(setting))[: len(large)]
    times = alternate(
        setting.rounds(3),
        after=runs.clearing(setting),
        small=lambda: runs.explain(setting, model, small),
        large=lambda: runs.explain(setting, model, large),
    )
    size = sum(source.path.stat().st_size for source in large) / len(large)
    return Report(
        figures=[
            Figure(
                label="images/s, 12 MP ÷ 640 px",
                values=times.ratios("small", "large"),
                goal=Goal(limit=0.60, at_least=True),
            )
        ],
        notes={
            "images": len(large),
            "jpeg_mb": size / MEGABYTE,
            "ms_per_image": times.milliseconds(len(large)),
        },
    )


@_row()
def classic_maps(setting: Setting) -> Report:
    """The classic way, one image at a time ÷ vitviz in batches: time of a map."""
    model = vitviz.load_model(build())
    images = images_for(runs.batch_size(model))
    classic_rollout = ClassicRollout(build())
    times = alternate(
        setting.rounds(7),
        classic=lambda: [classic_rollout(image) for image in images.split(1)],
        vitviz=lambda: explain_batch(model, images, _MAX),
    )
    return Report(
        figures=[
            Figure(
                label="classic, in one process ÷ vitviz, per map",
                values=times.ratios("classic", "vitviz"),
                goal=Goal(limit=3, at_least=True),
            )
        ],
        notes={"batch": len(images), "ms_per_image": times.milliseconds(len(images))},
    )


@_row(photographs, weights)
def classic_commands(setting: Setting) -> Report:
    """The classic way, one process an image ÷ one vitviz command, 50 photographs."""
    count, timed = 50, 3
    folder = setting.folder / "fifty"
    chosen = sorted(photographs(setting).iterdir())[:count]
    if not folder.is_dir():
        folder.mkdir()
        for path in chosen:
            shutil.copyfile(path, folder / path.name)
    output = setting.folder / "classic.png"
    script = [sys.executable, classic.__file__]
    times = alternate(
        setting.rounds(2),
        after=runs.clearing(setting),
        classic=lambda: [
            command(*script, path, weights(setting), output)() for path in chosen[:timed]
        ],
        vitviz=command(*runs.rollout_command(setting, folder)),
    )
    return Report(
        figures=[
            Figure(
                label=f"classic, a process an image ÷ vitviz, {count} images",
                values=times.ratios("classic", "vitviz", factor=count / timed),
                goal=Goal(limit=30, at_least=True),
            )
        ],
        notes={
            "scaled": f"{timed} classic processes were timed in each round, times {count // timed}",
            "ms": times.milliseconds(),
        },
    )


@_row()
def long_mean(setting: Setting) -> Report:
    """Rollout (mean, discard 0), 4,097 tokens, batch 1 ÷ forward."""
    return long_sequence(setting, _MEAN, slower=1.6, megabytes=100)


@_row()
def long_max(setting: Setting) -> Report:
    """Rollout (max, discard 0.9), 4,097 tokens, batch 1 ÷ forward."""
    return long_sequence(setting, _MAX, slower=2.1, megabytes=200)


@_row()
def long_gradient(setting: Setting) -> Report:
    """Grad-rollout (top1, discard 0.9), 4,097 tokens, batch 1 ÷ forward + backward."""
    return long_sequence(setting, _GRADIENT, plain=backward, slower=3.0, megabytes=400)


@_row()
def long_relevance(setting: Setting) -> Report:
    """Relevance (top1), 4,097 tokens, batch 1 ÷ forward + backward."""
    return long_sequence(setting, _RELEVANCE, plain=backward, slower=3.0, megabytes=400)


@_row()
def long_evidence(setting: Setting) -> Report:
    """Evidence (top1), 4,097 tokens, batch 1 ÷ forward + backward."""
    return long_sequence(setting, _EVIDENCE, plain=backward, slower=3.0, megabytes=400)


@_row()
def large_model(setting: Setting) -> Report:
    """DINOv2 large at 1022×1022 (5,330 tokens): the peak of the whole process."""
    name, side = "vit_large_patch14_dinov2", setting.pick(1022, 518)
    tokens = (side // 14) ** 2 + 1

    def explain() -> None:
        model = vitviz.load_model(build(name, img_size=side))
        explain_batch(model, images_for(1, img_size=side), Rollout())

    highest = peak(explain)
    return Report(
        figures=[
            Figure(
                label=f"peak memory, DINOv2 large, {tokens:,} tokens",
                values=() if highest is None else [highest / 1e9],
                unit="GB",
                goal=Goal(limit=6),
            )
        ],
        notes={"model": name, "img_size": side},
    )


@_row(many_photographs)
def endurance(setting: Setting) -> Report:
    """Many photographs in one run: growth of the peak memory, and of what is allocated."""
    early = setting.pick(200, 64)
    sources = runs.sources_in(many_photographs(setting))
    late = len(sources) - early  # after it the run winds down
    model = vitviz.load_model(build())
    peaks: list[float] = []
    allocations: list[float] = []
    if reset_peak():
        results = runs.results(setting, model, sources)
        for part in (islice(results, early), islice(results, late - early), results):
            runs.expect_written(part)
            peaks += _megabytes(peak_so_far())
            allocations += _megabytes(allocated())
    runs.clearing(setting)()
    return Report(
        figures=[
            Figure(
                label=f"peak memory after {len(sources):,} images − after {early}",
                values=[peaks[-1] - peaks[0]] if peaks else (),
                unit="MB",
                goal=Goal(limit=15),
            ),
            Figure(
                label=f"allocated after {late:,} images − after {early}",
                values=[allocations[1] - allocations[0]] if allocations else (),
                unit="MB",
                goal=Goal(limit=5),
            ),
        ],
        notes={"peaks_mb": peaks, "allocated_mb": allocations},
    )


@_row()
def help_text(setting: Setting) -> Report:
    """`vitviz --help` ÷ the help of a command of Typer that does nothing; no heavy module."""
    times = alternate(
        setting.rounds(9),
        vitviz=command(*runs.vitviz_command("--help")),
        plain=command(sys.executable, "-c", _EMPTY_COMMAND, "--help"),
    )
    asked = [sys.executable, "-X", "importtime", *runs.vitviz_command("--help")]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    imported = set(re.findall(r"\|\s+(\w+)$", done.stderr, flags=re.MULTILINE))
    loaded = sorted(imported.intersection(_HEAVY))
    if "typer" not in imported:
        raise RuntimeError("python -X importtime does not tell what was imported")
    return Report(
        figures=[
            Figure(
                label="vitviz --help ÷ an empty Typer command's",
                values=times.ratios("vitviz", "plain"),
                goal=Goal(limit=2.6),
            ),
            Figure(
                label=f"of {', '.join(_HEAVY)} imported",
                values=[len(loaded)],
                unit="",
                goal=Goal(limit=0),
            ),
        ],
        notes={"imported": loaded, "ms": times.milliseconds()},
    )


@_row(photographs, weights)
def one_image(setting: Setting) -> Report:
    """One photograph, the whole command ÷ Python that loads the model and runs it once."""
    photograph = min(photographs(setting).iterdir())
    times = alternate(
        setting.rounds(4),
        after=runs.clearing(setting),
        plain=command(sys.executable, "-c", _PLAIN_COMMAND, weights(setting)),
        vitviz=command(*runs.rollout_command(setting, photograph)),
    )
    return Report(
        figures=[
            Figure(
                label="vitviz rollout IMAGE ÷ torch, timm, load, forward",
                values=times.ratios("vitviz", "plain"),
                goal=Goal(limit=0.70),
            )
        ],
        notes={"ms": times.milliseconds()},
    )


@_row()
def peer(setting: Setting) -> Report:
    """GradCAM of pytorch-grad-cam and vitviz's grad-rollout, batch 16, as multiples of forward."""
    grad_cam = _grad_cam()
    module, images = build(), images_for(BATCH)
    model = vitviz.load_model(module)
    times = alternate(
        setting.rounds(5),
        plain=lambda: forward(module, images),
        grad_cam=lambda: grad_cam(input_tensor=images, targets=None),
        vitviz=lambda: explain_batch(model, images, _GRADIENT),
    )
    return Report(
        figures=[
            Figure(
                label="pytorch-grad-cam GradCAM ÷ forward",
                values=times.ratios("grad_cam", "plain"),
            ),
            Figure(label="vitviz grad-rollout ÷ forward", values=times.ratios("vitviz", "plain")),
        ],
        notes={"grad-cam": version("grad-cam"), "ms_per_image": times.milliseconds(BATCH)},
    )


@_row(many_photographs)
def costs(setting: Setting) -> Report:
    """How costs grow with tokens, images and batch size: the plot."""
    return growth.measure(setting)


@_row(cuda=True)
def cuda_rollout(setting: Setting) -> Report:
    """On the GPU: rollout (max, discard 0.9), 197 tokens, batch 16 ÷ forward."""
    return overhead(setting, _MAX, device="cuda")


@_row(cuda=True)
def cuda_rollout_mean(setting: Setting) -> Report:
    """On the GPU: rollout (mean, discard 0), 197 tokens, batch 16 ÷ forward."""
    return overhead(setting, _MEAN, device="cuda")


@_row(cuda=True)
def cuda_grad_rollout(setting: Setting) -> Report:
    """On the GPU: grad-rollout (top1, discard 0.9), 197 tokens, batch 16 ÷ forward + backward."""
    return overhead(setting, _GRADIENT, plain=backward, device="cuda")


@_row(photographs, cuda=True)
def cuda_folder_overlays(setting: Setting) -> Report:
    """On the GPU: photographs of 640 px to overlays."""
    return throughput(setting, OutputKind.OVERLAY, device="cuda")


def _megabytes(memory: float | None) -> list[float]:
    """Return one number in MB, or none where it is unknown."""
    return [] if memory is None else [memory / MEGABYTE]


def _grad_cam() -> Callable[..., Any]:
    """Return GradCAM as its documentation sets it up for a DeiT."""
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError as error:
        raise SkippedError(f"pytorch-grad-cam cannot be imported: {error}") from error
    module: Any = build()
    grad_cam: Callable[..., Any] = GradCAM(
        model=module,
        target_layers=[module.blocks[-1].norm1],
        reshape_transform=lambda tokens: tokens[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2),
    )
    return grad_cam
