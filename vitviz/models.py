"""A model ready to explain: its weights, tokens, preprocessing, labels and device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import nn

from vitviz.building import Built, build_model, build_skeleton, resolve_name
from vitviz.errors import DeviceError, ModelError, OptionError
from vitviz.labels import Labels, read_labels
from vitviz.layout import (
    TokenLayout,
    check_mixing,
    check_readout,
    patch_embedding,
    patch_size,
    read_layout,
)
from vitviz.options import Fit, Precision
from vitviz.weights import digest_weights, require_finite

__all__ = [
    "Model",
    "Preprocessing",
    "describe_device",
    "load_model",
    "preprocessing_of",
    "select_device",
]

_DTYPES = {
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a model expects of its images.

    Attributes:
        size: (height, width) in pixels.
        mean: Subtracted from RGB in [0, 1].
        std: Divided by, after that.
        interpolation: Pillow's filter, by timm's name.
        crop_pct: Share of the resized image that the centre crop keeps.
        patch: (height, width) of a patch; sides of native images are multiples of it.
        dynamic: Whether the model was built to take other sizes.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    patch: tuple[int, int]
    dynamic: bool = False

    def __post_init__(self) -> None:
        """Check what came from a config.

        Raises:
            ModelError: Pixels cannot be brought to that.
        """
        channels = len(self.mean) == len(self.std) == 3
        finite = all(map(math.isfinite, (*self.mean, *self.std, self.crop_pct)))
        known = self.interpolation.upper() in Image.Resampling.__members__
        if not (channels and finite and known and all(self.std) and self.crop_pct > 0):
            raise ModelError(
                f"the model's config has mean {self.mean}, std {self.std}, crop_pct "
                f"{self.crop_pct:g}, interpolation {self.interpolation!r}; expected numbers for "
                "three channels, std not 0, and one of Pillow's filters"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A model with its weights, on its device, and all that is known about it.

    Attributes:
        module: The timm model.
        name: Its timm name, with the tag of its weights.
        weights: Where the weights come from, in words.
        layout: Its tokens and readout.
        preprocessing: What it expects of images.
        labels: The names of its classes.
        num_classes: Number of logits; 0 for a model without a head.
        multi_label: Whether classes do not exclude each other (scores by sigmoid).
        notes: What a user should be told about how it was loaded.
    """

    module: nn.Module
    name: str
    weights: str
    layout: TokenLayout
    preprocessing: Preprocessing
    labels: Labels
    num_classes: int
    multi_label: bool = False
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are made of."""
        return next(self.module.parameters()).dtype

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, as they are computed with."""
        return digest_weights(self.module)

    @property
    def score_kind(self) -> str:
        """How scores are made from logits: "softmax" or "sigmoid"."""
        return "sigmoid" if self.multi_label else "softmax"


def load_model(
    model: str | nn.Module = "deit_tiny",
    *,
    weights: str | Path | None = None,
    labels: str | Path | None = None,
    device: str = "auto",
    fit: Fit | str = Fit.SQUASH,
    img_size: tuple[int, int] | None = None,
    precision: Precision | str | None = None,
) -> Model:
    """Load a model and find out where its tokens are and which of them its head reads.

    Args:
        model: A timm name with or without tag, an alias (``deit_tiny``), ``demo``,
            ``hf-hub:owner/name``, a folder with a config.json, ``package.module:factory``, or a
            timm model object with its weights.
        weights: A checkpoint to use instead of the pretrained weights.
        labels: A file with the names of the classes.
        device: ``auto`` (a model object stays where it is), ``cpu``, ``cuda``, ``cuda:1``,
            ``mps``; a model object is moved in place.
        fit: ``native`` builds the model so that it takes images of any aspect ratio.
        img_size: (height, width) to build the model for, instead of its own.
        precision: ``fp32``, ``bf16`` or ``fp16``; None: as the weights are.

    Raises:
        ModelError: There is no such model, or it cannot be built as asked.
        UnsupportedModelError: Rollout is not defined for this model.
        WeightsError: Its weights are missing or do not fit.
        LabelError: The label file does not fit.
        DeviceError: The device is not on this machine.
    """
    if isinstance(model, nn.Module):
        if weights is not None or img_size is not None or Fit(fit) is Fit.NATIVE:
            raise OptionError("a model object is taken as it is: weights, size and fit are its own")
        built = Built(module=model, name=_own_name(model), weights="given")
        module = model if device == "auto" else model.to(select_device(device))
        layout = read_layout(module, preprocessing_of(module).size)
    else:
        target = select_device(device)
        built, layout = _build(model, Path(weights) if weights else None, Fit(fit), img_size)
        module = built.module.to(target).eval()
    if precision is not None:
        module = module.to(_DTYPES[Precision(precision)])
    require_finite(module, f"weights of {built.name} ({built.weights})")
    preprocessing = preprocessing_of(module, img_size)
    check_mixing(module, preprocessing.size)
    check_readout(module, layout, preprocessing.size)
    num_classes = int(getattr(module, "num_classes", 0) or 0)
    known = _labels(module, num_classes, Path(labels) if labels else None)
    notes = list(built.notes)
    if known.assumed and built.weights != "pretrained":
        notes.append(f"no labels given: {known.source} labels assumed for {num_classes} classes")
    return Model(
        module=module,
        name=built.name,
        weights=built.weights,
        layout=layout,
        preprocessing=preprocessing,
        labels=known,
        num_classes=num_classes,
        multi_label=built.multi_label,
        notes=tuple(notes),
    )


def preprocessing_of(module: nn.Module, img_size: tuple[int, int] | None = None) -> Preprocessing:
    """Read what a model expects of its images from its pretrained config."""
    config = timm.data.resolve_model_data_config(module)
    embed = patch_embedding(module)
    # What the model was built for has the last word: a config may speak of its ancestor.
    size = img_size or getattr(embed, "img_size", None) or tuple(config["input_size"][1:])
    try:
        mean, std = (tuple(map(float, config[key])) for key in ("mean", "std"))
        crop_pct = float(config["crop_pct"])
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"the model's config has no numbers where some are due: {error}"
        ) from error
    return Preprocessing(
        size=(int(size[0]), int(size[1])),
        mean=mean,
        std=std,
        interpolation=str(config["interpolation"]),
        crop_pct=crop_pct,
        patch=patch_size(module),
        dynamic=bool(getattr(module, "dynamic_img_size", False)),
    )


def select_device(device: str = "auto") -> torch.device:
    """Pick the device: cuda, then mps, then cpu, or as told.

    Raises:
        DeviceError: The device asked for is not on this machine.
    """
    mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(mps)}
    if chosen.type not in counts:
        raise DeviceError(f"--device {device!r} is unknown; use auto, cpu, cuda, cuda:1 or mps")
    if (chosen.index or 0) >= counts[chosen.type]:
        has = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        raise DeviceError(f"--device {device} is not on this machine, which has: {has}")
    return chosen


def describe_device(device: torch.device) -> str:
    """Say which device is used: "Using cuda (NVIDIA …)" or "Using cpu"."""
    if device.type == "cuda":
        return f"Using {device} ({torch.cuda.get_device_name(device)})"
    return f"Using {device}"


def _build(
    model: str, weights: Path | None, fit: Fit, img_size: tuple[int, int] | None
) -> tuple[Built, TokenLayout]:
    name = resolve_name(model)
    skeleton = build_skeleton(name, img_size, native=fit is Fit.NATIVE)
    # What cannot work is refused before anything is downloaded.
    layout = read_layout(skeleton, preprocessing_of(skeleton, img_size).size)
    return build_model(name, skeleton, weights, img_size, native=fit is Fit.NATIVE), layout


def _own_name(module: nn.Module) -> str:
    config = getattr(module, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(module).__name__)


def _labels(module: nn.Module, num_classes: int, path: Path | None) -> Labels:
    if path is not None:
        return read_labels(path, num_classes)
    config: Mapping[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    names, described = config.get("label_names"), config.get("label_descriptions")
    if isinstance(names, (list, tuple)) and names and len(names) == num_classes:
        described = described if isinstance(described, dict) else {}
        texts = tuple(str(described.get(str(name), name)) for name in names)
        return Labels(names=texts, source="the model's config")
    subset = timm.data.infer_imagenet_subset(module) if num_classes else None
    if not subset:
        return Labels()
    texts = tuple(timm.data.ImageNetInfo(subset).label_descriptions())
    return Labels(names=texts, source=subset, assumed=True)
