"""What tokens contribute to a class: x ⊙ ∂y/∂x summed over channels, and shares of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitviz.models.attention import at_least_float32

__all__ = ["mean_share", "signed_evidence"]


def signed_evidence(tokens: Tensor, gradient: Tensor) -> Tensor:
    """Compute the evidence Σ over channels of x ⊙ ∂y/∂x, sign kept.

    Of a linear network without biases, the evidence of all tokens sums to y.

    Args:
        tokens: x, (batch, tokens, channels).
        gradient: ∂y/∂x.

    Returns:
        (batch, tokens).
    """
    # Under the linearised backward pass ∂y/∂x is the linear map from tokens to logit, so x ⊙ ∂y/∂x
    # splits the logit into contributions; the tokens at each depth give one such split.
    return (at_least_float32(tokens.detach()) * at_least_float32(gradient)).sum(dim=-1)


def mean_share(relevances: Sequence[Tensor]) -> Tensor:
    """Average relevances (batch, tokens), each as shares of its sum; none where there is none."""
    tiny = torch.finfo(relevances[0].dtype).tiny
    shares = [each / each.sum(dim=1, keepdim=True).clamp(min=tiny) for each in relevances]
    return torch.stack(shares).mean(dim=0)
