"""Names and weight files → timm models; knows nothing of tokens or images."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitviz.errors import ModelError, WeightsError, first_line
from vitviz.models.adapters import Adapter, merged
from vitviz.models.checkpoints import mismatch, read_checkpoint
from vitviz.models.labels import Labels
from vitviz.models.locations import folder_weights, local_name, pretrained_source
from vitviz.models.names import FACTORY
from vitviz.models.structure import pretrained_config
from vitviz.models.translation import Translation, read_config, translation_of
from vitviz.models.weight_files import WeightFile

__all__ = ["LoadedModule", "build_model", "build_skeleton"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModule:
    """A module with its weights, and how it came by them.

    Attributes:
        module: The timm model.
        name: Its name, with the tag of its weights.
        weights: Where the weights come from, in words.
        multi_label: Whether its classes do not exclude each other.
        notes: What a user should be told.
        labels: The names of its classes, where they are part of it.
    """

    module: nn.Module
    name: str
    weights: str
    multi_label: bool = False
    notes: tuple[str, ...] = ()
    labels: Labels | None = None


def build_skeleton(
    name: str,
    img_size: tuple[int, int] | None = None,
    *,
    native: bool = False,
    adapter: Adapter | None = None,
) -> nn.Module:
    """Build a model without weights and without memory for them, on torch's meta device.

    What a user's own factory makes is what it is, with its weights.

    Args:
        name: From ``resolve_name``.
        img_size: (height, width) to build it for, instead of its own.
        native: Whether it is to take images of any aspect ratio.
        adapter: What is to be merged into it; with one, a model of transformers may classify.

    Raises:
        ModelError: It cannot be built as asked.
        WeightsError: Its config is on the hub, and the hub cannot be reached.
    """
    if FACTORY.fullmatch(name):
        return _call_factory(name, _size_arguments(img_size, native))
    local, arguments = local_name(name), _size_arguments(img_size, native)
    try:
        with torch.device("meta"):
            return _create(local, pretrained=False, adapter=adapter, **arguments).eval()
    except Exception as error:
        if isinstance(error, ModelError) or not local.startswith("local-dir:"):
            raise
        # A config is anybody's text, and timm takes it as it is.
        raise ModelError(
            f"{local.removeprefix('local-dir:')}/config.json describes no model that timm can "
            f"build ({first_line(error)})"
        ) from error


def build_model(
    name: str,
    skeleton: nn.Module,
    weights: WeightFile | None,
    img_size: tuple[int, int] | None = None,
    *,
    native: bool = False,
    adapter: Adapter | None = None,
) -> LoadedModule:
    """Build a model with its weights.

    Args:
        name: From ``resolve_name``.
        skeleton: From ``build_skeleton``, asked for the same.
        weights: The user's checkpoint; None for the pretrained weights.
        img_size: As for ``build_skeleton``.
        native: As for ``build_skeleton``.
        adapter: What is to be merged into the weights.

    Raises:
        ModelError: It cannot be built as asked.
        WeightsError: The weights are missing or do not fit.
    """
    if FACTORY.fullmatch(name):
        return _finish_factory(name, skeleton, weights, adapter)
    arguments = _size_arguments(img_size, native)
    config = pretrained_config(skeleton)
    full_name, multi_label = _full_name(name, config), _is_multi_label(config)
    file, notes = weights, list[str]()
    if file is None and config.get("source") == "local-dir":
        file = WeightFile(folder_weights(name, Path(config["file"])))
    if file is None:
        module = _pretrained(name, full_name, config, arguments)
        if adapter is not None:
            module, notes = _adapted(module, adapter, local_name(name), arguments)
    else:
        module, notes = _from_file(file, local_name(name), skeleton, arguments, adapter)
    own = "bundled" if name == "demo" else "pretrained"
    return LoadedModule(
        module=module,
        name=full_name,
        weights=_origin(own if weights is None else str(weights.path), adapter),
        multi_label=multi_label,
        notes=tuple(notes),
    )


def _from_file(
    file: WeightFile,
    name: str,
    skeleton: nn.Module,
    arguments: dict[str, Any],
    adapter: Adapter | None,
) -> tuple[nn.Module, list[str]]:
    """Build a model with the weights of a file; return what should be said about them, too."""
    if translation := _translation(name, adapter):
        return _from_translated_file(file, translation, skeleton, arguments, adapter)
    path, checkpoint = file.path, read_checkpoint(file, skeleton)
    said = [checkpoint.unwrapped, *_resized(path, checkpoint.tensors, skeleton)]
    notes = [f"{path}: {each}" for each in said if each]
    tensors, more = _with_adapter(checkpoint.tensors, adapter)
    return _filled(path, tensors, name, pretrained_config(skeleton), arguments), notes + more


def _adapted(
    module: nn.Module, adapter: Adapter, name: str, arguments: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    """Build a pretrained model anew with an adapter, which may bring another number of classes."""
    tensors, notes = _with_adapter(module.state_dict(), adapter)
    return _filled(adapter.path, tensors, name, pretrained_config(module), arguments), notes


def _with_adapter(
    tensors: dict[str, torch.Tensor], adapter: Adapter | None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    if adapter is None:
        return tensors, []
    return merged(tensors, adapter), [f"{adapter.path}: {adapter.describe()}"]


def _origin(weights: str, adapter: Adapter | None) -> str:
    return weights if adapter is None else f"{weights} with {adapter.path}"


def _filled(
    path: Path,
    tensors: dict[str, torch.Tensor],
    name: str,
    config: Mapping[str, Any],
    arguments: dict[str, Any],
) -> nn.Module:
    """Build a model with these tensors, as many classes as they have."""
    num_classes = _head_size(tensors, config)
    overlay = {
        "state_dict": tensors,
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
        with torch.device("meta"):
            expected = _create(name, pretrained=False, num_classes=num_classes, **arguments)
        raise _misfit(path, tensors, expected) from error
    module.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
    return module


def _from_translated_file(
    file: WeightFile,
    translation: Translation,
    skeleton: nn.Module,
    arguments: dict[str, Any],
    adapter: Adapter | None,
) -> tuple[nn.Module, list[str]]:
    """Do the same for the weights of a model of transformers, which are as many as it says."""
    checkpoint = read_checkpoint(file, skeleton, translation.renamed)
    tensors, merging = checkpoint.tensors, list[str]()
    if adapter is not None:
        tensors, adapter = translation.merged(tensors, adapter)
        merging = [f"{adapter.path}: {adapter.describe()}"]
    state = translation.state(tensors, skeleton)
    if mismatch(state, skeleton):
        raise _misfit(file.path, state, skeleton)
    module = translation.build(**arguments)
    module.load_state_dict(state)
    resized = translation.resized(checkpoint.tensors, module)
    said = [checkpoint.unwrapped, resized, *translation.notes]
    return module, [*(f"{file.path}: {each}" for each in said if each), *merging]


def _translation(name: str, adapter: Adapter | None = None) -> Translation | None:
    """Return how to build a model whose folder transformers saved."""
    folder = name.removeprefix("local-dir:")
    return None if folder == name else translation_of(Path(folder), adapter)


def _misfit(path: Path, tensors: Mapping[str, torch.Tensor], expected: nn.Module) -> WeightsError:
    difference = mismatch(tensors, expected) or "the tensors do not fit"
    return WeightsError(
        f"{path} does not fit {pretrained_config(expected).get('architecture', 'the model')}: "
        f"{difference}; name the model that it was trained as with -m"
    )


def _call_factory(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Call a user's ``package.module:function``, found from the working directory, too."""
    home, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        own = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if not f"{home}.".startswith(f"{error.name}."):
            raise  # something that the user's own module imports
        raise ModelError(
            f"no module {home!r} to take {function} from; is it in this folder?"
        ) from error
    factory = getattr(own, function, None)
    if factory is None:
        raise ModelError(f"module {home} has no {function}; expected a function")
    module = factory(**arguments)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name} gave a {type(module).__name__}; expected a timm model")
    return module


def _finish_factory(
    name: str, module: nn.Module, weights: WeightFile | None, adapter: Adapter | None
) -> LoadedModule:
    if weights is None and adapter is None:
        return LoadedModule(module=module, name=name, weights="given")
    tensors, notes, origin = dict(module.state_dict()), list[str](), "given"
    if weights is not None:
        checkpoint, origin = read_checkpoint(weights, module), str(weights.path)
        tensors = checkpoint.tensors
        notes = [f"{origin}: {checkpoint.unwrapped}"] if checkpoint.unwrapped else []
    tensors, more = _with_adapter(tensors, adapter)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        path = adapter.path if weights is None and adapter else Path(origin)
        raise _misfit(path, tensors, module) from error
    return LoadedModule(
        module=module, name=name, weights=_origin(origin, adapter), notes=(*notes, *more)
    )


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
        if name.endswith("patch_embed.proj.weight") and tensor.shape[2:] != expected[name][2:]:
            raise WeightsError(
                f"{path} does not fit: {name} is {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name])}, another patch size; name the model that they were "
                "trained as with -m"
            )
        if "pos_embed" in name or "rel_pos" in name:
            changes.append(f"{name} {tuple(tensor.shape)} resized to {tuple(expected[name])}")
    return changes


def _create(
    name: str, *, pretrained: bool, adapter: Adapter | None = None, **arguments: Any
) -> nn.Module:
    translation = _translation(name, adapter)
    try:
        if translation is not None:
            return translation.build(**arguments)
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


def _size_arguments(img_size: tuple[int, int] | None, native: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {"img_size": img_size} if img_size else {}
    return {**arguments, "dynamic_img_size": True} if native else arguments


def _pretrained(
    name: str, full_name: str, config: Mapping[str, Any], arguments: dict[str, Any]
) -> nn.Module:
    """Build a model with the weights that timm knows for it."""
    source = pretrained_source(config, full_name)
    try:
        return _create(name, pretrained=True, **source, **arguments)
    except (OSError, HTTPException) as error:  # timm downloads from an address by itself
        raise WeightsError(
            f"weights of {full_name} could not be had ({first_line(error)}); try again, or give "
            f"your own file with -m {full_name} --weights FILE"
        ) from error


def _head_size(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Read the number of classes off a checkpoint's head; 0 when it has none.

    Where CLIP names its parts itself, that is the width of its projection (features, width).
    """
    projection = tensors.get("visual.proj")
    if projection is not None and projection.dim() == 2:
        return int(projection.shape[1])
    classifier = config.get("classifier") or "head"
    first = classifier[0] if isinstance(classifier, (list, tuple)) else classifier
    weight = tensors.get(f"{first}.weight")
    return 0 if weight is None or not weight.dim() or not weight.numel() else int(weight.shape[0])


def _full_name(name: str, config: Mapping[str, Any]) -> str:
    if ":" in name or "." in name or name == "demo" or not config.get("tag"):
        return name
    return f"{name}.{config['tag']}"


def _is_multi_label(config: Mapping[str, Any]) -> bool:
    """Ask the hub-style config of a local model; timm itself drops what it does not know."""
    if config.get("source") != "local-dir":
        return False
    content = read_config(Path(config["file"]) / "config.json")
    return bool(content.get("problem_type") == "multi_label_classification")
