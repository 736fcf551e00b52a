"""What a forward pass left for a method, and what it is asked about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitviz.methods.fusion import Fusion
from vitviz.methods.row_form import attention_rollout, pooled_readout
from vitviz.models.attention import Attention
from vitviz.models.capture import output_gradients
from vitviz.models.stages import StageLayout
from vitviz.models.tokens import TokenLayout

__all__ = ["ForwardPass", "Target"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardPass:
    """What a capture saw of a forward pass of a batch.

    Attributes:
        layout: The model's tokens, or the places of its stages.
        records: Attention of the blocks that take part and, behind it, of the calls that pool
            the tokens after them.
        tokens: (batch, tokens, channels) before and after the last block; where a method needs
            block inputs, before and after each. Of a model of several stages, after each.
        grid: (rows, cols) of maps.
        dtype: Of the numbers that maps are computed with.
        device: Where the model is.
        norm: The model's normalisation of all tokens behind the blocks; None without one.
        head: Makes logits (batch, classes) of tokens behind a block; None where that is not known.
        outputs: Of the parts that a method watches.
    """

    layout: TokenLayout | StageLayout
    records: Sequence[Attention]
    tokens: Sequence[Tensor]
    grid: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    norm: nn.Module | None = None
    head: Callable[[Tensor], Tensor] | None = None
    outputs: Sequence[Tensor] = ()

    @property
    def blocks(self) -> Sequence[Attention]:
        """Attention of the blocks that take part, in execution order."""
        return self.records[: len(self.records) - self.layout.tail]

    @property
    def depths(self) -> Sequence[Tensor]:
        """Tokens (batch, tokens, channels) at depths that all passes on its way to the head."""
        return self.tokens if isinstance(self.layout, StageLayout) else self.tokens[:-1]

    def readout(self, fusions: Sequence[Fusion]) -> Tensor:
        """Compute w (batch, tokens), the weights with which the model's head pools tokens.

        Args:
            fusions: The fused attention of all ``records``; that behind the blocks is the
                readout of a head that pools by attention.
        """
        batch, _, _, tokens = self.blocks[-1].shape
        if self.layout.tail:
            return pooled_readout(fusions[len(self.blocks) :], tokens)
        assert isinstance(self.layout, TokenLayout)  # others have no blocks that attend
        weights = self.layout.readout_weights(tokens)
        return weights.to(self.device, self.dtype).expand(batch, tokens)

    def since(self, first: int) -> ForwardPass:
        """Return it without the blocks before this one of those that take part."""
        return replace(self, records=self.records[first:])

    def rolled_out(self, fusions: Sequence[Fusion], discard: float) -> Tensor:
        """Compute wᵀR (batch, tokens) of the fused attention of all ``records``."""
        of_blocks, readout = fusions[: len(self.blocks)], self.readout(fusions)
        return attention_rollout(self.blocks, of_blocks, readout, discard=discard)

    def row_of(self, patch: tuple[int, int]) -> Tensor:
        """Return the w (batch, tokens) that reads one patch (row, col) alone."""
        batch, _, _, tokens = self.blocks[-1].shape
        row = torch.eye(tokens, device=self.device, dtype=self.dtype)[self.token_of(patch)]
        return row.expand(batch, tokens)

    def token_of(self, patch: tuple[int, int]) -> int:
        """Return the position of a patch (row, col) among the tokens."""
        return self.layout.prefix_tokens + patch[0] * self.grid[1] + patch[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """What to explain.

    Attributes:
        score: y, the logit of a class, the difference of two or another score, summed over the
            batch; images do not mix, so that the gradients of the sum give each image its own.
        score_of: Makes that score of logits (batch, classes).
        is_last: Whether no other score is asked of this forward pass, whose graph is freed then.
    """

    score: Tensor
    score_of: Callable[[Tensor], Tensor]
    is_last: bool

    def again(self, logits: Tensor) -> Target:
        """Ask the same of other logits (batch, classes)."""
        return replace(self, score=self.score_of(logits))

    def gradients(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute ∂y/∂x for each of some tensors x of the forward pass."""
        return list(torch.autograd.grad(self.score, list(tensors), retain_graph=not self.is_last))

    def output_gradients(self, records: Sequence[Attention]) -> list[Tensor]:
        """Compute ∂y/∂O for the output O of each attention."""
        return output_gradients(list(records), self.score, last=self.is_last)
