"""What a folder has → one page without any network; draws nothing itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import vitviz
from vitviz.errors import SourceError, printable
from vitviz.options import Colormap
from vitviz.pictures.colors import color_heat
from vitviz.report.collecting import FoundImage, FoundMap, address, find_images
from vitviz.report.failures import Failure
from vitviz.report.files import FILES, GENERATOR, PAGE, Picture, prepare, put

__all__ = ["write_page"]

_SCRIPTS = ("heat.js", "gallery.js", "viewer.js")
_DIGEST = 12  # digits of a SHA-256 that people compare
_LEVELS = 256  # of a colour table; the page draws what lies between


def write_page(folder: Path) -> Path:
    """Write the page of all maps in a folder, and return where it is.

    Raises:
        SourceError: There are none.
        OutputError: Something else is in its place, or it cannot be written.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder; give the one that maps were written to")
    table = folder if folder.suffix == ".parquet" else None
    if table is not None:  # whose readers take every file in it for a part
        folder = table.with_suffix(".report")
    images, failures = find_images(folder, table)
    if not images and not failures:
        raise SourceError(
            f"no maps in {folder}; give a folder that vitviz wrote PNG or npy files to"
        )
    prepare(folder)
    content = _render(folder, images, failures)
    return put(folder, PAGE, content.encode("utf-8", "replace"))


def _render(folder: Path, images: list[FoundImage], failures: list[Failure]) -> str:
    """Fill the template; whatever comes from outside is escaped, and scripts are known by digest.

    A page from disk may load nothing but files beside it: the policy names no host.
    """
    script = Markup("\n".join(_text(name) for name in _SCRIPTS))
    style = Markup(_text("report.css"))
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' file: {_digest(script)}",
            f"style-src {_digest(style)}",
            "img-src 'self' file:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_text("page.html"))
    return template.render(
        generator=Markup(GENERATOR),
        policy=policy,
        style=style,
        script=script,
        title=printable(folder.absolute().name),
        version=vitviz.__version__,
        data=_index(folder, images, failures),
        runs=_runs(images),
        failures=_failures(failures),
        count=len(images),
    )


def _index(folder: Path, images: list[FoundImage], failures: list[Failure]) -> dict[str, Any]:
    """Return what the page knows of all images; numbers of maps are in scripts of their own."""
    words = _Words()
    every = (each for image in images for each in image.maps)
    # One that the page draws itself, if there is one: others have no heat on the first sight.
    newest = max(every, key=lambda each: (each.stored is not None, each.time), default=None)
    method = newest.provenance.recipe.get("method") if newest else None
    maps = [each.provenance.recipe for image in images for each in image.maps]
    requests = {each.get("method"): each.get("class") for each in reversed(maps)}  # the first
    sizes = [each.size for each in images if each.size]
    return {
        "files": FILES,
        "colormaps": {each.value: _table(each) for each in Colormap},
        "aspect": median(width / height for height, width in sizes) if sizes else 1,
        "images": [_image(folder, each, words) for each in images],
        "newest": (words.place(method), requests.get(method)),
        "failures": _failures(failures),
        "words": words.all,  # last: the others fill it
    }


def _failures(failures: Iterable[Failure]) -> list[dict[str, Any]]:
    """Return what failed, each image once for each reason."""
    methods: dict[tuple[str, str], list[str]] = {}
    for each in failures:
        methods.setdefault((each.source, each.error), []).append(each.method)
    return [
        {"name": printable(source), "methods": its, "error": error}
        for (source, error), its in methods.items()
    ]


class _Words:
    """Keeps each text once, since labels and caveats come back in every image."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, word: str | None) -> int | None:
        if word is None:
            return None
        if word not in self._places:
            self._places[word] = len(self.all)
            self.all.append(word)
        return self._places[word]


def _image(folder: Path, image: FoundImage, words: _Words) -> dict[str, Any]:
    names = Picture(image.source_id)
    return {
        "name": printable(image.provenance.source),
        "size": image.size,
        "picture": names.picture if image.size else None,
        "thumbnail": names.thumbnail if image.size else None,
        "original": image.is_original,
        "predictions": [
            (each.class_index, words.place(each.class_label), _short(each.score))
            for each in image.provenance.predictions
        ],
        "maps": [_map(folder, each, words) for each in image.maps],
    }


def _map(folder: Path, found: FoundMap, words: _Words) -> dict[str, Any]:
    provenance, stored = found.provenance, found.stored
    entry = {
        "id": found.name,
        "method": words.place(str(provenance.recipe.get("method"))),
        "request": provenance.recipe.get("class"),
        "class": provenance.class_index,
        "label": words.place(provenance.class_label),
        "versus": provenance.versus_index,
        "versusLabel": words.place(provenance.versus_label),
        "caveats": [words.place(": ".join(each)) for each in found.caveats],
        "files": {kind: address(folder, path) for kind, path in found.files.items()},
        "picture": address(folder, found.picture) if found.picture else None,
    }
    if stored is not None:
        low, high = stored.range
        entry |= {
            "range": (_short(low), _short(high)),
            "signed": stored.is_signed,
            "colormap": stored.colormap,
            "alpha": stored.alpha,
            "score": _short(stored.score),
            "versusScore": _short(stored.versus_score),
        }
    left_out = (None, False)  # and no list without entries: by identity, since a class may be 0
    return {
        key: value
        for key, value in entry.items()
        if value != [] and not any(value is each for each in left_out)
    }


def _runs(images: Iterable[FoundImage]) -> list[dict[str, Any]]:
    """Return what made the maps, each once, with how many it made."""
    runs: dict[str, dict[str, Any]] = {}
    for image in images:
        for each in image.maps:
            recipe, versions = each.provenance.recipe, each.provenance.versions
            options = recipe.get("options", {})
            told = {
                "model": str(recipe.get("model")),
                "digest": str(recipe.get("weights_sha256")),
                "method": str(recipe.get("method")),
                "options": _told({**options, "fit": recipe.get("fit")}),
                "versions": _told(versions),
            }
            run = runs.setdefault(repr(told), {**told, "maps": 0})
            run["maps"] += 1
    return list(runs.values())


def _told(value: Any) -> str:
    """Spell a value of a recipe for people."""
    if isinstance(value, dict):
        told = {name: _told(each) for name, each in value.items() if each not in (None, False)}
        return ", ".join(name if value[name] is True else f"{name} {told[name]}" for name in told)
    if isinstance(value, (list, tuple)):
        return " ".join(map(_told, value))
    text = str(value)
    return text[:_DIGEST] if len(text) == 64 and text.isalnum() else text


def _table(colormap: Colormap) -> str:
    """Return the colours of a colormap: base64 of RGB, from the first to the last."""
    ramp = np.linspace(0, 1, _LEVELS, dtype=np.float32)[None]
    return base64.b64encode(color_heat(ramp, colormap).tobytes()).decode("ascii")


def _short(number: float | None) -> float | None:
    """Drop the digits that nobody sees."""
    return None if number is None else float(f"{number:.6g}")


def _text(name: str) -> str:
    return (resources.files("vitviz.report") / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    found = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode("ascii")
    return f"'sha256-{found}'"
