"""All methods by name; commands, Python functions and the names of ``evaluate`` follow from it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vitviz.errors import OptionError
from vitviz.methods.attention import RawAttention
from vitviz.methods.evidence import Evidence
from vitviz.methods.method import Method
from vitviz.methods.published import GradCam, LeGrad
from vitviz.methods.relevance import Relevance
from vitviz.methods.rollout import GradRollout, Rollout

__all__ = ["METHODS", "PUBLISHED", "NamedMethod", "method_names", "named_method", "variants"]

METHODS: dict[str, type[Method]] = {
    each.name: each for each in (Rollout, GradRollout, Relevance, Evidence, RawAttention)
}

PUBLISHED: dict[str, type[Method]] = {each.name: each for each in (LeGrad, GradCam)}
"""Methods of others that ``evaluate`` measures where they are named, and that have no command."""


@dataclass(frozen=True, kw_only=True)
class NamedMethod:
    """A method to measure, and what it is called in tables."""

    name: str
    method: Method


def variants() -> dict[str, Method]:
    """Return what ``evaluate`` sets side by side by default, by name."""
    return {name: made for each in METHODS.values() for name, made in each.variants().items()}


def method_names(words: Iterable[str]) -> tuple[str, ...]:
    """Part names of methods at the commas between them."""
    names = (name.strip() for word in words for name in word.split(","))
    return tuple(filter(None, names))


def named_method(name: str) -> NamedMethod:
    """Read the name of a method to measure; ``@2`` after one makes its maps twice as fine.

    Raises:
        OptionError: There is no such method.
    """
    known = variants() | {name: made() for name, made in PUBLISHED.items()}
    word, at, finer = name.partition("@")
    if word not in known or (at and not finer.isdecimal()):
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near and word not in known else ""
        raise OptionError(
            f"--methods {name} is unknown{hint}; choose among {', '.join(known)}, with @2 after "
            "one for maps twice as fine"
        )
    return NamedMethod(name=name, method=replace(known[word], refine=int(finer) if at else 1))
