"""See where a Vision Transformer looks.

Example:
    >>> import vitviz
    >>> model = vitviz.load_model("deit_tiny")
    >>> maps = vitviz.rollout(model, ["cat.jpg", "dog.jpg"], discard=0.9)
    >>> maps[0].relevance  # float32 (rows, cols)
    >>> maps[0].overlay()  # a Pillow image, which shows itself in a notebook

Importing this package loads no torch; the first use of a name does.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AttentionRule": "vitviz.options",
    "Convention": "vitviz.options",
    "Evaluation": "vitviz.evaluation.summary",
    "Explanation": "vitviz.explaining.explanation",
    "Fit": "vitviz.options",
    "Foreground": "vitviz.options",
    "HeadFusion": "vitviz.options",
    "Model": "vitviz.models.model",
    "PictureOptions": "vitviz.options",
    "Prediction": "vitviz.explaining.explanation",
    "ResidualRule": "vitviz.options",
    "VitvizError": "vitviz.errors",
    "attention": "vitviz.api",
    "compare": "vitviz.comparing_api",
    "evaluate": "vitviz.api",
    "explain_samples": "vitviz.api",
    "load_samples": "vitviz.api",
    "evidence": "vitviz.api",
    "features": "vitviz.features_api",
    "grad_rollout": "vitviz.api",
    "grid": "vitviz.api",
    "load_model": "vitviz.api",
    "relevance": "vitviz.api",
    "similarity": "vitviz.features_api",
    "rollout": "vitviz.api",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
