"""The shipped answers to what vitviz can do with each of timm's models; loads no torch."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

__all__ = ["Answers", "known_models", "read_answers", "write_census", "written_answers"]

Answers = dict[str, dict[str, Any]]
"""Of each model's name the fields of its ``Support``, without those that are None."""

_CENSUS = "census.json.gz"  # the answers for one version of timm


def known_models(timm_version: str | None = None) -> Answers:
    """Return the shipped answers; none if they are for another version of timm.

    Args:
        timm_version: The version that answers are wanted for; None: the one installed.
    """
    packed = resources.files("vitviz.models").joinpath(_CENSUS).read_bytes()
    wanted = timm_version or metadata.version("timm")  # without importing it
    return read_answers(gzip.decompress(packed).decode(), wanted)


def read_answers(text: str, timm_version: str) -> Answers:
    """Read answers, if they are for this version of timm and whole."""
    try:
        content = json.loads(text)
        if content["timm"] != timm_version:
            return {}
        return {name: dict(fields) for name, fields in content["models"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged
        return {}


def written_answers(answers: Mapping[str, Mapping[str, Any]], timm_version: str) -> str:
    """Return answers as text that ``read_answers`` reads."""
    models = {name: dict(fields) for name, fields in sorted(answers.items())}
    return json.dumps({"timm": timm_version, "models": models}, indent=0) + "\n"


def write_census(text: str, folder: Path) -> None:
    """Write the file that is shipped; the same answers give the same bytes."""
    (folder / _CENSUS).write_bytes(gzip.compress(text.encode(), mtime=0))
