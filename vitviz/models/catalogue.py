"""What vitviz can do with a model, in one line, and with all that timm has."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

import vitviz
from vitviz.errors import UnsupportedModelError
from vitviz.models.building import build_skeleton
from vitviz.models.census import known_models, read_answers, write_census, written_answers
from vitviz.models.layouts import read_any_layout
from vitviz.models.preprocessing import preprocessing_of
from vitviz.models.stages import StageLayout
from vitviz.models.structure import has_classifier
from vitviz.models.tokens import Readout

__all__ = ["Support", "find_models", "judge", "main", "support_of", "survey_models"]


@dataclass(frozen=True, kw_only=True)
class Support:
    """What vitviz will do with the model.

    Attributes:
        rollout: Whether attention rollout is defined for it, and raw attention.
        grad_rollout: Whether gradient attention rollout is, and all that explains a class.
        stages: Number of stages, of a model that evidence alone explains; None for others.
        reason: Why not, where one is not.
        readout: Which tokens the relevance is read for.
        prefix: Its prefix tokens in words.
        grid: (rows, cols) of the maps.
    """

    rollout: bool
    grad_rollout: bool
    reason: str | None = None
    readout: str | None = None
    prefix: str | None = None
    grid: tuple[int, int] | None = None
    stages: int | None = None

    @property
    def any(self) -> bool:
        """Whether any method is defined for it."""
        return self.rollout or bool(self.stages)

    def describe(self) -> str:
        """Say it in one line."""
        rows, cols = self.grid or (0, 0)
        if self.stages:
            where = f"{self.stages} stages; maps of {rows} × {cols} cells"
            return f"evidence only, from {where}, if its weights pass a check: {self.reason}"
        if not self.rollout:
            return f"not supported: {self.reason}"
        pooled = self.readout == Readout.ATTENTION_POOLING.value
        what = "its tokens by attention pooling" if pooled else f"the {self.readout}"
        reads = f"reads {what} (prefix tokens: {self.prefix})"
        maps = f"maps of {rows} × {cols} patches"
        if self.grad_rollout:
            return f"{reads}; {maps}; all methods supported"
        some = "rollout, attention, features and similarity"
        return f"{reads}; {maps}; only {some} supported: {self.reason}"


def support_of(module: nn.Module, input_size: tuple[int, int]) -> Support:
    """Find out what vitviz can do with a model.

    Args:
        module: The model, with or without weights.
        input_size: (height, width) of its images.
    """
    try:
        layout = read_any_layout(module, input_size)
    except UnsupportedModelError as error:
        return Support(rollout=False, grad_rollout=False, reason=str(error))
    has_logits = has_classifier(module)
    if isinstance(layout, StageLayout):
        return Support(
            rollout=False,
            grad_rollout=False,
            reason=layout.reason,
            grid=layout.grid if has_logits else None,
            stages=layout.blocks if has_logits else None,
        )
    return Support(
        rollout=True,
        grad_rollout=has_logits,
        reason=None if has_logits else "no classifier, so no logit to explain",
        readout=layout.readout.value,
        prefix=layout.described_prefix(),
        grid=layout.grid,
    )


def judge(name: str) -> Support:
    """Build one of timm's models without weights, and find out what vitviz can do with it."""
    module = build_skeleton(name)
    return support_of(module, preprocessing_of(module).size)


def find_models(pattern: str = "*") -> list[str]:
    """List timm's model names: those that match a pattern with wildcards, or contain a word."""
    wanted = pattern if any(char in pattern for char in "*?[") else f"*{pattern}*"
    return fnmatch.filter(timm.list_models(), wanted.lower())


def survey_models(names: list[str]) -> Iterator[tuple[str, Support]]:
    """Yield what vitviz can do with each of timm's models.

    The answers for the timm that this version was made with are shipped; for another one, models
    are built as they are asked for, and the answers kept in the user's cache.

    Args:
        names: From ``find_models``.
    """
    known = _supports(known_models(timm.__version__))
    cache = _cache_file()
    known |= _remembered(cache)
    learned = {}
    try:
        for name in names:
            if name not in known:
                known[name] = learned[name] = judge(name)
            yield name, known[name]
    finally:
        if learned:
            _remember(cache, learned)


def _remembered(cache: Path) -> dict[str, Support]:
    """Read the user's cache, if it is there, whole, and for the timm at hand."""
    try:
        text = cache.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    return _supports(read_answers(text, timm.__version__))


def _supports(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Support]:
    try:
        return {name: _support(fields) for name, fields in answers.items()}
    except TypeError:  # damaged: learn them again
        return {}


def _support(fields: Mapping[str, Any]) -> Support:
    grid = fields.get("grid")
    return Support(**{**fields, "grid": tuple(grid) if grid else None})


def _remember(cache: Path, learned: dict[str, Support]) -> None:
    before = _remembered(cache)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(_written(before | learned), encoding="utf-8")
    except OSError:
        pass  # a cache that cannot be written costs time, no more


def _written(answers: Mapping[str, Support]) -> str:
    fields = {
        name: {key: value for key, value in asdict(support).items() if value is not None}
        for name, support in answers.items()
    }
    return written_answers(fields, timm.__version__)


def _cache_file() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "vitviz" / f"census-{vitviz.__version__}.json"


def main() -> None:
    """Judge every model that timm has, and write the answers that are shipped."""
    answers = {name: judge(name) for name in find_models()}
    write_census(_written(answers), Path(__file__).parent)


if __name__ == "__main__":
    main()
