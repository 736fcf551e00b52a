"""LoRA adapters as PEFT saves them, merged into the weights that they were trained on.

A merged weight is W + s·B·A, s = α/r, or α/√r where the adapter says so (rsLoRA). Whatever PEFT can
do beside that is refused by name, never left out.

Sources: Hu et al. 2021, "LoRA" (arXiv 2106.09685); Kalajdzievski 2023, "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA" (arXiv 2312.03732).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vitviz.errors import WeightsError, first_line
from vitviz.models.weight_files import WeightFile

__all__ = ["Adapter", "holds_adapter", "merged", "read_adapter"]


_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
# What PEFT puts around the parts of a model, which keep their names otherwise.
_AROUND = re.compile(r"^base_model\.model\.|\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_UNTOUCHED = (True, False, "gaussian", "orthogonal", "eva")
"""First values of A and B beside which the base keeps its weights; of others it does not."""
_HARMLESS = frozenset(
    ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path")
    + ("revision", "inference_mode", "runtime_config", "megatron_core", "qalora_group_size")
    + ("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "bias")
    + ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")
    + ("layers_pattern", "init_lora_weights", "eva_config", "ensure_weight_tying")
)
"""What a config may say: how the adapter came to be, and what is read here or off its tensors."""
_MOST_WRAPPED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA adapter.

    Attributes:
        path: Its file.
        changes: (A, B, factor) for each layer, by its name: s·B·A is added to its weight.
        replaced: Tensors that take the place of the base's own, by name.
        base: What it was trained on, a folder or a name on the hub; empty where it is not said.
        trained_as: The class of that model, where it was one of transformers.
    """

    path: Path
    changes: dict[str, tuple[Tensor, Tensor, float]]
    replaced: dict[str, Tensor]
    base: str = ""
    trained_as: str = ""

    def describe(self) -> str:
        """Say in one line what it does."""
        layers = len(self.changes)
        parts = [f"LoRA adapter merged into {layers} layer{'s' if layers > 1 else ''}"]
        if self.replaced:
            names = list(self.replaced)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"replacing {', '.join(names[:3])}{more}")
        return ", ".join(parts)


def holds_adapter(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether these are an adapter's tensors, without the base they are for."""
    pairs = [name for name in tensors if _MATRIX.fullmatch(name)]
    return 2 * len(pairs) > len(tensors)


def read_adapter(path: Path) -> Adapter:
    """Read an adapter: its folder, or its file with its config beside it.

    Raises:
        WeightsError: It is not there, not readable, or more than plain LoRA on linear layers.
    """
    names = [path / name for name in _FILES] if path.is_dir() else [path]
    file = next((name for name in names if name.is_file()), None)
    if file is None:
        raise WeightsError(f"--adapter {path} has no {' or '.join(_FILES)}; expected PEFT's folder")
    config = _config(file.with_name(_CONFIG))
    found: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in WeightFile(file).content.items():
        if not isinstance(tensor, Tensor) or ".original_module." in name:
            continue  # the latter is what a part was before it was trained
        if matrix := _MATRIX.fullmatch(name):
            found.setdefault(_AROUND.sub("", matrix[1]), {})[matrix[2]] = tensor
        elif "lora_" in name:
            raise _refusal(file, f"{name} is no plain LoRA on a linear layer")
        else:
            replaced[_AROUND.sub("", name)] = tensor
    if not found:
        raise WeightsError(f"--adapter {file} has no lora_A and lora_B; expected a LoRA adapter")
    changes = {
        name: (*_pair(file, name, each), _factor(file, config, name, each["A"]))
        for name, each in found.items()
    }
    return Adapter(
        path=file,
        changes=changes,
        replaced=replaced,
        base=_text(config, "base_model_name_or_path"),
        trained_as=_text(config.get("auto_mapping"), "base_model_class"),
    )


def merged(base: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Merge an adapter into the weights of its base, which are left as they are.

    Products are computed in float32 or wider, and not rounded to a base in half precision.

    Raises:
        WeightsError: The base has no such layers.
    """
    depth = _wrapping(base, adapter)
    result = dict(base)
    for name, (first, second, factor) in adapter.changes.items():
        place = f"{_within(name, depth)}.weight"
        wide = _wide(base[place])
        change = factor * (second.to(wide.dtype) @ first.to(wide.dtype))
        if change.shape != wide.shape:
            raise _refusal(
                adapter.path,
                f"{name} changes a {tuple(change.shape)} matrix, but the base's is "
                f"{tuple(wide.shape)}",
            )
        result[place] = wide + change
    return result | {_within(name, depth): each for name, each in adapter.replaced.items()}


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path} cannot be read ({first_line(error)}); a LoRA adapter means nothing without it"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise _refusal(path, f"peft_type is {kind!r}, and LORA alone can be merged")
    if config.get("init_lora_weights", True) not in _UNTOUCHED:
        raise _refusal(
            path,
            f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base as well",
        )
    if odd := [name for name, value in config.items() if value and name not in _HARMLESS]:
        raise _refusal(path, f"{odd[0]} is {config[odd[0]]!r}, which is more than plain LoRA")
    return config


def _text(config: object, key: str) -> str:
    found = config.get(key) if isinstance(config, dict) else None
    return found if isinstance(found, str) else ""


def _pair(file: Path, name: str, matrices: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank)."""
    if matrices.keys() != {"A", "B"}:
        raise _refusal(file, f"{name} has lora_{next(iter(matrices))} alone")
    first, second = matrices["A"], matrices["B"]
    if first.dim() != 2 or second.dim() != 2 or first.shape[0] != second.shape[1]:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise _refusal(file, f"{name} has A and B of {shapes}, which is no linear layer's")
    return first, second


def _factor(file: Path, config: Mapping[str, Any], name: str, first: Tensor) -> float:
    """Return s, by α of the first pattern that the layer's name ends in, else of all."""
    patterns = config.get("alpha_pattern") or {}
    rank = first.shape[0]
    try:
        own = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
        alpha = patterns[own] if own is not None else config.get("lora_alpha", 8)
        factor = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, LookupError, ArithmeticError, re.error) as error:
        raise _refusal(file, f"its config gives {name} no factor: {first_line(error)}") from error
    if not math.isfinite(factor):
        raise _refusal(file, f"its config gives {name} the factor {factor}")
    return factor


def _wrapping(base: Mapping[str, Tensor], adapter: Adapter) -> int:
    """Count the words before the names of layers that the base does without.

    Raises:
        WeightsError: It has them under no such name, or they are no matrices.
    """
    for depth in range(_MOST_WRAPPED):
        places = [f"{_within(name, depth)}.weight" for name in adapter.changes]
        if all(place in base for place in places):
            if odd := [place for place in places if base[place].dim() != 2]:
                shape = tuple(base[odd[0]].shape)
                raise _refusal(adapter.path, f"{odd[0]} of the base is {shape}, no linear layer's")
            return depth
    lacking = next(name for name in adapter.changes if f"{name}.weight" not in base)
    named = adapter.base and f", {adapter.base}"
    raise _refusal(
        adapter.path,
        f"the base has no {lacking}.weight; give the model that it was trained on{named}",
    )


def _within(name: str, depth: int) -> str:
    return ".".join(name.split(".")[depth:])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor


def _refusal(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path} cannot be merged: {reason}")
