"""What a row of the benchmark is and what it tells: figures beside their goals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

__all__ = ["Figure", "Goal", "Report", "Row", "Setting", "SkippedError"]

_Choice = TypeVar("_Choice")


class SkippedError(Exception):
    """A row cannot be measured here, and says why."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound that a figure should keep: at most the limit, or at least."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Tell whether a value keeps the bound."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        """Write the bound as people do."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number, measured in several rounds.

    Attributes:
        label: What it is.
        values: One for each round; none where it could not be measured.
        unit: "×" for ratios.
        goal: What it should be; None: nothing is asked of it.
    """

    label: str
    values: Sequence[float]
    unit: str = "×"
    goal: Goal | None = None

    def record(self) -> dict[str, Any]:
        """Return what is written down of it: the median is the figure."""
        middle = median(self.values) if self.values else None
        return {
            "label": self.label,
            "unit": self.unit,
            "median": middle,
            "min": min(self.values, default=None),
            "max": max(self.values, default=None),
            "rounds": len(self.values),
            "goal": str(self.goal) if self.goal else None,
            "met": None if self.goal is None or middle is None else self.goal.met(middle),
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a row found: its figures, and by name what explains them."""

    figures: Sequence[Figure]
    notes: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return what is written down of it."""
        return {"figures": [figure.record() for figure in self.figures], "notes": self.notes}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how thoroughly rows are measured.

    Attributes:
        folder: What rows share: photographs, weights, the files that they write.
        quick: Whether this is a trial, with fewer rounds and images.
    """

    folder: Path
    quick: bool = False

    def pick(self, full: _Choice, quick: _Choice) -> _Choice:
        """Choose between the measurement and the trial."""
        return quick if self.quick else full

    def rounds(self, full: int) -> int:
        """Return how many rounds to measure."""
        return self.pick(full, 2)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the benchmark.

    Attributes:
        name: What it is called on the command line.
        title: What it compares.
        measure: Measures it, in a process of its own.
        needs: Makes what it uses, beforehand and outside of that process.
        cuda: Whether it needs a CUDA device.
    """

    name: str
    title: str
    measure: Callable[[Setting], Report]
    needs: Sequence[Callable[[Setting], object]] = ()
    cuda: bool = False
