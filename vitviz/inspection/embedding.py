"""How pixels become patch tokens, and which other tokens join them."""

from __future__ import annotations

import math

from vitviz.inspection.events import ConstantUse
from vitviz.inspection.parts import ExtraTokens, PatchEmbedding
from vitviz.inspection.traced import TracedModel, is_within

__all__ = ["adds_tokens", "extra_tokens", "patch_embedding"]


def adds_tokens(traced: TracedModel, use: ConstantUse) -> bool:
    """Tell whether a concatenation puts parameters among the tokens (not among the keys, say)."""
    inside = any(home and is_within(use.path, home) for home in traced.homes)
    return use.meaning == "concatenate" and use.axis == -2 and not inside


def extra_tokens(traced: TracedModel, use: ConstantUse) -> ExtraTokens:
    """Describe the tokens that a concatenation adds."""
    # A token that comes with its own position is made of two parameters.
    names = [name for name in use.names if "pos" not in name] or list(use.names)
    parameter = names[0] if names else "computed"
    words = {"cls": "class", "dist": "distillation", "reg": "register"}
    leaf = parameter.rpartition(".")[2]
    kinds = [word for start, word in words.items() if leaf.startswith(start)]
    joins = ("before the blocks", "inside the blocks", "after the blocks")
    return ExtraTokens(
        kind=kinds[0] if kinds else leaf,
        parameter=parameter,
        count=use.constant_shape[-2],
        joins=joins[traced.stage(use.step)] if traced.block_runs else None,
    )


def patch_embedding(traced: TracedModel, patch_tokens: int | None) -> PatchEmbedding | None:
    """Describe how pixels become so many patch tokens; None when no layer saw the image."""
    seen = [
        product
        for product in traced.trace.products
        if product.from_image and traced.stage(product.step) == 0
    ]
    if not seen:
        return None
    first = seen[0]
    name = first.path.partition(".")[0]
    convolutions = [product for product in seen if product.convolution]
    if not traced.block_runs:
        convolutions = [product for product in convolutions if is_within(product.path, name)]
    grids = [product.output_shape[-2:] for product in reversed(convolutions)]
    fitting = [grid for grid in grids if len(grid) == 2 and math.prod(grid) == patch_tokens]
    return PatchEmbedding(
        name=name,
        kind=type(traced.modules[name]).__name__,
        operation=type(traced.modules[first.path]).__name__,
        kernel=first.kernel,
        stride=first.stride,
        in_channels=first.inputs,
        out_channels=first.outputs,
        convolutions=len(convolutions),
        grid=(fitting[0][0], fitting[0][1]) if fitting else None,
        patch_tokens=patch_tokens,
    )
