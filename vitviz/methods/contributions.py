"""What tokens contribute to a class: x ⊙ ∂y/∂x summed over channels, and shares of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitviz.models.attention import at_least_float32

__all__ = ["mean_share", "signed_evidence"]


def signed_evidence(tokens: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Average over block inputs x the evidence Σ over channels of x ⊙ ∂y/∂x, sign kept.

    Of a linear network without biases, the evidence of all tokens sums to y.

    Args:
        tokens: x of each block, (batch, tokens, channels).
        gradients: ∂y/∂x of each.

    Returns:
        (batch, tokens).
    """
    # Under the linearised backward pass ∂y/∂x is the linear map from tokens to logit, so x ⊙ ∂y/∂x
    # splits the logit into contributions; each block's input gives one such split.
    evidence = [
        (at_least_float32(each.detach()) * at_least_float32(gradient)).sum(dim=-1)
        for each, gradient in zip(tokens, gradients, strict=True)
    ]
    return torch.stack(evidence).mean(dim=0)


def mean_share(relevances: Sequence[Tensor]) -> Tensor:
    """Average relevances (batch, tokens), each as shares of its sum; none where there is none."""
    tiny = torch.finfo(relevances[0].dtype).tiny
    shares = [each / each.sum(dim=1, keepdim=True).clamp(min=tiny) for each in relevances]
    return torch.stack(shares).mean(dim=0)
