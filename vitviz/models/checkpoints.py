"""Reading, checking and naming weights files.

Pickled code is never run: torch checkpoints are read with ``weights_only=True``.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitviz.errors import WeightsError, first_line

__all__ = [
    "Checkpoint",
    "WEIGHT_FILES",
    "digest_weights",
    "mismatch",
    "read_checkpoint",
    "require_finite",
]


WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""What weights are called in model folders, the safest first."""
_EMA_KEYS = ("state_dict_ema", "model_ema")
_STATE_KEYS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("_orig_mod.", "module.", "model.")
_MOST_WRAPPINGS = 8
_MOST_EXPANSION = 16  # times its file that a checkpoint may fill; torch itself compresses nothing


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """The tensors of a weights file, unwrapped.

    Attributes:
        tensors: By parameter name.
        is_ema: Whether the file held an averaged copy beside the raw weights, which was taken.
    """

    tensors: dict[str, Tensor]
    is_ema: bool


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a safetensors file or a torch checkpoint, and unwrap what trainers wrap around it.

    Raises:
        WeightsError: The file is missing, damaged, holds code, or holds no tensors.
    """
    if not path.is_file():
        raise WeightsError(f"--weights {path} is not a file; give a .safetensors, .pth or .pt file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    wrapped, is_ema = _unwrap(content)
    tensors = {
        name: tensor
        for name, tensor in wrapped.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if not tensors:
        raise WeightsError(f"{path} holds no tensors; expected a model's state dict")
    _check_tensors(path, tensors)
    return Checkpoint(tensors=_strip_prefixes(tensors), is_ema=is_ema)


def mismatch(tensors: Mapping[str, Tensor], module: nn.Module) -> str:
    """Name the first missing, unexpected and mis-shaped keys of a checkpoint, in one clause."""
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
    return ", ".join(parts) or "the tensors do not fit"


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


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    import safetensors
    import safetensors.torch

    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except Exception as error:  # a header may promise anything
        raise WeightsError(
            f"{path} is no readable safetensors file: {first_line(error)}"
        ) from error
    return tensors


def _read_torch(path: Path) -> Mapping[str, Any]:
    _refuse_bomb(path)
    try:
        # timm's training script stores its arguments as a Namespace, which is data alone.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is no plain torch checkpoint: it is damaged, or holds Python "
            "objects beside tensors, which are never loaded since loading them can run code; "
            "save model.state_dict() alone, as .safetensors best of all"
        ) from error
    except Exception as error:  # damaged pickles make their reader raise almost anything
        raise WeightsError(
            f"{path} is no readable torch checkpoint ({first_line(error)})"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}; expected a model's state dict"
        )
    return content


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive that unpacks to many times its size, before anything is unpacked.

    Raises:
        WeightsError: It does, or its directory cannot be read.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path} is a damaged archive ({first_line(error)})") from error
    _check_size(path, unpacked)


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no plain numbers, and those whose shape promises more than is there.

    Raises:
        WeightsError: One of them is such a tensor.
    """
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not plain or tensor.is_complex():
            kind = "without data" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
            raise WeightsError(f"{path}: {name} is {kind}; expected a dense tensor of real numbers")
    _check_size(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))


def _check_size(path: Path, size: int) -> None:
    held = path.stat().st_size
    if size > _MOST_EXPANSION * held:
        raise WeightsError(f"{path} has {held:,} bytes and would fill {size:,}: refused")


def _unwrap(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    is_ema = False
    for _ in range(_MOST_WRAPPINGS):  # a mapping may hold itself
        inner = ((key, content.get(key)) for key in (*_EMA_KEYS, *_STATE_KEYS))
        found = next(((k, v) for k, v in inner if isinstance(v, Mapping) and v), None)
        if found is None:
            break
        is_ema, content = is_ema or found[0] in _EMA_KEYS, found[1]
    return content, is_ema


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the prefixes that wrappers put before every name, in whatever order they nest."""
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
