"""How pixels become patch tokens, and which other tokens join them."""

from __future__ import annotations

import math

from vitviz.inspection.events import ConstantUse, Product
from vitviz.inspection.outline import outline_runs
from vitviz.inspection.parts import ExtraTokens, PatchEmbedding
from vitviz.inspection.traced import TracedModel, is_within

__all__ = ["adds_tokens", "measure_extra_tokens", "measure_patch_embedding"]


def adds_tokens(traced: TracedModel, use: ConstantUse) -> bool:
    """Tell whether a concatenation puts parameters among the tokens (not among the keys, say)."""
    inside = any(home and is_within(use.path, home) for home in traced.homes)
    return use.meaning == "concatenate" and use.axis == -2 and not inside


def measure_extra_tokens(traced: TracedModel, use: ConstantUse) -> ExtraTokens:
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


def measure_patch_embedding(traced: TracedModel, patch_tokens: int | None) -> PatchEmbedding | None:
    """Describe how pixels become so many patch tokens; None when no layer saw the image."""
    seen = [
        product
        for product in traced.trace.products
        if product.from_image and traced.stage(product.step) == 0
    ]
    if not seen:
        return None
    first = seen[0]
    name = _stem_name(traced, first)
    convolutions = [product for product in seen if product.convolution]
    if not traced.block_runs:
        convolutions = [product for product in convolutions if is_within(product.path, name)]
    grids = [product.output_shape[-2:] for product in reversed(convolutions)]
    fitting = [grid for grid in grids if len(grid) == 2 and math.prod(grid) == patch_tokens]
    grid = (fitting[0][0], fitting[0][1]) if fitting else None
    if patch_tokens is None:
        grid = _stem_grid(traced, name, convolutions)
    return PatchEmbedding(
        name=name,
        kind=type(traced.modules[name]).__name__,
        operation=type(traced.modules[first.path]).__name__,
        kernel=first.kernel,
        stride=first.stride,
        in_channels=first.inputs,
        out_channels=first.outputs,
        convolutions=len(convolutions),
        grid=grid,
        patch_tokens=patch_tokens,
    )


def _stem_name(traced: TracedModel, first: Product) -> str:
    """Name the module that turns pixels into patches: the outermost one with the first layer."""
    name = first.path.partition(".")[0]
    if traced.block_runs:
        return name
    # The outermost may be a mere list of all stages' stems (Twins), or nearly the whole model.
    ran = [run.path for run in outline_runs(traced) if is_within(first.path, run.path)]
    return ran[0] if ran else name


def _stem_grid(
    traced: TracedModel, name: str, convolutions: list[Product]
) -> tuple[int, int] | None:
    """Find the (rows, cols) of what the stem hands on, in a model without a token sequence."""
    stem = traced.trace.run_of(name)
    within = [product for product in convolutions if is_within(product.path, name)]
    if stem is None or stem.output_shape is None or not within:
        return None
    if stem.output_shape[0] != 1:  # windows, or whatever else was folded into the batch
        return None
    last = within[-1]
    # The stem may flatten its map or put the channels last, which moves no value.
    if len(last.output_shape) == 4 and math.prod(last.output_shape) == math.prod(stem.output_shape):
        return last.output_shape[2], last.output_shape[3]
    # It may pool after its convolutions, too; then its output is still (1, channels, rows, cols).
    if len(stem.output_shape) == 4 and stem.output_shape[1] == last.outputs:
        return stem.output_shape[2], stem.output_shape[3]
    return None
