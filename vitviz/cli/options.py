"""The options of commands as dataclasses: each field is one option, in a named group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vitviz.cli.completion import complete_devices, complete_models
from vitviz.cli.parameters import (
    MODEL,
    PICTURES,
    RUNNING,
    SCRIPTING,
    declare,
)
from vitviz.models.names import DEFAULT
from vitviz.options import Colormap, Fit, Outliers, PictureFormat, Precision, Saved
from vitviz.runs.job import Engine

__all__ = [
    "MODEL_HELP",
    "ImgSizeOption",
    "RunOptions",
    "SharedOptions",
    "WritingRun",
]

MODEL_HELP = (
    "A timm name, an alias, demo, hf-hub:owner/name, a folder with a config.json, or your own "
    "package.module:factory."
)


def _own(*names: str, **settings: Any) -> Any:
    """Declare an option of the model that has no default to show."""
    return declare(MODEL, *names, show_default=False, **settings)


ImgSizeOption = Annotated[
    str | None,
    _own(metavar="N|HxW", help="Build the model for this image size, instead of its own."),
]


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """The options of all commands that work on images; each field is one option."""

    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Images, folders (recursive), quoted globs, URLs (s3://, https://, hf:// …), .tar "
            "and .parquet files of images, @FILE for a list of them, or - for a list on stdin.",
            show_default=False,
        ),
    ]
    model: Annotated[
        str | None,
        _own(
            "-m",
            "--model",
            autocompletion=complete_models,
            metavar="MODEL",
            help=f"{MODEL_HELP} With --weights alone: what their file says. Default: {DEFAULT}.",
        ),
    ] = None
    weights: Annotated[
        Path | None,
        _own(metavar="FILE", help="Your own checkpoint (.safetensors, .pth, .pt, .npz)."),
    ] = None
    labels: Annotated[
        Path | None,
        _own(metavar="FILE", help="Class names: one per line, a JSON list, or {index: name}."),
    ] = None
    img_size: ImgSizeOption = None
    mean: Annotated[
        str | None,
        _own(
            metavar="R,G,B",
            help="Mean to subtract from pixels in [0, 1], in place of the model's own: one number, "
            "or one per channel.",
        ),
    ] = None
    std: Annotated[
        str | None,
        _own(metavar="R,G,B", help="Standard deviation to divide by, in place of the model's own."),
    ] = None
    fit: Annotated[
        Fit,
        declare(
            MODEL,
            metavar="squash|crop|native",
            help="Squash the image, crop its centre, or keep its aspect ratio.",
        ),
    ] = Fit.SQUASH
    value_range: Annotated[
        str | None,
        _own(
            metavar="LOW:HIGH",
            help="Pixel values that become black and white, such as 0:4095, or percentiles of each "
            "image, such as 1%:99%. Default: 0 and the largest value of the integer type; 0 and 1 "
            "for floats.",
        ),
    ] = None
    adapter: Annotated[
        Path | None,
        _own(
            metavar="DIR",
            help="A LoRA adapter (PEFT) to merge into the weights; without -m, the model is the "
            "one that it names.",
        ),
    ] = None
    text_embeddings: Annotated[
        Path | None,
        _own(
            metavar="FILE",
            help="Names and embeddings of prompts (.safetensors, .npz) to use as classes, for CLIP "
            "and SigLIP models.",
        ),
    ] = None
    text: Annotated[
        list[str],
        _own(
            metavar="PROMPT",
            help="A prompt to use as a class, for CLIP and SigLIP models; repeatable. Needs the "
            "text extra.",
        ),
    ] = ()  # type: ignore[assignment]  # a default must not be mutable
    templates: Annotated[
        list[str],
        _own(
            "--template",
            metavar="TEXT",
            help="Template that prompts are put into, such as 'a photo of a {}.'; repeatable "
            "(embeddings are averaged).",
        ),
    ] = ()  # type: ignore[assignment]  # a default must not be mutable
    device: Annotated[
        str,
        declare(
            RUNNING,
            autocompletion=complete_devices,
            metavar="NAME",
            help="auto, cpu, cuda, cuda:1 or mps.",
        ),
    ] = "auto"
    precision: Annotated[
        Precision,
        declare(
            RUNNING,
            metavar="fp32|bf16|fp16",
            help="Precision of the computation; bf16 and fp16 are meant for GPUs.",
        ),
    ] = Precision.FP32
    batch_size: Annotated[
        str, declare(RUNNING, metavar="auto|N", help="Images run through the model at once.")
    ] = "auto"
    workers: Annotated[
        str, declare(RUNNING, metavar="auto|N", help="Threads that read and write images.")
    ] = "auto"
    as_json: Annotated[
        bool, declare(SCRIPTING, "--json", help="Print one JSON record per image to stdout.")
    ] = False
    nul: Annotated[
        bool,
        declare(
            SCRIPTING,
            "-0",
            "--null",
            help="Separate paths by NUL instead of newlines, on stdin and stdout.",
        ),
    ] = False
    quiet: Annotated[
        bool, declare(SCRIPTING, "-q", "--quiet", help="Print only results and failures.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class WritingRun(SharedOptions):
    """The options of all commands that write pictures."""

    output: Annotated[
        Path, declare(PICTURES, "-o", "--output", metavar="DIR", help="Folder to write to.")
    ] = Path("vitviz-out")
    save: Annotated[
        list[Saved],
        declare(
            PICTURES,
            metavar="KIND",
            help="overlay, heatmap, panel (image, overlay and heatmap side by side), gray (the "
            "heat in one channel), npy (the numbers), table (the numbers, in the table of "
            "--records) or none; repeatable.",
        ),
    ] = (Saved.OVERLAY,)  # type: ignore[assignment]  # a default must not be mutable
    records: Annotated[
        Path | None,
        declare(
            PICTURES,
            metavar="DIR.parquet",
            help="Write a table with a row per map into this folder of Parquet files. Needs "
            "the parquet extra.",
            show_default=False,
        ),
    ] = None
    format: Annotated[
        PictureFormat,
        declare(
            PICTURES,
            metavar="png|jpeg|webp|gif",
            help="File format of pictures; gray is always PNG, animations are GIF or WebP.",
        ),
    ] = PictureFormat.PNG
    alpha: Annotated[
        float,
        declare(PICTURES, metavar="A", help="Largest weight of the colours in overlays, 0 to 1."),
    ] = 0.75
    max_size: Annotated[
        int, declare(PICTURES, metavar="N", help="Longest side of the pictures, in pixels.")
    ] = 1024
    show: Annotated[
        bool,
        declare(PICTURES, "--show", help="Also show the pictures in the terminal."),
    ] = False
    report: Annotated[
        bool,
        declare(
            PICTURES,
            "--report",
            help="Write report.html beside the maps, a page to browse all of them.",
        ),
    ] = False
    open: Annotated[
        bool,
        declare(PICTURES, "--open", help="Open the report, or else the output folder, when done."),
    ] = False
    skip_existing: Annotated[
        bool,
        declare(
            RUNNING,
            "--skip-existing",
            help="Skip images whose maps (with --records: rows) exist already, made from the same "
            "bytes with the same model, weights and options.",
        ),
    ] = False
    shard: Annotated[
        str | None,
        declare(
            RUNNING,
            metavar="I/N|auto",
            help="Explain only part I of N, counted from 1; each image is in exactly one part. "
            "auto: take I and N from the variables of Slurm or torchrun; auto/N: I from those of "
            "Kubernetes or GNU parallel.",
            show_default=False,
        ),
    ] = None
    engine: Annotated[
        Engine,
        declare(
            RUNNING,
            metavar="local|ray",
            help="Run in this process, or on actors of a Ray cluster. Needs the ray extra.",
        ),
    ] = Engine.LOCAL
    ray_address: Annotated[
        str | None,
        declare(
            RUNNING,
            metavar="auto|HOST:PORT",
            help="Ray cluster to join. Default: start one on this machine.",
            show_default=False,
        ),
    ] = None
    actors: Annotated[
        str,
        declare(
            RUNNING,
            metavar="auto|N",
            help="Number of Ray processes that hold the model. Default: one per GPU, or one for "
            "every 4 cores.",
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class RunOptions(WritingRun):
    """The options of all commands that write maps."""

    colormap: Annotated[
        Colormap | None,
        declare(
            PICTURES,
            metavar="NAME",
            help=f"Colours of the heat: {', '.join(Colormap)}; evidence has redblue by default, "
            "all others inferno.",
            show_default=False,
        ),
    ] = None
    scale: Annotated[
        str,
        declare(
            PICTURES,
            metavar="image|LOW:HIGH",
            help="Range of the colours: the minimum and maximum of each map, or the same numbers "
            "for all, such as 0:10, in the unit shown on colour bars.",
        ),
    ] = "image"
    outliers: Annotated[
        Outliers,
        declare(
            PICTURES,
            metavar="mark|mute|show",
            help="Patches whose tokens have an outlying norm: frame them, leave them out of the "
            "range of the colours (framed where they exceed it), or draw them like all others.",
        ),
    ] = Outliers.MUTE
