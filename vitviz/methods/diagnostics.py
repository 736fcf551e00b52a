"""Numbers that tell when a map may mislead; draws no conclusion from them.

Sources: Darcet et al. 2024, "Vision Transformers Need Registers" (arXiv 2309.16588), for patch
tokens of large norm, which hold facts about the image and none about their place, and for the
attention that prefix tokens draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitviz.models.attention import Attention, at_least_float32

__all__ = ["gradient_norm_product", "outlier_tokens", "output_norm_product", "prefix_attention"]


_QUERIES = 16  # rows that stand for all, where a head reads many tokens
_OUTLIER = 5.0  # times the median norm; in large models outliers have ten times, others below two


def prefix_attention(records: Sequence[Attention], readout: Tensor, prefix_tokens: int) -> Tensor:
    """Compute the share of attention that goes to prefix tokens, which no map shows.

    Args:
        records: One for each block.
        readout: (tokens) above 0 where the head reads; up to 16 of these are asked.
        prefix_tokens: Number of tokens before the patch tokens.

    Returns:
        (batch), the mean over blocks, heads and tokens asked, in [0, 1].
    """
    read = readout.nonzero().flatten()
    first, last = int(read[0]), int(read[-1])
    asked = slice(first, last + 1, math.ceil((last + 1 - first) / _QUERIES))
    shares = [
        record.probabilities(slice(None), asked)[..., :prefix_tokens].sum(dim=-1).mean(dim=(1, 2))
        for record in records
    ]
    return torch.stack(shares).mean(dim=0)


def outlier_tokens(tokens: Tensor, prefix_tokens: int) -> Tensor:
    """Find patch tokens of more than five times the median norm.

    Args:
        tokens: (batch, tokens, channels), behind the last block.
        prefix_tokens: Number of tokens before the patch tokens.

    Returns:
        (batch, patches) of bool.
    """
    norms = torch.linalg.vector_norm(at_least_float32(tokens.detach()[:, prefix_tokens:]), dim=-1)
    median = norms.median(dim=1, keepdim=True).values
    found: Tensor = norms > _OUTLIER * median
    return found


def gradient_norm_product(values: Tensor, gradient: Tensor) -> Tensor:
    """Compute ‖x‖·‖∂y/∂x‖, above which no change of y by wiping out x is to be expected.

    Args:
        values: x, (batch, ...).
        gradient: ∂y/∂x.

    Returns:
        (batch), in units of y.
    """
    sizes = (
        torch.linalg.vector_norm(at_least_float32(each).flatten(1), dim=1)
        for each in (values.detach(), gradient)
    )
    return torch.stack(list(sizes)).prod(dim=0)


def output_norm_product(record: Attention, gradient: Tensor) -> Tensor:
    """Compute ‖O‖·‖∂y/∂O‖ (batch) of an attention's output O."""
    assert record.output is not None
    return gradient_norm_product(record.output, gradient)
