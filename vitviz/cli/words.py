"""Numbers, shapes and layers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from vitviz.inspection.parts import Layer

__all__ = [
    "UNKNOWN",
    "layer_channels",
    "layer_list",
    "percentage",
    "short_count",
    "shape_text",
    "size_text",
]


UNKNOWN = "not determined"


def layer_list(layers: Sequence[Layer]) -> str:
    """Write "LayerNorm (norm1, norm2)" for layers of one class or several."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer.name)
    return ", ".join(f"{kind} ({', '.join(names)})" for kind, names in kinds.items())


def layer_channels(layer: Layer, name: str | None = None) -> str:
    """Name a layer with its channels."""
    return f"{layer.name if name is None else name} {layer.inputs} → {layer.outputs}".strip()


def short_count(count: int) -> str:
    """Write a count with three figures: 950, 12.3 k, 5.72 M, 1.14 G."""
    value = float(count)
    # The bounds are where rounding would give a fourth figure: 999.5 reads 1.00 k, not 1000.
    for unit in ("", " k", " M", " G", " T"):
        if value < 999.5 or unit == " T":
            break
        value /= 1000
    digits = 0 if not unit else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{unit}"


def percentage(share: float) -> str:
    """Write a share as a percentage."""
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def shape_text(sizes: Sequence[int]) -> str:
    """Write a shape in parentheses."""
    return f"({', '.join(map(str, sizes))})"


def size_text(sizes: Sequence[int]) -> str:
    """Write sizes with × between them."""
    return "×".join(map(str, sizes))
