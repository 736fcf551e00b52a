"""Checkpoints: the tensors of one model from a weights file, checked; opens no file itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitviz.errors import WeightsError
from vitviz.models.adapters import holds_adapter
from vitviz.models.jax_weights import from_jax, jax_place
from vitviz.models.unwrapping import unwrap
from vitviz.models.weight_files import WeightFile

__all__ = ["Checkpoint", "digest_weights", "mismatch", "read_checkpoint", "require_finite"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """The tensors of a weights file, unwrapped.

    Attributes:
        tensors: By parameter name.
        unwrapped: What was taken off and left out, in one line; empty where nothing was.
    """

    tensors: dict[str, Tensor]
    unwrapped: str = ""


def read_checkpoint(
    weights: Path | WeightFile,
    module: nn.Module | None = None,
    renamed: Callable[[Mapping[Any, Any], str], Mapping[Any, Any]] | None = None,
) -> Checkpoint:
    """Read a weights file, and unwrap what trainers wrap around a model.

    Args:
        weights: The file.
        module: The model that is to get the tensors, if it is known.
        renamed: Gives what a file holds the model's names, where these are other ones.

    Raises:
        WeightsError: The file is missing, damaged, holds code, no tensors or no single model.
    """
    file = weights if isinstance(weights, WeightFile) else WeightFile(weights)
    expected = {} if module is None else dict(module.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    content = renamed(file.content, str(file.path)) if renamed else file.content
    if module is not None and not renamed and jax_place(content) is not None:
        found = from_jax(content, str(file.path), module)
    else:
        found = unwrap(content, str(file.path), shapes)
    if holds_adapter(found.tensors):
        raise WeightsError(
            f"{file.path} is a LoRA adapter, no whole model; give it with --adapter, and the model "
            "that it was trained on with -m, or -m and --weights"
        )
    _check_tensors(file, found.tensors, expected)
    return Checkpoint(tensors=found.tensors, unwrapped=found.describe())


def mismatch(tensors: Mapping[str, Tensor], module: nn.Module) -> str:
    """Name the first missing, unexpected and mis-shaped keys of a checkpoint; empty if all fit."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    shaped = [
        f"{name} is {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    parts = [
        f"{len(keys)} {kind} ({keys[0]}{', …' if len(keys) > 1 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shaped))
        if keys
    ]
    return ", ".join(parts)


def require_finite(module: nn.Module, origin: str) -> None:
    """Make sure that a model's parameters are finite: of others, no map can come.

    Buffers may be infinite, as bounds that nothing reaches are.

    Args:
        module: The model.
        origin: What to call its weights.

    Raises:
        WeightsError: A parameter has NaN or infinite entries.
    """
    for name, tensor in module.named_parameters():
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.detach().aminmax()):
            half = tensor.dtype is torch.float16
            raise WeightsError(
                f"{origin}: {name} has NaN or infinite entries"
                + (" as fp16; use --precision bf16 or fp32" if half else "; no map can come of it")
            )


def digest_weights(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and persistent buffers, names and shapes included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_tensors(
    file: WeightFile, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Refuse tensors that are no plain numbers, and those whose shape promises more than is there.

    Integers are quantised weights, real numbers only with scales that are kept elsewhere; what is
    counted in integers (an index, say) is known to the model as such.

    Raises:
        WeightsError: One of them is such a tensor.
    """
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not plain or tensor.is_complex():
            kind = "without data" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
            raise WeightsError(
                f"{file.path}: {name} is {kind}; expected a dense tensor of real numbers"
            )
        counted = name in expected and not expected[name].is_floating_point()
        weights = name in expected or name.endswith((".weight", ".bias"))
        if weights and not (tensor.is_floating_point() or counted):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsError(
                f"{file.path}: {name} is {kind}; expected real numbers: quantised weights mean "
                "nothing without their scales; save the model in float32, float16 or bfloat16"
            )
    file.check_size(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
