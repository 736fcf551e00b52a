"""Models of transformers as timm's: from a folder that it saved, or from its model object.

transformers itself is never loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitviz.errors import ModelError, WeightsError
from vitviz.models.adapters import Adapter, merged
from vitviz.models.families import class_names, plan_of
from vitviz.models.keys import parted_as, renamed, resized, state_of
from vitviz.models.plans import Plan
from vitviz.models.processor import PROCESSOR_FILE, data_config

__all__ = [
    "Translation",
    "object_config",
    "read_config",
    "stated_architecture",
    "translate_object",
    "translation_of",
]


_CLASSIFIER = "ForImageClassification"
_HEADS = ("head.", "head_dist.")


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A model of transformers in timm's terms.

    Attributes:
        plan: How to build it.
        config: What timm would call its pretrained config.
        notes: What a user should be told.
    """

    plan: Plan
    config: dict[str, Any]
    notes: tuple[str, ...] = ()

    def build(self, img_size: tuple[int, int] | None = None, **arguments: Any) -> nn.Module:
        """Build it, for images as its processor makes them or of another size."""
        module = self.plan.build(img_size or self.config["input_size"][1:], **arguments)
        for part in module.modules():  # what is computed anew is no weight, in no version of timm
            part._non_persistent_buffers_set.update(part._buffers)
        module.pretrained_cfg = module.default_cfg = dict(self.config)  # type: ignore[assignment]
        return module

    def renamed(self, content: Mapping[Any, Any], origin: str) -> dict[Any, Any]:
        """Give what a checkpoint holds timm's names."""
        return renamed(content, self.plan, origin)

    def merged(
        self, tensors: Mapping[str, Tensor], adapter: Adapter
    ) -> tuple[dict[str, Tensor], Adapter]:
        """Merge an adapter by transformers' names into tensors under timm's.

        Returns:
            The tensors, and the adapter by timm's names, without its changes to a text tower.

        Raises:
            WeightsError: It changes nothing of the model, or what the model does not have.
        """
        origin = str(adapter.path)
        named = {f"{layer}.weight": change for layer, change in adapter.changes.items()}
        changes = self.renamed(named, origin)
        if not changes:
            raise WeightsError(f"{origin} changes no layer of the image tower")
        own = replace(
            adapter,
            changes={name.removesuffix(".weight"): each for name, each in changes.items()},
            replaced=self.renamed(adapter.replaced, origin),
        )
        heads = _HEADS if _trained_head(adapter) is not None else ()
        base = {name: each for name, each in tensors.items() if not name.startswith(heads)}
        return merged(parted_as(own.changes, base), own), own

    def resized(self, tensors: Iterable[str], module: nn.Module) -> str:
        """Say which positions are fitted to another grid; empty where none are."""
        return resized(tensors, self.plan, module)

    def state(self, tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
        """Bring tensors under timm's names to the forms of a module that ``build`` made."""
        return state_of(tensors, self.plan, module)


def translation_of(folder: Path, adapter: Adapter | None = None) -> Translation | None:
    """Read a model folder; None if its config is not of transformers.

    Args:
        folder: With its config.json.
        adapter: What was trained on the model, which may have got a classifier for it.

    Raises:
        ModelError: It is of a model that timm's parts do not make.
    """
    config: Mapping[str, Any] = read_config(folder / "config.json")
    if not stated_architecture(config):
        return None
    if adapter is not None:
        config = _trained(config, adapter)
    processor = read_config(folder / PROCESSOR_FILE)
    if not processor and (folder / PROCESSOR_FILE).is_file():
        raise ModelError(f"{folder}: {PROCESSOR_FILE} holds no settings; mend it or put it aside")
    if not processor:
        pair = read_config(folder / "processor_config.json").get("image_processor")
        processor = pair if isinstance(pair, dict) else {}
    found = {"source": "local-dir", "file": str(folder)}
    return _translation(config, processor, found, str(folder))


def stated_architecture(config: Mapping[str, Any]) -> str:
    """Return transformers' name of the class that a config is for; empty if it is not its config.

    What timm saves has an ``architecture``, though a ``model_type`` may be beside it.
    """
    kind, named = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or isinstance(config.get("architecture"), str):
        return ""
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else f"{kind} without a class"


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def object_config(module: nn.Module) -> dict[str, Any] | None:
    """Return the config of a model object of transformers; None of any other."""
    config = getattr(module, "config", None)
    kind, to_dict = getattr(config, "model_type", None), getattr(config, "to_dict", None)
    if not isinstance(kind, str) or not callable(to_dict) or kind == "timm_wrapper":
        return None
    classes = [each for each in type(module).__mro__ if each.__module__.startswith("transformers.")]
    return {**to_dict(), "architectures": [each.__name__ for each in classes[:1]]}


def translate_object(module: nn.Module, config: Mapping[str, Any]) -> tuple[nn.Module, Translation]:
    """Build timm's twin of a model object, with its weights, where they are.

    Args:
        module: The object.
        config: From ``object_config``.

    Raises:
        ModelError: timm's parts do not make it.
    """
    name = type(module).__name__
    if any(".lora_" in each for each, _ in module.named_parameters()):
        raise ModelError(f"{name} has a LoRA adapter; pass what its merge_and_unload() returns")
    translation = _translation(config, {}, {}, f"the config of {name}")
    twin = translation.build()
    some = next(module.parameters())
    tensors = translation.renamed(module.state_dict(), name)
    try:
        twin.load_state_dict(translation.state(tensors, twin))
    except RuntimeError as error:
        raise ModelError(f"{name} has other tensors than its config says") from error
    return twin.to(device=some.device, dtype=some.dtype).train(module.training), translation


def _translation(
    config: Mapping[str, Any], processor: Mapping[str, Any], found: dict[str, str], origin: str
) -> Translation:
    architecture = stated_architecture(config)
    try:
        plan = plan_of(config, architecture)
        data = data_config(processor, plan)
    except ModelError as error:
        raise ModelError(f"{origin}: {error}") from error
    names = class_names(config)
    labels = {"label_names": names} if any(names) else {}
    heads = ("head", "head_dist") if architecture.endswith("WithTeacher") else "head"
    about = {"architecture": architecture, "classifier": heads}
    means = " ".join(f"{each:g}" for each in data["mean"])
    note = f"no {PROCESSOR_FILE} says how its images were prepared: mean {means} assumed"
    return Translation(
        plan=plan,
        config={**data, **about, **labels, **found},
        notes=() if processor else (note,),
    )


def _trained(config: Mapping[str, Any], adapter: Adapter) -> Mapping[str, Any]:
    """Return the config of what was trained with an adapter on the model of a config."""
    head, architecture = _trained_head(adapter), stated_architecture(config)
    if head is None:
        return config
    if _CLASSIFIER not in architecture:
        architecture = f"{architecture.partition('For')[0].removesuffix('Model')}{_CLASSIFIER}"
    named = config.get("id2label")
    same = isinstance(named, Mapping) and len(named) == len(head)
    labels = {} if same else {"id2label": None, "num_labels": len(head)}
    return {**config, **labels, "architectures": [adapter.trained_as or architecture]}


def _trained_head(adapter: Adapter) -> Tensor | None:
    """Return the weights of the classifier that was trained with an adapter, if one was."""
    heads = (t for name, t in adapter.replaced.items() if name.endswith("classifier.weight"))
    return next((each for each in heads if each.dim() == 2), None)
