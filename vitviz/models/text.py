"""Text as classes: embeddings of prompts from a file, and the head that compares images with them.

CLIP and SigLIP score a prompt by the cosine of its embedding with the image's, times a factor that
they have learnt, plus, in SigLIP, a number that they have learnt as well.

Sources: Radford et al. 2021 (arXiv 2103.00020), also for the average over templates; Zhai et al.
2023, "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitviz.errors import OptionError, WeightsError
from vitviz.models.unwrapping import named_tensors
from vitviz.models.weight_files import WeightFile

__all__ = ["TextEmbeddings", "read_text_embeddings", "with_learnt_scale", "with_text"]


_SCALE, _BIAS = "logit_scale", "logit_bias"
_SCALES = {_SCALE: "scale", _BIAS: "bias", "t": "scale", "b": "bias"}  # and big_vision's words
_USUAL_SCALE = 100.0  # where CLIP's training stops, as nearly all of its models have done
_HINT = (
    "expected an array of numbers for each name, (width) or (templates, width), or `vectors` "
    "(names, width) and `names`"
)
_TINY = 1e-12  # so that nothing is divided by 0


@dataclass(frozen=True, kw_only=True, eq=False)
class TextEmbeddings:
    """Prompts, and where they lie among images.

    Attributes:
        names: A prompt or a word for each class.
        vectors: (classes, width), float32, each of length 1.
        source: Where they come from, in words.
        scale: What cosines are multiplied with; None where that is unknown.
        bias: What is added to that; None of models that add nothing, whose classes exclude each
            other.
    """

    names: tuple[str, ...]
    vectors: Tensor
    source: str
    scale: float | None = None
    bias: float | None = None

    def describe(self) -> str:
        """Say in one line what the classes are and how they are scored."""
        count = f"{len(self.names)} prompt{'s' if len(self.names) > 1 else ''}"
        scale = _USUAL_SCALE if self.scale is None else self.scale
        bias = "" if self.bias is None else f" {'+' if self.bias >= 0 else '-'} {abs(self.bias):g}"
        assumed = "" if self.scale is not None else f", as {_SCALE} is not given"
        return f"{self.source}: {count} as classes, scored by cosine × {scale:g}{bias}{assumed}"


def read_text_embeddings(path: Path) -> TextEmbeddings:
    """Read a safetensors or npz file of names and vectors.

    ``logit_scale`` and ``logit_bias`` are read where they are there, as models keep them: the
    first is the logarithm of the factor.

    Raises:
        OptionError: It is not there, or holds other things.
        WeightsError: It cannot be read.
    """
    if not path.is_file():
        raise OptionError(f"--text-embeddings {path} is not a file; give a .safetensors or .npz")
    content = dict(WeightFile(path).content)
    scales = {
        key: _number(path, key, content.pop(key)) for key in (_SCALE, _BIAS) if key in content
    }
    named = list(_named_vectors(path, content))
    names = tuple(name.strip() for name, _ in named)
    if not names or len(set(names)) < len(names) or not all(names):
        found = "two vectors of one name, or one without" if names else "no vectors"
        raise OptionError(f"--text-embeddings {path} has {found}; {_HINT}")
    vectors = [_mean_direction(path, name, vector) for name, vector in named]
    if len(widths := {len(vector) for vector in vectors}) > 1:
        raise OptionError(f"--text-embeddings {path} has vectors of {sorted(widths)} numbers")
    return TextEmbeddings(
        names=names,
        vectors=torch.stack(vectors),
        source=str(path),
        scale=_exponential(str(path), scales[_SCALE]) if _SCALE in scales else None,
        bias=scales.get(_BIAS),
    )


def with_learnt_scale(text: TextEmbeddings, weights: WeightFile | None) -> TextEmbeddings:
    """Take what a model has learnt to scale cosines by from its weights file, if it is there."""
    if text.scale is not None or weights is None:
        return text
    learnt: dict[str, float] = {}
    for keys, tensor in named_tensors(weights.content):
        word = keys[-1].replace("/", ".").rpartition(".")[2]
        if word in _SCALES and tensor.numel() == 1 and not tensor.is_complex():
            learnt[_SCALES[word]] = float(tensor)
    if "scale" not in learnt:
        return text
    bias = learnt.get("bias") if text.bias is None else text.bias
    return replace(text, scale=_exponential(str(weights.path), learnt["scale"]), bias=bias)


def with_text(module: nn.Module, text: TextEmbeddings) -> nn.Module:
    """Return a model that scores prompts: the tower's own parts, with another head behind its own.

    Raises:
        OptionError: The tower gives no embedding of that width.
    """
    head, width = _projection(module)
    classes, given = text.vectors.shape
    if given != width:
        raise OptionError(
            f"{text.source} has vectors of {given} numbers, but {type(module).__name__} gives "
            f"images {width}: they are not of one model"
        )
    scores = nn.Linear(width, classes)
    scale = _USUAL_SCALE if text.scale is None else text.scale
    # Behind a root mean square normalisation vectors have length √width.
    scores.weight = nn.Parameter(text.vectors * (scale / math.sqrt(width)))
    scores.bias = nn.Parameter(torch.full((classes,), text.bias or 0.0))
    some = next(module.parameters())
    unit = nn.RMSNorm(width, eps=_TINY, elementwise_affine=False)
    tower: Any = copy(module)
    tower._modules = {**module._modules, "head": nn.Sequential(head, unit, scores.to(some))}
    tower.num_classes = classes
    return tower  # type: ignore[no-any-return]


def _projection(module: nn.Module) -> tuple[nn.Module, int]:
    """Return what brings pooled tokens among texts, and the width that they have there."""
    head = getattr(module, "head", None)
    if isinstance(head, nn.Linear) and not hasattr(module, "head_dist"):
        return head, head.out_features
    if isinstance(head, nn.Identity) and getattr(module, "global_pool", "") == "map":
        return head, int(module.num_features)  # type: ignore[arg-type]
    raise OptionError(
        f"{type(module).__name__} brings no images among texts: expected a tower of CLIP, with a "
        "projection as its head, or of SigLIP, which pools by attention"
    )


def _named_vectors(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield each name with its vector, (width) or (templates, width)."""
    metadata = content.get("__metadata__")
    described = metadata.get("names") if isinstance(metadata, Mapping) else None
    names = content.get("names", described)
    if names is None:
        yield from ((name, each) for name, each in content.items() if isinstance(each, Tensor))
        return
    try:
        listed = json.loads(names) if isinstance(names, str) else names.tolist()
        vectors = content["vectors"]
    except (ValueError, LookupError, AttributeError, RecursionError):
        listed, vectors = None, None
    is_many = isinstance(vectors, Tensor) and vectors.dim() > 0
    if not isinstance(listed, list) or not is_many or len(listed) != len(vectors):
        raise OptionError(f"--text-embeddings {path} does not name each of its vectors; {_HINT}")
    yield from zip(map(str, listed), vectors, strict=True)


def _mean_direction(path: Path, name: str, vectors: Tensor) -> Tensor:
    """Return the mean over templates of vectors of length 1, of length 1."""
    usable = vectors.dim() in (1, 2) and vectors.numel() and vectors.is_floating_point()
    if not usable or not vectors.isfinite().all():
        raise OptionError(f"--text-embeddings {path}: {name!r} is no vector; {_HINT}")
    directions = F.normalize(vectors.double().reshape(-1, vectors.shape[-1]), dim=-1)
    mean = F.normalize(directions.mean(dim=0), dim=-1).float()
    if not mean.any():
        raise OptionError(f"--text-embeddings {path}: {name!r} is 0, which points nowhere")
    return mean


def _exponential(source: str, logarithm: float) -> float:
    """Return e to a learnt power; raises ``WeightsError``."""
    try:
        return math.exp(logarithm)
    except OverflowError:
        raise WeightsError(
            f"{source} scales cosines by exp({logarithm:g}), which is no number; expected a "
            "logit_scale near 4.6"
        ) from None


def _number(path: Path, key: str, value: object) -> float:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite().all():
        raise WeightsError(f"--text-embeddings {path}: {key} is no number")
    return float(value)
