"""Where a model keeps its blocks and its patch embedding; knows nothing of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitviz.errors import UnsupportedModelError

__all__ = [
    "INSTEAD",
    "block_names",
    "blocks_of",
    "has_classifier",
    "input_channels",
    "on_meta",
    "patch_embedding",
    "patch_grid",
    "patch_size",
    "pretrained_config",
    "token_head",
    "token_norm",
    "trunk",
]


Shape = tuple[int, ...]


def on_meta(module: nn.Module, shape: Shape) -> tuple[dict[str, Tensor], Tensor]:
    """Make what ``torch.func.functional_call`` needs to run a model for its shapes alone.

    Args:
        module: The model, with or without weights.
        shape: Shape of the image: (channels, height, width).

    Returns:
        Its parameters and buffers by name, and a batch of one image, all on the meta device.
    """
    state = {
        name: tensor.detach().to("meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None)
    return state, torch.empty(1, *shape, device="meta", dtype=dtype)


INSTEAD = "try a plain ViT such as deit_small"


def patch_grid(module: nn.Module, input_size: tuple[int, int], patches: int) -> tuple[int, int]:
    """Find the (rows, cols) of the patch tokens; the token count has the last word.

    Raises:
        UnsupportedModelError: No grid fits the number of patch tokens.
    """
    embed: Any = patch_embedding(module)
    candidates = []
    if hasattr(embed, "dynamic_feat_size"):
        candidates.append(tuple(embed.dynamic_feat_size(input_size)))
    candidates.append(tuple(getattr(embed, "grid_size", None) or ()))
    rows, cols = patch_size(module)
    candidates.append((input_size[0] // rows, input_size[1] // cols))
    for grid in candidates:
        if len(grid) == 2 and math.prod(grid) == patches:
            _expect_inside(module, grid, (rows, cols), input_size)
            return int(grid[0]), int(grid[1])
    raise UnsupportedModelError(
        f"{type(module).__name__} makes {patches} patch tokens of a "
        f"{input_size[0]}×{input_size[1]} image, and no grid that it declares has that many"
    )


def _expect_inside(
    module: nn.Module, grid: tuple[int, ...], patch: tuple[int, int], size: tuple[int, int]
) -> None:
    """Make sure that no patch reaches beyond the image, as where a model pads it."""
    needed = tuple(count * side for count, side in zip(grid, patch, strict=True))
    if any(need > side for need, side in zip(needed, size, strict=True)):
        whole = tuple(side // each * each for side, each in zip(size, patch, strict=True))
        raise UnsupportedModelError(
            f"{type(module).__name__} pads {size[0]}×{size[1]} images to {needed[0]}×{needed[1]}, "
            f"so some patches lie outside the image; try building it for {whole[0]}×{whole[1]}"
        )


def block_names(module: nn.Module) -> list[str]:
    """Return the names of a model's blocks; empty where they are no single sequence."""
    home = "" if trunk(module) is module else "encoder."
    return [f"{home}blocks.{index}" for index in range(len(blocks_of(module)))]


def patch_embedding(module: nn.Module) -> nn.Module | None:
    """Return the part that makes tokens of an image, None where it is not to be found."""
    owner = trunk(module)
    return getattr(owner, "patch_embed", None) or getattr(owner, "embeds", None)


def patch_size(module: nn.Module) -> tuple[int, int]:
    """Return the (height, width) of a patch in pixels, (1, 1) where the model does not say."""
    stem: Any = patch_embedding(module)
    if hasattr(stem, "feat_ratio"):  # with convolutions before it, which stride as well
        rows, cols = stem.feat_ratio(as_scalar=False)
        return int(rows), int(cols)
    for owner in (patch_embedding(module), trunk(module)):
        size = getattr(owner, "patch_size", None)
        if size:
            return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return 1, 1


def trunk(module: nn.Module) -> nn.Module:
    """Return the part that owns the blocks: the model itself, or the encoder that it wraps."""
    encoder = getattr(module, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) and hasattr(encoder, "blocks") else module


def token_norm(module: nn.Module) -> nn.Module | None:
    """Return what normalises all tokens behind the blocks; None where nothing does."""
    norm = getattr(trunk(module), "norm", None)
    return norm if isinstance(norm, nn.Module) else None


def token_head(module: nn.Module) -> Callable[[Tensor], Any] | None:
    """Return what makes a model's output of tokens behind the blocks, as timm does it.

    Returns:
        Norm and head in one; None where the model has no head apart.
    """
    head = getattr(module, "forward_head", None)
    norm = token_norm(module)
    if not callable(head) or norm is None:
        return None
    return lambda tokens: head(norm(tokens))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return a model's blocks; none where they are no single sequence."""
    blocks = getattr(trunk(module), "blocks", None)
    return list(blocks) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else []


def input_channels(module: nn.Module) -> int:
    """Count the channels of the images that a model takes, by what first takes them."""
    embed = patch_embedding(module) or module
    first = next((part for part in embed.modules() if isinstance(part, nn.Conv2d)), None)
    if first is not None:
        return first.in_channels
    flat = next((part for part in embed.modules() if isinstance(part, nn.Linear)), None)
    rows, cols = patch_size(module)
    if flat is not None and flat.in_features % (rows * cols) == 0:  # patches laid out in a row
        return flat.in_features // (rows * cols)
    return int(pretrained_config(module).get("input_size", (3,))[0])


def pretrained_config(module: nn.Module) -> Mapping[str, Any]:
    """Return what timm keeps of where a model's weights are from; empty where it keeps nothing."""
    config: Mapping[str, Any] | None = getattr(module, "pretrained_cfg", None)
    return config or {}


def has_classifier(module: nn.Module) -> bool:
    """Tell whether a model has something behind its pooling that makes logits of features.

    How many classes it declares is asked only where no part of it is known as its classifier.
    """
    getter = getattr(module, "get_classifier", None)
    found = getter() if callable(getter) else getattr(module, "head", None)
    parts = found if isinstance(found, (tuple, list)) else (found,)
    layers = [part for part in parts if isinstance(part, nn.Module)]
    if layers:
        return any(part.state_dict() for part in layers)
    return bool(getattr(module, "num_classes", 0))
