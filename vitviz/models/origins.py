"""What a weights file says of the model that it was trained as; builds and checks nothing."""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitviz.errors import OptionError
from vitviz.models.adapters import Adapter
from vitviz.models.names import ALIASES
from vitviz.models.translation import read_config, stated_architecture
from vitviz.models.weight_files import WeightFile

__all__ = ["Statement", "disagreement", "model_stated"]


_KEYS = ("arch", "architecture", "model_name", "model")
_MOST_NESTED = 3


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What one place says.

    Attributes:
        name: timm's name of the model, with a tag where one is said.
        where: Which place that is.
        model: What to build, where it is more than the name.
    """

    name: str
    where: str
    model: str = ""

    @property
    def architecture(self) -> str:
        """The name without its tag."""
        return self.name.partition(".")[0]


def model_stated(file: WeightFile | Adapter) -> Statement:
    """Return the model that a file was trained as, by all that it says; or an adapter, on.

    Raises:
        OptionError: It says nothing, or of two models.
        WeightsError: It cannot be read.
    """
    if isinstance(file, Adapter):
        return _base(file)
    stated = list(_statements(file))
    if not stated:
        raise OptionError(
            f"{file.path} says nowhere which model it is for: no name of timm's in its metadata, "
            f"in a config.json beside it or in its name; name it with -m NAME --weights {file.path}"
        )
    for other in stated[1:]:
        if other.architecture != stated[0].architecture:
            raise OptionError(
                f"{file.path} is {stated[0].name} by {stated[0].where} and {other.name} by "
                f"{other.where}; name the right one with -m NAME --weights {file.path}"
            )
    return max(stated, key=lambda each: (bool(each.model), "." in each.name))


def _base(adapter: Adapter) -> Statement:
    if not adapter.base:
        raise OptionError(
            f"{adapter.path} says nowhere which model it was trained on (base_model_name_or_path); "
            f"name it with -m NAME --adapter {adapter.path.parent}"
        )
    on_hub = "/" in adapter.base and not Path(adapter.base).is_dir()
    model = f"hf-hub:{adapter.base}" if on_hub else adapter.base
    return Statement(name=model, where="its base_model_name_or_path")


def disagreement(file: WeightFile, name: str) -> str:
    """Say where a weights file speaks of another model; empty where it speaks of none other.

    Args:
        file: The file.
        name: timm's name of the model that is to get the weights, with the tag of its config.
    """
    architecture, _, tag = name.partition(".")
    for each in _statements(file):
        its_tag = each.name.partition(".")[2]
        if each.architecture != architecture or (tag and its_tag and tag != its_tag):
            return (
                f"{file.path} is {each.name} by {each.where}, but it is loaded as {name}: if its "
                "weights only happen to fit, or were trained with other means, maps and scores "
                "are wrong"
            )
    return ""


def _statements(file: WeightFile) -> Iterator[Statement]:
    import timm

    known = frozenset(timm.list_models())
    for key, name in _named(file.content):
        if found := _known(name, known):
            yield Statement(name=found, where=f"its metadata ({key})")
    yield from _configured(file, known)
    if name := _in_text(file.path.name, known):
        yield Statement(name=name, where="its file's name")


def _named(content: Mapping[Any, Any], depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield what is written where trainers write a model's name."""
    for key, value in content.items():
        if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
            value = vars(value)
        if key in _KEYS and isinstance(value, str):
            yield str(key), value
        elif isinstance(value, Mapping) and depth < _MOST_NESTED:
            yield from _named(value, depth + 1)


def _configured(file: WeightFile, known: Collection[str]) -> Iterator[Statement]:
    """Yield what a model folder's config says, of which such a file is a part."""
    path = file.path.with_name("config.json")
    config = read_config(path)
    if theirs := stated_architecture(config):
        model = f"local-dir:{path.parent}"
        yield Statement(name=theirs, where="the config.json beside it", model=model)
    if found := _known(config.get("architecture"), known):
        described = config.get("pretrained_cfg")
        tag = described.get("tag") if isinstance(described, dict) else None
        yield Statement(
            name=f"{found.partition('.')[0]}.{tag}" if isinstance(tag, str) and tag else found,
            where="the config.json beside it",
            model=f"local-dir:{path.parent}",
        )


def _known(name: object, known: Collection[str]) -> str:
    """Return a name as timm writes it; empty where it is none of timm's."""
    if not isinstance(name, str):
        return ""
    # No aliases of ours: DINO's vit_small, say, is another model than the one that we call so.
    name = name.removeprefix("hf_hub:").removeprefix("timm/")
    return name if name.partition(".")[0] in known else ""


def _in_text(text: str, known: Collection[str]) -> str:
    """Find the one name of timm's in a file's name, with its tag; an alias only at its start."""
    import timm

    if alias := re.match(rf"({'|'.join(ALIASES)})(?=[.-])", text):
        return ALIASES[alias[1]]
    found = [
        name
        for name in known
        if name in text and re.search(rf"(?<![a-zA-Z0-9]){name}(?![a-zA-Z0-9])", text)
    ]
    longest = [name for name in found if not any(name in other for other in found if other != name)]
    if len(longest) != 1:
        return ""
    full = [each for each in timm.list_models(f"{longest[0]}.*", pretrained=True) if each in text]
    return max(full, key=len, default=longest[0])
