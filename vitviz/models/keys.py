"""Names of transformers' tensors, of version 4 and 5, as timm has them; opens no files."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitviz.errors import WeightsError
from vitviz.models.plans import Plan
from vitviz.models.structure import patch_embedding

__all__ = ["parted_as", "renamed", "resized", "state_of"]


_MOST_NESTED = 8
_CLASS_DISTANCES = 3  # to, from and within the class token
_JOINS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.fc1_g", "mlp.fc1_x")}
# What no class depends on: pretraining, text, and what is computed anew.
_UNUSED = re.compile(
    r"(^|\.)(mask_token|position_ids|relative_position_index|logit_scale|logit_bias"
    r"|pooler\.dense\.\w+|text_model\..*|text_projection\..*|rope_embeddings\..*)$"
)
_RENAMES = (
    (r"(vit|deit|beit|dinov2_with_registers|dinov2|ijepa|vision_model)\.(?=\w+\.)", ""),
    (r"(encoder\.layers?|model\.layer|layers?)\.(?=\d)", "blocks."),
    # Names of a block, from the inside: what is left of them tells which one is meant.
    (r"attention\.attention\.query\.", "attn.q."),
    (r"attention\.attention\.key\.", "attn.k."),
    (r"attention\.attention\.value\.", "attn.v."),
    (r"(attention|self_attn)\.([qkv])_proj\.", r"attn.\2."),
    (r"(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
    (r"(layernorm_before|layer_norm1)\.", "norm1."),
    (r"(layernorm_after|layer_norm2)\.", "norm2."),
    # Around the blocks
    (r"embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"embeddings\.distillation_token$", "dist_token"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"embeddings\.(patch_embeddings\.projection|patch_embeddings|patch_embedding)\.",
     "patch_embed.proj."),
    (r"(layernorm|post_layernorm)\.", "norm."),
    (r"(classifier|cls_classifier|visual_projection)\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
)  # fmt: skip


def renamed(content: Mapping[Any, Any], plan: Plan, origin: str, depth: int = 0) -> dict[Any, Any]:
    """Give what a checkpoint holds timm's names, in nested dicts and behind any prefix, too.

    Raises:
        WeightsError: Two tensors come to one name.
    """
    found: dict[Any, Any] = {}
    for key, value in content.items():
        name = _name(key, plan) if isinstance(key, str) else key
        if name is None:
            continue
        if name in found:
            raise WeightsError(f"{origin} holds {name} twice, once as {key}; save it once")
        nested = isinstance(value, Mapping) and depth < _MOST_NESTED
        found[name] = renamed(value, plan, origin, depth + 1) if nested else value
    return found


def state_of(tensors: Mapping[str, Tensor], plan: Plan, module: nn.Module) -> dict[str, Tensor]:
    """Bring tensors under timm's names to its forms: joined, shaped, resized.

    Those of odd shapes stay as they are, to be named where they are compared with the module's.

    Args:
        tensors: By timm's name.
        plan: By which the module was built.
        module: Which is to get them.
    """
    expected = module.state_dict()
    state = _joined(tensors, expected)
    _split_pooling(state)
    alike = {n for n in expected.keys() & state.keys() if _width(state[n]) == _width(expected[n])}
    for name in alike & {"cls_token", "pos_embed"}:  # CLIP's have fewer axes
        state[name] = state[name].reshape(1, -1, state[name].shape[-1])
    grid, before = _grid(module), plan.grid
    for name in sorted(alike):
        if name == "pos_embed":
            _place(state, grid, before, expected[name].shape[1] - math.prod(grid), plan)
        elif name.endswith("relative_position_bias_table"):
            state[name] = _relative(state[name], grid, before)
    for name in expected.keys() - state.keys():
        if plan.without_bias and re.search(plan.without_bias, name):
            state[name] = torch.zeros(expected[name].shape)
    return {name: each for name, each in state.items() if each.numel() or name in expected}


def parted_as(layers: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join or part weights as layers are that an adapter of another version changes.

    Args:
        layers: By timm's names, apart from each other or joined.
        tensors: The same, with those of whole layers or of parts.
    """
    state = dict(tensors)
    for layer, (whole, parts) in itertools.product(layers, _JOINS.items()):
        ending = next((each for each in (whole, *parts) if layer.endswith(f".{each}")), None)
        if ending is None:
            continue
        home = layer.removesuffix(ending)
        joined, names = f"{home}{whole}.weight", [f"{home}{part}.weight" for part in parts]
        if ending == whole and _go_together(state, names):
            state[joined] = torch.cat([state.pop(each) for each in names])
        elif ending != whole and joined in state and state[joined].dim() == 2:
            pieces = state.pop(joined).chunk(len(parts))
            state |= dict(zip(names, pieces, strict=False))
    return state


def resized(tensors: Iterable[str], plan: Plan, module: nn.Module) -> str:
    """Say which positions ``state_of`` fits to another grid; empty where none are."""
    before, grid = plan.grid, _grid(module)
    learned = any(name.endswith(("pos_embed", "position_bias_table")) for name in tensors)
    if before == grid or not learned:
        return ""
    return "positions of {}×{} patches resized to {}×{}".format(*before, *grid)


def _grid(module: nn.Module) -> tuple[int, int]:
    embed: Any = patch_embedding(module)
    return int(embed.grid_size[0]), int(embed.grid_size[1])


def _name(key: str, plan: Plan) -> str | None:
    if _UNUSED.search(key):
        return None
    for pattern, replacement in (*_RENAMES, *plan.renames):
        key = re.sub(rf"(?<![^.]){pattern}", replacement, key, count=1)
    unused = plan.unused and re.search(rf"(^|\.){plan.unused}$", key)
    return None if unused else key


def _joined(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join what timm has in one, where all parts are there."""
    state = dict(tensors)
    for name in expected:
        home, _, leaf = name.rpartition(".")
        for whole, parts in _JOINS.items():
            names = [f"{home.removesuffix(whole)}{part}.{leaf}" for part in parts]
            if home.endswith(whole) and _go_together(state, names):
                state[name] = torch.cat([state.pop(each) for each in names])
    # Where keys have no bias (BEiT, DINOv3), timm's two others stand apart.
    return {re.sub(r"\.attn\.([qkv])\.bias$", r".attn.\1_bias", n): t for n, t in state.items()}


def _go_together(state: Mapping[str, Tensor], names: Iterable[str]) -> bool:
    """Tell whether tensors are all there and differ in their first axis alone."""
    shapes = [state[name].shape if name in state else () for name in names]
    return all(shapes) and len({(len(shape), *shape[1:]) for shape in shapes}) == 1


def _width(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.dim() else 0


def _split_pooling(state: dict[str, Tensor]) -> None:
    """Part queries from keys and values of a pooling attention, which torch has in one."""
    for leaf in ("weight", "bias"):
        joined = state.get(f"attn_pool.qkv.{leaf}")
        if joined is not None and joined.dim() and len(joined) and len(joined) % 3 == 0:
            query, key, value = state.pop(f"attn_pool.qkv.{leaf}").chunk(3)
            state[f"attn_pool.q.{leaf}"] = query
            state[f"attn_pool.kv.{leaf}"] = torch.cat([key, value])


def _place(
    state: dict[str, Tensor],
    grid: tuple[int, int],
    before: tuple[int, int],
    prefix: int,
    plan: Plan,
) -> None:
    """Fit position embeddings to a grid, as the model itself does for other image sizes.

    Args:
        state: In which they are replaced.
        grid: (rows, cols) of the patches.
        before: The same where they come from.
        prefix: How many of timm's are of other tokens.
        plan: Of the model.
    """
    positions = state["pos_embed"]
    own = positions.shape[1] - math.prod(before)
    first, patches = positions[:, : max(own, 0)], positions[:, max(own, 0) :]
    token = state.get("cls_token")
    if own == 1 and not prefix and token is not None and token.shape == first.shape:
        state["cls_token"] = token + first  # where timm keeps it beside registers
        first = first[:, :0]
    if before != grid and patches.shape[1] == math.prod(before):
        image = patches.float().reshape(1, *before, -1).permute(0, 3, 1, 2)
        fitted = F.interpolate(image, size=grid, mode="bicubic", antialias=plan.antialias)
        patches = fitted.flatten(2).transpose(1, 2).to(positions.dtype)
    state["pos_embed"] = torch.cat([first, patches], dim=1)


def _relative(table: Tensor, grid: tuple[int, int], before: tuple[int, int]) -> Tensor:
    """Fit a table of relative positions (distances, heads) to a grid, as BEiT does."""
    old, new = (tuple(2 * side - 1 for side in each) for each in (before, grid))
    if old == new or table.dim() != 2 or len(table) != math.prod(old) + _CLASS_DISTANCES:
        return table
    distances, others = table[:-_CLASS_DISTANCES], table[-_CLASS_DISTANCES:]
    image = distances.float().reshape(*old, -1).permute(2, 0, 1).unsqueeze(0)
    fitted = F.interpolate(image, size=new, mode="bilinear")
    return torch.cat([fitted[0].flatten(1).T.to(table.dtype), others])
