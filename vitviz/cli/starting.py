"""What commands on images begin with: finding the images, cheap mistakes, loading the model."""

from __future__ import annotations

import gc
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vitviz.cli.options import SharedOptions
from vitviz.cli.surroundings import require_working_directory
from vitviz.errors import (
    ImageError,
    OptionError,
    SourceError,
    UnsupportedModelError,
    evidence_instead,
    printable,
)
from vitviz.models.names import DEFAULT

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.cli.reporter import Reporter
    from vitviz.images.sources import Source
    from vitviz.images.stores import StoredObject
    from vitviz.methods.method import Method
    from vitviz.models.model import Model

__all__ = [
    "Found",
    "find",
    "importing",
    "load",
    "read_count",
    "read_size",
    "refuse_cheap_mistakes",
    "require_known",
]


@dataclass(frozen=True)
class Found:
    """The images of a call, and the arguments that gave none."""

    sources: list[Source]
    fruitless: list[str]


def find(run: SharedOptions) -> Found:
    """Find the images, and make sure that there are some."""
    from vitviz.images.sources import find_sources
    from vitviz.runs.provenance import is_own_jpeg, read_provenance

    def own(path: Path) -> bool:
        """Tell whether an image found on the way is a picture that vitviz made."""
        return read_provenance(path) is not None or is_own_jpeg(path)

    require_working_directory()
    arguments = list(_arguments(run.sources, "\0" if run.nul else "\n"))
    sources, fruitless = find_sources(arguments, skip=own)
    if not sources:
        where = ", ".join(fruitless) or "stdin"
        raise SourceError(f"nothing to do: no images in {where}; give images or folders of them")
    return Found(sources, fruitless)


def _arguments(words: Iterable[str], separator: str) -> Iterator[str | Path | StoredObject]:
    """Yield the sources as typed; ``-`` and ``@LIST`` replaced by what they name, never globs."""
    from vitviz.images.lists import listed, read_list

    for word in words:
        if word == "-" and sys.stdin is None:
            raise SourceError("- means the paths on stdin, which is closed; give them another way")
        if word == "-":
            yield from listed(os.fsdecode(sys.stdin.buffer.read()).split(separator))
        elif word.startswith("@") and not os.path.lexists(word):
            yield from read_list(word[1:], separator)
        else:
            yield word


def refuse_cheap_mistakes(
    run: SharedOptions, sources: Sequence[Source], method: Method | None = None
) -> None:
    """Find what is sure to fail before torch is loaded and weights are looked for."""
    from vitviz.images.decoding import require_readable

    if run.model is not None:
        known = require_known(run.model)
        needing = method and any(each.needs_attention for each in method.members)
        if needing and known.get("stages"):
            raise UnsupportedModelError(evidence_instead(known["reason"]))
    if run.as_json:  # a record tells of the model, too
        return
    failures: list[str] = []
    for source in sources:
        try:
            require_readable(source)
        except ImageError as error:
            failures.append(f"failed: {source.name}: {error}")
        else:
            return  # one that can be read: the others fail in their turn
    for failure in failures:
        typer.echo(printable(failure), err=True)
    raise typer.Exit(1)


def require_known(model: str) -> dict[str, Any]:
    """Make sure, without timm, that it has a model of this name; if its names are known.

    Returns:
        What is known of it, the fields of its ``Support``; empty where nothing is.
    """
    from vitviz.models.census import known_models
    from vitviz.models.names import require_name

    known = known_models()
    return known.get(require_name(model, known), {}) if known else {}


def load(run: SharedOptions, found: Found, workplace: str = "") -> tuple[Reporter, Model]:
    """Say what the work begins with, and load the model; only now torch, after all mistakes.

    Args:
        run: The options.
        found: The images.
        workplace: Where the work will be done; empty: on the device.
    """
    from vitviz.cli.reporter import Reporter

    img_size = read_size(run.img_size)
    reporter = Reporter(quiet=run.quiet, as_json=run.as_json, nul=run.nul)
    for argument in found.fruitless:
        reporter.say(f"no images in {argument}", "yellow")
    with reporter.waiting("loading torch …"), importing():
        from vitviz.models.devices import describe_device, select_device
        from vitviz.models.model import load_model
        from vitviz.models.prompts import phrases

    reporter.say(workplace or describe_device(select_device(run.device)))
    name = run.model or (DEFAULT if run.weights is None else run.weights.name)
    with reporter.waiting(f"loading {name} …"):
        model = load_model(
            run.model,
            weights=run.weights,
            labels=run.labels,
            device=run.device,
            fit=run.fit,
            img_size=img_size,
            mean=run.mean,
            std=run.std,
            precision=run.precision,
            adapter=run.adapter,
            text_embeddings=run.text_embeddings,
            text=phrases(run.text, run.templates),
        )
    reporter.say(model.describe())
    for note in model.notes:
        reporter.say(note, "yellow")
    warnings.filterwarnings("ignore", module="PIL")  # of odd images: what matters is in a result
    return reporter, model


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and timm without looking for garbage among what they make: a fifth faster."""
    require_working_directory()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor later on: all of it is there to stay
        gc.enable()


def read_count(word: str, option: str) -> int | None:
    """Read a count, or "auto" as None."""
    if word == "auto":
        return None
    try:
        return int(word)
    except ValueError:
        raise OptionError(f"{option} is {word!r}; give a number or auto") from None


def read_size(word: str | None) -> tuple[int, int] | None:
    """Read "518" or "336x672" (height x width)."""
    if word is None:
        return None
    sides = re.fullmatch(r"([1-9]\d*)(?:[x×]([1-9]\d*))?", word)
    if not sides:
        raise OptionError(f"--img-size is {word!r}; give one side or HEIGHTxWIDTH, like 336x672")
    return int(sides[1]), int(sides[2] or sides[1])
