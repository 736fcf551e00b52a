"""A vision transformer whose classifier reads the class token beside the average of the patches."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["CLASS_BESIDE_AVERAGE", "TwofoldVisionTransformer"]


CLASS_BESIDE_AVERAGE = "token+avg"
"""Its ``global_pool``, a word that timm does not have."""


class TwofoldVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """DINOv2 with a linear classifier, as transformers has it."""

    def __init__(self, *, num_classes: int, **arguments: Any) -> None:
        """Build it.

        Args:
            num_classes: Of its classifier.
            arguments: As for timm's vision transformer.
        """
        super().__init__(num_classes=0, global_pool="token", **arguments)
        self.global_pool = CLASS_BESIDE_AVERAGE
        self.num_classes = num_classes
        self.head_hidden_size = 2 * self.embed_dim
        self.head = nn.Linear(self.head_hidden_size, num_classes)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Return (batch, 2 · channels) of tokens (batch, tokens, channels)."""
        return torch.cat([x[:, 0], x[:, self.num_prefix_tokens :].mean(dim=1)], dim=1)
