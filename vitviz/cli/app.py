"""The command line: words, defaults and exit codes over the library; loads torch only to work."""

from __future__ import annotations

import errno
import gc
import inspect as introspection
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, get_type_hints

import typer
from rich.console import Console

import vitviz
from vitviz.cli.signals import Interruption
from vitviz.errors import OptionError, OutputError, SourceError, VitvizError, printable
from vitviz.options import (
    VARIANTS,
    AttentionRule,
    Colormap,
    Convention,
    EvaluationOptions,
    Fit,
    HeadFusion,
    Job,
    Method,
    MethodOptions,
    OutputKind,
    PictureOptions,
    Precision,
)

__all__ = [
    "EvaluationRun",
    "RunOptions",
    "SharedOptions",
    "app",
    "attention",
    "evaluate",
    "evidence",
    "grad_rollout",
    "inspect",
    "main",
    "models",
    "relevance",
    "rollout",
]


if TYPE_CHECKING:  # these rooms load torch
    from vitviz.cli.reporter import Reporter
    from vitviz.evaluation.measuring import ImageScores
    from vitviz.evaluation.summary import Evaluation
    from vitviz.images.sources import Source
    from vitviz.models.model import Model

_MODEL_HELP = (
    "A timm name, an alias, demo, hf-hub:owner/name, a folder with a config.json, or your own "
    "package.module:factory."
)
_Command = Callable[..., None]
_UsageError: Any = typer.BadParameter.__base__  # click's, wherever this typer keeps click

app = typer.Typer(
    name="vitviz",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="See where a Vision Transformer looks: a heatmap PNG for each image.",
)


_ImgSizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="N|HxW",
        help="Build the model for this image size, instead of its own.",
        show_default=False,
    ),
]


_DiscardOption = Annotated[
    float,
    typer.Option(metavar="R", help="Share of the lowest attention set to 0, in [0, 1)."),
]
_StartLayerOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Leave out the blocks before this one.", show_default="0"),
]
_ClassOption = Annotated[
    list[str],
    typer.Option(
        "--class",
        metavar="C",
        help="An index, a label, top1 or topK; repeatable, one map for each class.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """The options of all commands that work on images; each field is one option."""

    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Images, folders (recursive), quoted globs, or - for paths on stdin.",
            show_default=False,
        ),
    ]
    model: Annotated[
        str,
        typer.Option("-m", "--model", metavar="MODEL", help=_MODEL_HELP),
    ] = "deit_tiny"
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your own checkpoint (.safetensors, .pth, .pt).",
            show_default=False,
        ),
    ] = None
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Class names: one a line, a JSON list, or {index: name}.",
            show_default=False,
        ),
    ] = None
    img_size: _ImgSizeOption = None
    fit: Annotated[
        Fit,
        typer.Option(
            metavar="squash|crop|native",
            help="Squash the image, crop its centre, or keep its aspect ratio.",
        ),
    ] = Fit.SQUASH
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")] = (
        "auto"
    )
    precision: Annotated[
        Precision,
        typer.Option(
            metavar="fp32|bf16|fp16",
            help="Numbers that the model computes with; half of them is for GPUs.",
        ),
    ] = Precision.FP32
    batch_size: Annotated[
        str, typer.Option(metavar="auto|N", help="Images run through the model at once.")
    ] = "auto"
    workers: Annotated[
        str, typer.Option(metavar="auto|N", help="Threads that read and write images.")
    ] = "auto"
    as_json: Annotated[bool, typer.Option("--json", help="One JSON record an image on stdout.")] = (
        False
    )
    nul: Annotated[
        bool, typer.Option("-0", "--null", help="NUL instead of newlines on stdin and stdout.")
    ] = False
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Say nothing but results and failures.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class RunOptions(SharedOptions):
    """The options of all commands that write maps."""

    refine: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Maps N times finer than patches, from N x N shifts of each image.",
        ),
    ] = 1
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to.")
    ] = Path("vitviz-out")
    save: Annotated[
        list[OutputKind],
        typer.Option(
            metavar="KIND",
            help="overlay, heatmap, panel (image, overlay and heatmap side by side) or npy (the "
            "numbers); repeatable.",
        ),
    ] = (OutputKind.OVERLAY,)  # type: ignore[assignment]  # a default must not be mutable
    colormap: Annotated[
        Colormap | None,
        typer.Option(
            metavar="NAME",
            help=f"Colours of the heat: {', '.join(Colormap)}; evidence has redblue by default, "
            "all others turbo.",
            show_default=False,
        ),
    ] = None
    alpha: Annotated[
        float, typer.Option(metavar="A", help="Weight of the heat in overlays, 0 to 1.")
    ] = 0.5
    max_size: Annotated[
        int, typer.Option(metavar="N", help="Longest side of the pictures, in pixels.")
    ] = 1024
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Leave out images whose maps are there, made from the same bytes with the same "
            "model, weights and options.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class EvaluationRun(SharedOptions):
    """The options of ``evaluate``."""

    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout instead of tables.")
    ] = False
    nul: Annotated[bool, typer.Option("-0", "--null", help="NUL instead of newlines on stdin.")] = (
        False
    )
    methods: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(VARIANTS)}, with @2 after one for maps twice as fine; repeatable. "
            "All that suit the model by default; the baselines random and centre always.",
            show_default=False,
        ),
    ] = ()  # type: ignore[assignment]  # a default must not be mutable
    targets: Annotated[
        list[str],
        typer.Option(
            "--class",
            metavar="C",
            help="Which class maps explain: top1, an index, a label, truth, or mask for each that "
            "an image's mask names (its values are class indices + 1).",
        ),
    ] = ("top1",)  # type: ignore[assignment]  # a default must not be mutable
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="PNGs of the images' names, 0 where no object is: adds localisation.",
            show_default=False,
        ),
    ] = None
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="True classes: a line for each image, its name and its class.",
            show_default=False,
        ),
    ] = None
    convention: Annotated[
        Convention,
        typer.Option(
            metavar="vitviz|chefer2021", help="What is taken away, and how it is summed up."
        ),
    ] = Convention.VITVIZ
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write each map's numbers.", show_default=False),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the curves as PNG.", show_default=False),
    ] = None
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of the random baseline and the bootstrap.")
    ] = 0
    resamples: Annotated[
        int, typer.Option("--bootstrap", metavar="N", help="Samples behind the intervals.")
    ] = 2000


def _with_options(kind: type[SharedOptions]) -> Callable[[_Command], _Command]:
    """Give a command every option of a dataclass, as its first argument, ``run``."""
    hints = get_type_hints(kind, include_extras=True)
    shared = [
        introspection.Parameter(
            field.name,
            introspection.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=introspection.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(kind)
    ]
    names = [parameter.name for parameter in shared]

    def decorate(command: _Command) -> _Command:
        signature = introspection.signature(command, eval_str=True)
        own = [
            parameter.replace(kind=introspection.Parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
            if name != "run"
        ]

        @wraps(command)
        def wrapper(**values: Any) -> None:
            run = kind(**{name: values.pop(name) for name in names})
            command(run=run, **values)

        parameters = [shared[0], *own, *shared[1:]]
        wrapper.__signature__ = introspection.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
        return wrapper

    return decorate


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitviz {vitviz.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and leave."
        ),
    ] = False,
) -> None:
    """See where a Vision Transformer looks: a heatmap PNG for each image."""


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)] = "deit_tiny",
    img_size: _ImgSizeOption = None,
    full: Annotated[bool, typer.Option("--full", help="Print the raw module tree.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same facts for machines.")] = False,
) -> None:
    """Show what a model is made of, and what vitviz can do with it. Downloads no weights."""
    with _importing():
        from vitviz.cli import model_view as console
        from vitviz.inspection import describe as anatomy
        from vitviz.models import building
        from vitviz.models.devices import describe_device, select_device
        from vitviz.models.names import resolve_name

    name = resolve_name(model)
    typer.echo(describe_device(select_device()), err=True)
    module = building.build_skeleton(name, _size(img_size))
    with _until_reader_leaves():
        if full:
            typer.echo(str(module))
        elif as_json:
            typer.echo(json.dumps(anatomy.describe(module, name).to_dict()))
        else:
            terminal = Console()
            with terminal.capture() as shown:  # Rich would leave by itself when the reader does
                console.show_model(anatomy.describe(module, name), terminal)
            typer.echo(shown.get(), nl=False)


@app.command()
def models(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="A word, or a pattern with * and ?.")
    ] = "*",
    supported: Annotated[
        bool, typer.Option("--supported", help="Only those that vitviz can explain.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List timm's models, with what vitviz can do with each."""
    with _importing():
        from vitviz.models.catalogue import find_models, survey_models

    names = find_models(pattern)
    if not names:
        raise OptionError(f"no model's name has {pattern!r}; try a part of it, like deit or dinov2")
    with _until_reader_leaves():
        for name, support in survey_models(names):
            if support.rollout or not supported:
                line = json.dumps({"name": name, **asdict(support)}) if as_json else None
                typer.echo(line or f"{name}: {support.describe()}")


@app.command()
@_with_options(RunOptions)
def rollout(
    run: RunOptions,
    head_fusion: Annotated[
        HeadFusion, typer.Option(metavar="mean|max|min", help="How heads become one map.")
    ] = HeadFusion.MAX,
    discard: _DiscardOption = 0.9,
    start_layer: _StartLayerOption = None,
) -> None:
    """Write attention rollout: what the tokens that the head reads have gathered from where.

    It knows no class.
    """
    method = MethodOptions(discard=discard, start_layer=start_layer, head_fusion=head_fusion)
    _explain(run, method)


@app.command()
@_with_options(RunOptions)
def grad_rollout(
    run: RunOptions,
    classes: _ClassOption = ("top1",),  # type: ignore[assignment]
    discard: _DiscardOption = 0.9,
    start_layer: _StartLayerOption = None,
) -> None:
    """Write gradient rollout: rollout of the attention that speaks for a class."""
    method = MethodOptions(
        method=Method.GRAD_ROLLOUT,
        classes=tuple(classes),
        discard=discard,
        start_layer=start_layer,
    )
    _explain(run, method)


@app.command()
@_with_options(RunOptions)
def relevance(
    run: RunOptions,
    classes: _ClassOption = ("top1",),  # type: ignore[assignment]
    classic: Annotated[
        bool, typer.Option("--classic", help="As in Chefer, Gur & Wolf, ICCV 2021, for comparing.")
    ] = False,
    start_layer: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Leave out the blocks before this one.",
            show_default="average over all; 0 if classic",
        ),
    ] = None,
) -> None:
    """Write relevance: the best outline of what the decision for a class rests on."""
    method = MethodOptions(
        method=Method.RELEVANCE,
        classes=tuple(classes),
        classic=classic,
        start_layer=start_layer,
    )
    _explain(run, method)


@app.command()
@_with_options(RunOptions)
def evidence(
    run: RunOptions,
    classes: _ClassOption = ("top1",),  # type: ignore[assignment]
    rule: Annotated[
        AttentionRule,
        typer.Option(
            metavar="value|shared",
            help="Let evidence pass attention by the values alone, or share it with queries and "
            "keys.",
        ),
    ] = AttentionRule.VALUE,
) -> None:
    """Write signed evidence: what speaks for a class (red), and what against it (blue)."""
    _explain(run, MethodOptions(method=Method.EVIDENCE, classes=tuple(classes), rule=rule))


@app.command()
@_with_options(RunOptions)
def attention(
    run: RunOptions,
    query: Annotated[
        str | None,
        typer.Option(
            metavar="ROW,COL",
            help="Show what this patch attends to, instead of what the head reads.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write raw attention: a contact sheet for each image, blocks by heads."""
    _explain(run, MethodOptions(method=Method.ATTENTION, query=_patch(query)))


@app.command()
@_with_options(EvaluationRun)
def evaluate(run: EvaluationRun) -> None:
    """Measure methods side by side: how faithful maps are, how well they locate, what they cost.

    Prints tables, or with --json one document.
    """
    _evaluate(run)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code.

    Exit codes: 0 all done, 1 an image failed, 2 nothing could be done, 130 and 143 interrupted.
    """
    try:
        sys.exit(app(args=arguments, prog_name="vitviz", standalone_mode=False) or 0)
    except _UsageError as error:
        if message := error.format_message().strip():  # empty when help was shown instead
            _complain(message)
        sys.exit(2)
    except VitvizError as error:
        _complain(str(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _forget(sys.stdout)
        _complain("no space left on the device that stdout goes to", code=1)


def _complain(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"Error: {printable(message)}", err=True)
    sys.exit(code)


def _explain(run: RunOptions, method: MethodOptions) -> None:
    """Do what an explaining command asks for."""
    from vitviz.runs.files import prepare_folder

    job = _job(run, method)
    found = _find(run)
    prepare_folder(run.output)
    reporter, model = _load(run, found)

    from vitviz.runs import pipeline
    from vitviz.runs import records as ledger

    with _until_reader_leaves(), Interruption() as interruption:
        try:
            warn = partial(reporter.say, style="yellow")
            results = interruption.between(pipeline.run(model, found.sources, job, warn=warn))
            reporter.show(results, len(found.sources), ledger.run_record(model, job))
        except OutputError as error:  # what went before is written: no reason to leave with 2
            _complain(str(error), code=1)
    raise typer.Exit(int(reporter.failed))


def _evaluate(run: EvaluationRun) -> NoReturn:
    """Do what ``evaluate`` asks for."""
    options = _evaluation_options(run)
    found = _find(run)
    reporter, model = _load(run, found)

    from vitviz.evaluation import annotations
    from vitviz.evaluation import files as exhibits
    from vitviz.evaluation import measuring as examination
    from vitviz.evaluation import summary as evaluation
    from vitviz.evaluation.tasks import annotated_images

    exhibits.require_places(run.csv, run.plot)
    truth = None
    if run.truth is not None:
        truth = annotations.read_truth(run.truth, model.labels, model.num_classes)
    subjects = annotated_images(found.sources, masks=run.masks, truth=truth)
    with _until_reader_leaves(), Interruption() as interruption:
        warn = partial(reporter.say, style="yellow")
        measured = examination.examine(
            model, subjects, options, warn=warn, advance=reporter.advance
        )
        kept: list[ImageScores] = []
        try:
            reporter.collect(interruption.between(measured), len(subjects), kept)
        finally:  # what was measured before an interruption is told, too
            if len(kept) == len(subjects) or any(each.cases for each in kept):
                result = evaluation.summarize(model, options, kept)
                _tell(reporter, result, run)
    raise typer.Exit(int(reporter.failed))


def _tell(reporter: Reporter, result: Evaluation, run: EvaluationRun) -> None:
    """Write what was measured to the files that are asked for, and show it."""
    from vitviz.evaluation import files as exhibits

    try:
        exhibits.save(result, run.csv, run.plot)
        reporter.present(result)
    except OutputError as error:  # it is measured: no reason to leave with 2
        _complain(str(error), code=1)


def _evaluation_options(run: EvaluationRun) -> EvaluationOptions:
    if len(run.targets) > 1:
        raise OptionError(
            f"--class is given {len(run.targets)} times; methods are measured on one class of each "
            "image, or with --class mask on all that its mask names"
        )
    return EvaluationOptions(
        methods=tuple(run.methods),
        target=run.targets[0],
        convention=run.convention,
        fit=run.fit,
        batch_size=_count(run.batch_size, "--batch-size"),
        workers=_count(run.workers, "--workers"),
        seed=run.seed,
        resamples=run.resamples,
    )


def _load(run: SharedOptions, found: _Found) -> tuple[Reporter, Model]:
    """Say what the work begins with, and load the model; only now torch, after all mistakes."""
    img_size = _size(run.img_size)
    with _importing():
        from vitviz.cli.reporter import Reporter
        from vitviz.models.devices import describe_device, select_device
        from vitviz.models.model import load_model

    reporter = Reporter(quiet=run.quiet, as_json=run.as_json, nul=run.nul)
    for argument in found.fruitless:
        reporter.say(f"no images in {argument}", "yellow")
    reporter.say(describe_device(select_device(run.device)))
    model = load_model(
        run.model,
        weights=run.weights,
        labels=run.labels,
        device=run.device,
        fit=run.fit,
        img_size=img_size,
        precision=run.precision,
    )
    for note in model.notes:
        reporter.say(note, "yellow")
    warnings.filterwarnings("ignore", module="PIL")  # of odd images: what matters is in a result
    return reporter, model


def _job(run: RunOptions, method: MethodOptions) -> Job:
    return Job(
        method=replace(method, refine=run.refine),
        pictures=PictureOptions(
            kinds=tuple(dict.fromkeys(run.save)),
            colormap=run.colormap,
            alpha=run.alpha,
            max_size=run.max_size,
        ),
        fit=run.fit,
        output=run.output,
        skip_existing=run.skip_existing,
        batch_size=_count(run.batch_size, "--batch-size"),
        workers=_count(run.workers, "--workers"),
    )


@dataclass(frozen=True)
class _Found:
    """The images of a call, and the arguments that gave none."""

    sources: list[Source]
    fruitless: list[str]


def _find(run: SharedOptions) -> _Found:
    """Find the images, and make sure that there are some."""
    from vitviz.images.sources import find_sources
    from vitviz.runs.files import read_provenance

    def own(path: Path) -> bool:
        """Tell whether an image found on the way is a picture that vitviz made."""
        return read_provenance(path) is not None

    arguments = list(_arguments(run.sources, "\0" if run.nul else "\n"))
    sources, fruitless = find_sources(arguments, skip=own)
    if not sources:
        where = ", ".join(fruitless) or "stdin"
        raise SourceError(f"nothing to do: no images in {where}; give images or folders of them")
    return _Found(sources, fruitless)


def _arguments(words: Iterable[str], separator: str) -> Iterator[str | Path]:
    """Yield the sources as typed, ``-`` replaced by the paths on stdin, which are no globs."""
    for word in words:
        if word == "-":
            paths = os.fsdecode(sys.stdin.buffer.read()).split(separator)
            yield from (Path(path) for path in paths if path)
        else:
            yield word


def _count(word: str, option: str) -> int | None:
    if word == "auto":
        return None
    try:
        return int(word)
    except ValueError:
        raise OptionError(f"{option} is {word!r}; give a number or auto") from None


def _size(word: str | None) -> tuple[int, int] | None:
    """Read "518" or "336x672" (height x width)."""
    if word is None:
        return None
    sides = re.fullmatch(r"([1-9]\d*)(?:[x×]([1-9]\d*))?", word)
    if not sides:
        raise OptionError(f"--img-size is {word!r}; give one side or HEIGHTxWIDTH, like 336x672")
    return int(sides[1]), int(sides[2] or sides[1])


def _patch(word: str | None) -> tuple[int, int] | None:
    """Read "3,5" (row, column)."""
    if word is None:
        return None
    places = re.fullmatch(r"(\d+),(\d+)", word)
    if not places:
        raise OptionError(f"--query is {word!r}; give the ROW,COL of a patch, like 3,5")
    return int(places[1]), int(places[2])


@contextmanager
def _importing() -> Iterator[None]:
    """Import torch and timm without looking for garbage among what they make: a fifth faster."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor later on: all of it is there to stay
        gc.enable()


@contextmanager
def _until_reader_leaves() -> Iterator[None]:
    """Leave quietly when whoever reads our results has left."""
    try:
        yield
    except BrokenPipeError:
        _forget(sys.stdout, sys.stderr)
        sys.exit(141)


def _forget(*streams: TextIO) -> None:
    """Drop what streams cannot tell any more, so that leaving does not fail over it."""
    from vitviz.cli.reporter import discard

    for stream in streams:
        discard(stream)
