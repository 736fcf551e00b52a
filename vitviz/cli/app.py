"""The command line: commands and exit codes over the library; loads torch only to work."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperArgument, TyperCommand, TyperGroup

import vitviz
from vitviz.cli.comparing import CompareRun, compare_images
from vitviz.cli.completion import complete_models
from vitviz.cli.evaluation_options import EvaluationRun
from vitviz.cli.explaining import explain_images
from vitviz.cli.features import FeaturesRun, SimilarityRun, draw_features, draw_similarity
from vitviz.cli.leaving import complain, forget, until_reader_leaves
from vitviz.cli.mistakes import describe_mistake, refuse_one_dash
from vitviz.cli.options import MODEL_HELP, ImgSizeOption, RunOptions
from vitviz.cli.parameters import method_from, method_parameters, with_options
from vitviz.cli.starting import importing, read_size, require_known
from vitviz.cli.surroundings import make_do
from vitviz.errors import OptionError, VitvizError
from vitviz.methods.comparison import Comparison
from vitviz.methods.features import Features, Similarity
from vitviz.methods.method import Method
from vitviz.methods.table import METHODS

__all__ = ["app", "build_app", "main"]

_UsageError: Any = typer.BadParameter.__base__  # click's, wherever this typer keeps click

_BEGIN = "Begin with: vitviz inspect deit_tiny, then vitviz relevance img.jpg"
_FIRST = "relevance"  # of the commands that explain: what most people come for
_EXAMPLES = {
    "inspect": ("vitviz inspect deit_tiny", "vitviz inspect vit_base_patch14_dinov2 --full"),
    "models": ("vitviz models deit", "vitviz models 'vit_*' --supported"),
    "compare": (
        "vitviz compare photos/ --class top2",
        "vitviz compare img.jpg --class tabby --class tiger",
    ),
    "features": ("vitviz features photos/", "vitviz features photos/ --block 8 --save npy"),
    "similarity": (
        "vitviz similarity img.jpg --patch 3,5",
        "vitviz similarity img.jpg --patch 3,5 --to photos/ -m dinov2_small",
    ),
    "report": ("vitviz report", "vitviz report maps/"),
    "evaluate": (
        "vitviz evaluate photos/",
        "vitviz evaluate photos/ --masks masks/ --methods relevance --csv scores.csv",
    ),
}


def build_app() -> typer.Typer:
    """Build the commands, those that explain from the table of methods."""
    built = typer.Typer(
        name="vitviz",
        cls=_Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        help="See where a Vision Transformer looks: a heatmap PNG for each image.",
        epilog=_BEGIN,
    )
    built.callback()(_top)
    built.command("inspect", cls=_Command, epilog=_examples("inspect"))(_inspect)
    built.command("models", cls=_Command, epilog=_examples("models"))(_models)
    for name in dict.fromkeys((_FIRST, *METHODS)):
        method = METHODS[name]
        command = built.command(name, cls=_Command, help=method.help, epilog=_examples(name))
        command(_explaining(method))
    compare = built.command(
        "compare", cls=_Command, help=Comparison.help, epilog=_examples("compare")
    )
    compare(with_options(CompareRun, without="save")(compare_images))
    for name, drawn, run, act in (
        ("features", Features, FeaturesRun, draw_features),
        ("similarity", Similarity, SimilarityRun, draw_similarity),
    ):
        command = built.command(name, cls=_Command, help=drawn.help, epilog=_examples(name))
        command(with_options(run, method_parameters(drawn))(act))
    built.command("report", cls=_Command, epilog=_examples("report"))(_report)
    evaluate = built.command("evaluate", cls=_Command, epilog=_examples("evaluate"))
    evaluate(with_options(EvaluationRun)(_evaluate))
    return built


class _Quiet:
    """Leaves Typer's words for the types of switches and arguments (``<bool>``) out of the help."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, those without a word for their values without a type."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for each in params:
            if isinstance(each, TyperArgument) or not each.metavar:
                each.display_type_rich = lambda ctx: None
        return params


class _Command(_Quiet, TyperCommand):
    """A command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command."""
        refuse_one_dash(args, [option for each in self.params for option in each.opts])
        return super().parse_args(ctx, args)


class _Group(_Quiet, TyperGroup):
    """All commands."""


def _examples(command: str) -> str:
    """Return two examples of a command, for the end of its help."""
    both = _EXAMPLES.get(command) or (
        f"vitviz {command} img.jpg",
        f"vitviz {command} photos/ -m vit_small --save panel -o maps",
    )
    return "Examples:\n\n" + "\n\n".join(f"  {each}" for each in both)


def _explaining(method: type[Method]) -> Callable[..., None]:
    """Make the command of a method: its own options, and those that all share."""

    def command(run: RunOptions, **values: Any) -> None:
        explain_images(run, method_from(method, values))

    return with_options(RunOptions, method_parameters(method))(command)


def _report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Folder that maps were written to, or a table written by --records.",
        ),
    ] = Path("vitviz-out"),
    opened: Annotated[bool, typer.Option("--open", help="Open it.")] = False,
) -> None:
    """Write FOLDER/report.html, a page to look at all maps in a folder. Loads no model."""
    from vitviz.cli.reporting import report_folder  # which the other commands need not know

    report_folder(folder, opened=opened)


def _evaluate(run: EvaluationRun) -> None:
    """Measure methods side by side: how faithful maps are, how well they locate, what they cost.

    Prints tables, or with --json one document.
    """
    from vitviz.cli.evaluating import evaluate_images  # which the other commands need not know

    evaluate_images(run)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitviz {vitviz.__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """See where a Vision Transformer looks: a heatmap PNG for each image."""


def _inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_models)
    ] = "deit_tiny",
    img_size: ImgSizeOption = None,
    full: Annotated[bool, typer.Option("--full", help="Print the raw module tree.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
) -> None:
    """Show what a model is made of, and what vitviz can do with it. Downloads no weights."""
    require_known(model)
    with importing():
        from vitviz.cli.model_view import show_model
        from vitviz.inspection.describe import describe
        from vitviz.models.building import build_skeleton
        from vitviz.models.devices import describe_device, select_device
        from vitviz.models.names import resolve_name

    name = resolve_name(model)
    typer.echo(describe_device(select_device()), err=True)
    module = build_skeleton(name, read_size(img_size))
    with until_reader_leaves():
        if full:
            typer.echo(str(module))
        elif as_json:
            typer.echo(json.dumps(describe(module, name).to_dict()))
        else:
            terminal = Console()
            with terminal.capture() as shown:  # Rich would leave by itself when the reader does
                show_model(describe(module, name), terminal)
            typer.echo(shown.get(), nl=False)


def _models(
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN",
            help="Part of a name, or a pattern with * and ?.",
            autocompletion=complete_models,
        ),
    ] = "*",
    supported: Annotated[
        bool,
        typer.Option(
            "--supported",
            help="List only models that vitviz can explain, some if their weights pass a check.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line.")
    ] = False,
) -> None:
    """List timm's models, with what vitviz can do with each."""
    with importing():
        from vitviz.models.catalogue import find_models, survey_models

    names = find_models(pattern)
    if not names:
        raise OptionError(f"no model's name has {pattern!r}; try a part of it, like deit or dinov2")
    with until_reader_leaves():
        for name, support in survey_models(names):
            if support.any or not supported:
                line = json.dumps({"name": name, **asdict(support)}) if as_json else None
                typer.echo(line or f"{name}: {support.describe()}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code.

    Exit codes: 0 all done, 1 an image failed, 2 nothing could be done, 130 and 143 interrupted.
    """
    make_do()
    try:
        sys.exit(build_app()(args=arguments, prog_name="vitviz", standalone_mode=False) or 0)
    except _UsageError as error:
        if message := describe_mistake(error, sys.argv[1:] if arguments is None else arguments):
            complain(message)  # else help was shown instead
        sys.exit(2)
    except VitvizError as error:
        complain(str(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        forget(sys.stdout)
        complain("no space left on the device that stdout goes to", code=1)


app = build_app()
