"""All knowledge about timm: names, building, preprocessing, labels; a model ready to explain."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import timm.data
import torch
from torch import nn

from vitviz.errors import DeviceError, ModelError, WeightsError
from vitviz.labels import Labels, read_labels
from vitviz.layout import (
    TokenLayout,
    check_mixing,
    check_readout,
    patch_embedding,
    patch_size,
    read_layout,
)
from vitviz.options import Fit
from vitviz.weights import (
    digest_weights,
    fetch_from_hub,
    mismatch,
    read_checkpoint,
    require_answer,
)

__all__ = [
    "ALIASES",
    "Model",
    "Preprocessing",
    "build_skeleton",
    "describe_device",
    "load_model",
    "preprocessing_of",
    "resolve_name",
    "select_device",
]

ALIASES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "dinov2_small": "vit_small_patch14_dinov2",
    "dinov2_base": "vit_base_patch14_dinov2",
    "dinov2_large": "vit_large_patch14_dinov2",
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
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    patch: tuple[int, int]
    dynamic: bool = False


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

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
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
) -> Model:
    """Load a model and find out where its tokens are and which of them its head reads.

    Args:
        model: A timm name with or without tag, an alias (``deit_tiny``), ``hf-hub:owner/name``,
            or a timm model object with its weights.
        weights: A checkpoint to use instead of the pretrained weights.
        labels: A file with the names of the classes.
        device: ``auto`` (a model object stays where it is), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        fit: ``native`` builds the model so that it takes images of any aspect ratio.
        img_size: (height, width) to build the model for, instead of its own.

    Raises:
        ModelError: There is no such model, or it cannot be built as asked.
        UnsupportedModelError: Rollout is not defined for this model.
        WeightsError: Its weights are missing or do not fit.
        LabelError: The label file does not fit.
        DeviceError: The device is not on this machine.
    """
    if isinstance(model, nn.Module):
        built = _Built(module=model, name=_own_name(model), weights="given")
        module = model if device == "auto" else model.to(select_device(device))
    else:
        target = select_device(device)
        built = _build(resolve_name(model), weights, Fit(fit), img_size)
        module = built.module.to(target).eval()
    preprocessing = preprocessing_of(module, img_size)
    layout = read_layout(module, preprocessing.size)
    check_mixing(module, preprocessing.size)
    check_readout(module, layout)
    num_classes = int(getattr(module, "num_classes", 0) or 0)
    known = _labels(module, num_classes, Path(labels) if labels else None)
    if known.assumed and (weights or isinstance(model, nn.Module)):
        note = f"no labels given: {known.source} labels assumed for {num_classes} classes"
        built = replace(built, notes=(*built.notes, note))
    return Model(
        module=module,
        name=built.name,
        weights=built.weights,
        layout=layout,
        preprocessing=preprocessing,
        labels=known,
        num_classes=num_classes,
        multi_label=built.multi_label,
        notes=built.notes,
    )


def resolve_name(name: str) -> str:
    """Return the full name of a model for timm, aliases replaced.

    Raises:
        ModelError: timm knows no such model; near names are offered.
    """
    if name.startswith(("hf-hub:", "local-dir:")):
        return name
    base, dot, tag = name.partition(".")
    base = ALIASES.get(base, base)
    if not timm.is_model(base):
        near = difflib.get_close_matches(name, [*ALIASES, *timm.list_models()], n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models() for names"
        raise ModelError(f"no model is called {name!r}; {hint}")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", pretrained=True)]
    if tag and tag not in tags:
        known = ", ".join(tags) or "none"
        raise ModelError(f"{base} has no weights tagged {tag!r}; tags it has: {known}")
    return base + dot + tag


def build_skeleton(name: str, img_size: tuple[int, int] | None = None) -> nn.Module:
    """Build a model without weights and without memory for them, on torch's meta device.

    Raises:
        ModelError: It cannot be built as asked.
        WeightsError: Its config is on the hub, and the hub cannot be reached.
    """
    return _skeleton(_local(name), _size_argument(img_size)).eval()


def preprocessing_of(module: nn.Module, img_size: tuple[int, int] | None = None) -> Preprocessing:
    """Read what a model expects of its images from its pretrained config."""
    config = timm.data.resolve_model_data_config(module)
    embed = patch_embedding(module)
    # What the model was built for has the last word: a config may speak of its ancestor.
    size = img_size or getattr(embed, "img_size", None) or tuple(config["input_size"][1:])
    return Preprocessing(
        size=(int(size[0]), int(size[1])),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=float(config["crop_pct"]),
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Built:
    """A module with its weights, and how it came by them."""

    module: nn.Module
    name: str
    weights: str
    multi_label: bool = False
    notes: tuple[str, ...] = ()


def _build(
    name: str, weights: str | Path | None, fit: Fit, img_size: tuple[int, int] | None
) -> _Built:
    arguments = _size_argument(img_size)
    if fit is Fit.NATIVE:
        arguments["dynamic_img_size"] = True
    local_name = _local(name)
    # Without weights first: what cannot work is refused before anything is downloaded.
    skeleton = _skeleton(local_name, arguments)
    read_layout(skeleton, preprocessing_of(skeleton, img_size).size)
    config: dict[str, Any] = dict(skeleton.pretrained_cfg)  # type: ignore[arg-type]
    full_name = _full_name(name, config)
    multi_label = _is_multi_label(config)
    if weights is not None:
        return _build_from_file(
            local_name, full_name, Path(weights), skeleton, multi_label, arguments
        )
    if name.startswith("hf-hub:"):
        fetch_from_hub(name.removeprefix("hf-hub:"), None)  # into the folder beside the config
    source = _pretrained_source(config, full_name)
    module = _create(local_name, pretrained=True, **source, **arguments)
    return _Built(module=module, name=full_name, weights="pretrained", multi_label=multi_label)


def _build_from_file(
    name: str,
    full_name: str,
    path: Path,
    skeleton: nn.Module,
    multi_label: bool,
    arguments: dict[str, Any],
) -> _Built:
    checkpoint = read_checkpoint(path)
    changed = _resized(path, checkpoint.tensors, skeleton)
    config: dict[str, Any] = dict(skeleton.pretrained_cfg)  # type: ignore[arg-type]
    num_classes = _head_size(checkpoint.tensors, config)
    overlay = {
        "state_dict": checkpoint.tensors,
        "source": "",
        "num_classes": num_classes,
        "custom_load": False,
        "label_offset": 0,
    }
    try:
        module = _create(
            name,
            pretrained=True,
            num_classes=num_classes,
            pretrained_cfg_overlay=overlay,
            **arguments,
        )
    except (RuntimeError, KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        expected = _skeleton(name, {**arguments, "num_classes": num_classes})
        raise WeightsError(
            f"--weights {path} does not fit {full_name}: {mismatch(checkpoint.tensors, expected)}; "
            "name the model that it was trained as with -m"
        ) from error
    module.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
    notes = [f"{path}: {change}" for change in changed]
    if checkpoint.is_ema:
        notes.append(f"{path}: taking its averaged (EMA) weights")
    return _Built(
        module=module,
        name=full_name,
        weights=str(path),
        multi_label=multi_label,
        notes=tuple(notes),
    )


def _local(name: str) -> str:
    """Return the name that timm needs to build a model without asking the hub."""
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json; expected a model folder as on the hub")
    if not name.startswith("hf-hub:"):
        return name
    config = fetch_from_hub(name.removeprefix("hf-hub:"), "config.json")
    return f"local-dir:{config.parent}"


def _skeleton(name: str, arguments: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return _create(name, pretrained=False, **arguments)


def _resized(path: Path, tensors: Mapping[str, torch.Tensor], skeleton: nn.Module) -> list[str]:
    """Say which position embeddings timm will resize, as it does for another image size.

    Raises:
        WeightsError: The patch size differs; timm would resample the patch embedding in silence,
            to a model that nobody trained.
    """
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    changes = []
    for name, tensor in tensors.items():
        if name not in expected or tensor.shape == expected[name]:
            continue
        if name.endswith("patch_embed.proj.weight"):
            raise WeightsError(
                f"--weights {path} does not fit: {name} is {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name])}, another patch size; name the model that they were "
                "trained as with -m"
            )
        if "pos_embed" in name or "rel_pos" in name:
            changes.append(f"{name} {tuple(tensor.shape)} resized to {tuple(expected[name])}")
    return changes


def _create(name: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
    try:
        module: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        if "dynamic_img_size" in str(error):
            raise ModelError(
                f"{name} takes images of one shape only, so --fit native cannot keep their aspect "
                "ratio; build it for another shape with --img-size, or use --fit squash or crop"
            ) from error
        if "img_size" in str(error):
            raise ModelError(f"{name} takes no other image size than its own") from error
        raise
    return module


def _size_argument(img_size: tuple[int, int] | None) -> dict[str, Any]:
    return {"img_size": img_size} if img_size else {}


def _pretrained_source(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Say where timm finds the pretrained weights: a file in the hub's cache where it can be."""
    if config.get("source") == "local-dir" or config.get("file"):
        return {}
    repository = config.get("hf_hub_id")
    if not repository and not config.get("url"):
        raise WeightsError(
            f"{name} has no pretrained weights; give your own file with --weights FILE"
        )
    if not repository:
        url = str(config["url"])
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
        if not cached.is_file():
            require_answer(url, name)
        return {}
    file = fetch_from_hub(str(repository), config.get("hf_hub_filename"))
    if config.get("custom_load") == "hf":
        return {}  # a format of its own, which timm reads from the cache
    return {"pretrained_cfg_overlay": {"file": str(file), "source": ""}}


def _head_size(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Read the number of classes off a checkpoint's head; 0 when it has none."""
    classifier = config.get("classifier") or "head"
    first = classifier if isinstance(classifier, str) else classifier[0]
    weight = tensors.get(f"{first}.weight")
    return 0 if weight is None or not weight.dim() else int(weight.shape[0])


def _full_name(name: str, config: Mapping[str, Any]) -> str:
    if ":" in name or "." in name or not config.get("tag"):
        return name
    return f"{name}.{config['tag']}"


def _own_name(module: nn.Module) -> str:
    config = getattr(module, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(module).__name__)


def _is_multi_label(config: Mapping[str, Any]) -> bool:
    """Ask the hub-style config of a local model; timm itself drops what it does not know."""
    if config.get("source") != "local-dir":
        return False
    content = json.loads((Path(config["file"]) / "config.json").read_text(encoding="utf-8"))
    return bool(content.get("problem_type") == "multi_label_classification")


def _labels(module: nn.Module, num_classes: int, path: Path | None) -> Labels:
    if path is not None:
        return read_labels(path, num_classes)
    config: Mapping[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    names = tuple(config.get("label_names") or ())
    if names and len(names) == num_classes:
        described = config.get("label_descriptions") or {}
        texts = tuple(str(described.get(name, name)) for name in names)
        return Labels(names=texts, source="the model's config")
    subset = timm.data.infer_imagenet_subset(module) if num_classes else None
    if not subset:
        return Labels()
    texts = tuple(timm.data.ImageNetInfo(subset).label_descriptions())
    return Labels(names=texts, source=subset, assumed=True)
