"""Weights as big_vision and Google's ViTs name them, brought to timm's names; opens no file.

timm itself knows which of them is which, and fills a model of the file's own sizes here: what
differs from the model that is asked for is judged later, as with any other file.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitviz.errors import WeightsError, first_line
from vitviz.models.unwrapping import Unwrapped

__all__ = ["from_jax", "jax_place"]


_PLACES = ("", "opt/target/", "params/", "params/img/")  # those that timm looks at


def jax_place(content: Mapping[Any, Any]) -> str | None:
    """Return what stands before the names of a ViT in JAX's manner; None where there is none."""
    return next((each for each in _PLACES if f"{each}embedding/kernel" in content), None)


def from_jax(content: Mapping[str, Any], origin: str, module: nn.Module) -> Unwrapped:
    """Bring JAX's arrays to the names and layouts of timm.

    Args:
        content: Tensors by JAX's names.
        origin: What to call the file.
        module: The model that is to get them, with weights or without.

    Raises:
        WeightsError: timm loads none into such a model, or arrays are missing or left over.
    """
    place = jax_place(content)
    assert place is not None
    kind = type(module).__name__
    if not hasattr(module, "load_pretrained"):
        raise WeightsError(
            f"{origin} holds weights as JAX names them, which timm loads into no {kind}; name the "
            "model that it was trained as, with -m"
        )
    arrays = {n: t for n, t in content.items() if n.startswith(place) and isinstance(t, Tensor)}
    arrays = {name: t.float() if t.is_floating_point() else t for name, t in arrays.items()}
    try:
        _give_class_its_position(arrays, place, module)
        target = _empty(module, arrays, place)
        target.load_pretrained(_archive(arrays))  # type: ignore[operator]
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise _misfit(origin, kind, first_line(error)) from error
    tensors = dict(target.state_dict())
    if missing := [name for name, tensor in tensors.items() if bool(tensor.isnan().all())]:
        raise _misfit(origin, kind, f"nothing in it for {missing[0]}")
    held, taken = (sum(t.numel() for t in each.values()) for each in (arrays, tensors))
    if held != taken:
        raise _misfit(origin, kind, f"it holds {held:,} numbers, and {taken:,} are of use")
    others = sorted({"/".join(n.split("/")[:2]) for n in content if n not in arrays})
    return Unwrapped(
        tensors=tensors,
        place=tuple(place.split("/")[:-1]),
        left_out=tuple(others),
        remark="JAX's names brought to timm's",
    )


def _give_class_its_position(arrays: dict[str, Tensor], place: str, module: nn.Module) -> None:
    """Add the position of the class token, which big_vision leaves without, as timm's nothing."""
    name = f"{place}pos_embedding"
    if f"{place}cls" in arrays and name in arrays and not getattr(module, "no_embed_class", False):
        patches = arrays[name]
        arrays[name] = torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1)


def _empty(module: nn.Module, arrays: Mapping[str, Tensor], place: str) -> nn.Module:
    """Copy a model, without weights (NaN) and with the file's patch size, positions and classes."""
    target: Any = deepcopy(module)
    head = arrays.get(f"{place}head/bias")
    classes = 0 if head is None else head.numel()
    if classes != target.num_classes:
        target.reset_classifier(classes)
    kernel = arrays[f"{place}embedding/kernel"]  # (height, width, channels, width of tokens)
    positions = f"{place}pos_embedding"
    if positions not in arrays:
        positions = f"{place}Transformer/posembed_input/pos_embedding"
    target.patch_embed.proj.weight = nn.Parameter(kernel.permute(3, 2, 0, 1).to("meta"))
    target.pos_embed = nn.Parameter(arrays[positions].to("meta"))
    target.to_empty(device="cpu").float()
    with torch.no_grad():
        for tensor in target.state_dict().values():
            tensor.fill_(torch.nan)
    return target  # type: ignore[no-any-return]


def _archive(arrays: Mapping[str, Tensor]) -> io.BytesIO:
    """Write arrays as the npz file that timm reads, in memory."""
    file = io.BytesIO()
    # The stubs take any name of an array for that of an option.
    np.savez(file, **{name: each.numpy() for name, each in arrays.items()})  # type: ignore[arg-type]
    file.seek(0)
    return file


def _misfit(origin: str, kind: str, reason: str) -> WeightsError:
    return WeightsError(
        f"{origin} holds JAX weights that do not fit this {kind} ({reason}); name the model that "
        "it was trained as, with -m"
    )
