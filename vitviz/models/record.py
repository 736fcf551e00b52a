"""What records and files say of a model: plain data that outlives the model and can be pickled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import vitviz

__all__ = ["ModelRecord", "versions"]


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What a sink of explanations needs to know of the model.

    Attributes:
        name: The model's name, with the tag of its weights.
        weights: Where the weights come from, in words.
        weights_sha256: Digest of the weights, as they are computed with.
        score_kind: How scores are made from logits: "softmax" or "sigmoid".
        dtype: What the weights are made of: "float32".
        preprocessing: What the model expects of its images, field by field.
        labels_source: Where the names of its classes come from, in words.
        labels_digest: Digest of these names.
        versions: Of vitviz, timm and torch.
    """

    name: str
    weights: str
    weights_sha256: str
    score_kind: str
    dtype: str
    preprocessing: dict[str, Any]
    labels_source: str
    labels_digest: str
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import timm
    import torch

    return {
        "vitviz": vitviz.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
    }
