"""The first part of a model: from pixels to the tokens that enter the first block."""

from __future__ import annotations

import math
from dataclasses import replace

from vitviz.inspection.embedding import adds_tokens, measure_extra_tokens, measure_patch_embedding
from vitviz.inspection.parts import Tokenization
from vitviz.inspection.positions import measure_positions
from vitviz.inspection.traced import TracedModel, is_within, norms_between, sequence_length
from vitviz.models.catalogue import Support

__all__ = ["measure_tokenization"]


def measure_tokenization(traced: TracedModel, support: Support) -> Tokenization:
    """Measure how an image becomes the token sequence that enters the first block."""
    trace = traced.trace
    cost = traced.part_cost(0)
    shape = cost.output_shape if cost else None
    joined = [use for use in trace.constant_uses if adds_tokens(traced, use)]
    extra = tuple(measure_extra_tokens(traced, use) for use in joined)
    tokens = sequence_length(shape)
    # Of a model with two sequences (CrossViT), the blocks' first is meant: its tokens are as wide.
    front = sum(
        use.constant_shape[-2]
        for use in joined
        if shape and use.step < traced.blocks_begin and use.constant_shape[-1] == shape[-1]
    )
    patches = measure_patch_embedding(traced, None if tokens is None else tokens - front)
    if patches and patches.grid is None and support.rollout and support.grid:
        patches = replace(patches, grid=support.grid)
    home = patches.name if patches else None
    norms = [
        traced.layer(run)
        for run in norms_between(traced, 0, traced.blocks_begin)
        if cost and home and not run.path.startswith(home)
    ]
    return Tokenization(
        cost=cost,
        patches=patches,
        extra_tokens=extra,
        positions=measure_positions(traced),
        norms=tuple(norms),
        later_convolutions=sum(
            math.prod(product.kernel) > 1 and not (home and is_within(product.path, home))
            for product in trace.products
        ),
        tokens=tokens,
        width=shape[-1] if shape and tokens is not None else None,
    )
