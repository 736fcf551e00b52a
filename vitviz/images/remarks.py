"""What people should know of images that are explained all the same, and how it is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["Remark", "Tally"]


@dataclass(frozen=True)
class Remark:
    """Something to know of an image, or of a map of it.

    Attributes:
        what: What it is about, the same for all images; these are counted.
        why: Why that is, or what to do; told of the first one.
    """

    what: str
    why: str


class Tally:
    """Counts remarks, to tell each once."""

    def __init__(self) -> None:
        """Begin with none."""
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], tuple[str, str]] = {}

    def add(self, remarks: Iterable[Remark], unit: str, name: str) -> None:
        """Count remarks.

        Args:
            remarks: Of one image or map.
            unit: "image" or "map".
            name: Of the image.
        """
        for remark in remarks:
            key = (remark.what, unit)
            self._counts[key] += 1
            self._first.setdefault(key, (name, remark.why))

    def update(self, other: Tally) -> None:
        """Add what another one has counted."""
        self._counts.update(other._counts)
        self._first = {**other._first, **self._first}

    def tell(self, warn: Callable[[str], None]) -> None:
        """Say once for each reason how many there were, and which was the first."""
        for (what, unit), count in self._counts.items():
            name, why = self._first[what, unit]
            units = f"1 {unit}" if count == 1 else f"{count} {unit}s"
            warn(f"{what} in {units}, the first of {name}: {why}")
