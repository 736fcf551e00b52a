"""What the shell offers at a Tab, without loading torch."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["complete_devices", "complete_methods", "complete_models"]


def complete_models(incomplete: str) -> list[str]:
    """Return the names of models that begin so: aliases first, then timm's."""
    from vitviz.models.census import known_models
    from vitviz.models.names import ALIASES

    return _beginning(incomplete, ["demo", *ALIASES, *known_models()])


def complete_methods(incomplete: str) -> list[str]:
    """Return the names that ``evaluate`` takes for methods and that begin so."""
    from vitviz.methods.table import PUBLISHED, variants

    return _beginning(incomplete, [*variants(), *PUBLISHED])


def complete_devices(incomplete: str) -> list[str]:
    """Return the devices that begin so."""
    return _beginning(incomplete, ["auto", "cpu", "cuda", "cuda:1", "mps"])


def _beginning(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
