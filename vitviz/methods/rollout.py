"""Attention rollout, and gradient rollout: which patches flow into the tokens that are read.

Sources: Abnar & Zuidema 2020 (arXiv 2005.00928) for rollout; the gradient form follows
J. Gildenblat, "Exploring Explainability for Vision Transformers" (2020), with gradients with
respect to the probabilities of the same block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vitviz.methods.method import (
    ClassMethod,
    Method,
    TokenMap,
    option,
    require_share,
    require_start,
)
from vitviz.options import HeadFusion, Word

if TYPE_CHECKING:  # these rooms load torch
    from torch import Tensor

    from vitviz.methods.forward import ForwardPass, Target
    from vitviz.methods.fusion import Fusion

__all__ = ["GradRollout", "Rollout", "Sweep"]

_DISCARDS = tuple(tenth / 10 for tenth in range(10))
_Heads = Callable[[slice], "list[Fusion]"]


class Sweep(Word):
    """What changes from frame to frame of an animation."""

    DISCARD = "discard"
    LAYERS = "layers"
    HEADS = "heads"


@dataclass(frozen=True, kw_only=True)
class _RolledOut(Method):
    """What both rollouts are: a product of blocks, from one on, their lowest attention discarded.

    Attributes:
        discard: Share of the lowest fused attention set to 0, per image and block, in [0, 1).
        start_layer: Blocks before this one are left out.
        animate: What changes from frame to frame; None: there is one map.
    """

    discard: float = option(
        0.9,
        "Share of the lowest attention set to 0, in [0, 1).",
        doc="Share of the lowest fused attention set to 0, per image and block, in [0, 1).",
        metavar="R",
    )
    start_layer: int = option(
        0,
        "Leave out the blocks before this one; blocks count from 0.",
        doc="Blocks before this one are left out; blocks count from 0.",
        metavar="N",
    )
    animate: Sweep | None = option(
        None,
        "Write an animation (GIF, or --format webp): a frame for each discard ratio from 0 to 0.9, "
        "for each block to start from, or for each head alone.",
        doc='``"discard"``, ``"layers"`` or ``"heads"``: relevance is (frames, rows, cols), a map '
        "for each discard ratio from 0 to 0.9, for each block to start from, or for each head "
        "alone.",
        metavar="discard|layers|heads",
    )

    def __post_init__(self) -> None:
        """Check the ranges; raises ``OptionError``."""
        require_share(self.discard)
        require_start(self.start_layer)
        super().__post_init__()

    @property
    def axes(self) -> tuple[str, ...]:
        """Of each frame of an animation there is a map."""
        return ("rows", "cols") if self.animate is None else ("frames", "rows", "cols")

    @property
    def file_name(self) -> str:
        """An animation is no other method, and has another name than a map."""
        return self.name if self.animate is None else f"{self.name}.{self.animate}"

    @property
    def first_block(self) -> int:
        """The first block that takes part."""
        return self.start_layer

    @property
    def still(self) -> Method:
        """The method of one map."""
        return replace(self, animate=None)

    def frame_name(self, position: int) -> str:
        """Say what one frame shows."""
        if self.animate is Sweep.DISCARD:
            return f"discard {_DISCARDS[position]:g}"
        if self.animate is Sweep.LAYERS:
            return f"from block {self.start_layer + position}"
        return f"head {position}"

    def to_record(self) -> dict[str, Any]:
        """Return the options; without an animation, those that there were before it."""
        record = super().to_record()
        if self.animate is None:
            del record["animate"]
        return record

    def _rolled_out(self, forward: ForwardPass, fused: _Heads) -> Tensor:
        """Compute wᵀR (batch, tokens), or (batch, frames, tokens) of an animation.

        Args:
            forward: What was seen of a forward pass.
            fused: Gives the fused attention of all its records, of some heads in its blocks.
        """
        import torch

        every, blocks = fused(slice(None)), len(forward.blocks)
        if self.animate is None:
            return forward.rolled_out(every, self.discard)
        if self.animate is Sweep.DISCARD:
            frames = [forward.rolled_out(every, share) for share in _DISCARDS]
        elif self.animate is Sweep.LAYERS:
            frames = [
                forward.since(first).rolled_out(every[first:], self.discard)
                for first in range(blocks)
            ]
        else:
            heads = min(record.shape[1] for record in forward.blocks)
            pooled = every[blocks:]  # which may have other heads
            frames = [
                forward.rolled_out(fused(slice(head, head + 1))[:blocks] + pooled, self.discard)
                for head in range(heads)
            ]
        return torch.stack(frames, dim=1)


@dataclass(frozen=True, kw_only=True)
class Rollout(_RolledOut):
    """Attention rollout, which knows no class (Abnar & Zuidema 2020, arXiv 2005.00928).

    R = Â_{L−1} ⋯ Â_s, with Â = (F + I)/2, rows divided by their sums, and F the attention of a
    block, its heads fused and its lowest entries discarded. The map is wᵀR, w being the weights
    with which the model's head pools tokens.

    Attributes:
        discard: Share of the lowest fused attention set to 0, per image and block, in [0, 1).
        start_layer: Blocks before this one are left out.
        animate: What changes from frame to frame; None: there is one map.
        head_fusion: Reduction over heads.
    """

    name: ClassVar[str] = "rollout"
    help: ClassVar[str] = (
        "Draw attention rollout: which patches flow into the tokens that the classifier uses. "
        "The same for all classes."
    )

    head_fusion: HeadFusion = option(
        HeadFusion.MAX,
        "How to fuse the heads of a block into one map.",
        doc="How heads become one map: ``mean``, ``max`` or ``min``.",
    )

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Compute wᵀR (batch, tokens), or (batch, frames, tokens)."""
        from vitviz.methods.fusion import fuse_heads

        def fused(heads: slice) -> list[Fusion]:
            return [fuse_heads(record, self.head_fusion, heads) for record in forward.records]

        return TokenMap(self._rolled_out(forward, fused))


@dataclass(frozen=True, kw_only=True)
class GradRollout(_RolledOut, ClassMethod):
    """Rollout of attention weighted with the gradient of a class's logit.

    As ``Rollout``, with F = relu(mean over heads of A ⊙ ∂y/∂A), the gradient of the logit y with
    respect to the attention probabilities A of the same block (J. Gildenblat 2020).

    Attributes:
        discard: As for ``Rollout``.
        start_layer: As for ``Rollout``.
        animate: As for ``Rollout``.
    """

    name: ClassVar[str] = "grad-rollout"
    help: ClassVar[str] = (
        "Draw gradient rollout: rollout of the attention whose gradient supports a class."
    )
    needs_attention_gradients: ClassVar[bool] = True

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Compute wᵀR (batch, tokens), or (batch, frames, tokens), for a class."""
        from vitviz.methods.diagnostics import output_norm_product
        from vitviz.methods.fusion import fuse_with_gradient

        assert target is not None
        gradients = target.output_gradients(forward.records)

        def fused(heads: slice) -> list[Fusion]:
            pairs = zip(forward.records, gradients, strict=True)
            return [fuse_with_gradient(record, gradient, heads) for record, gradient in pairs]

        return TokenMap(
            self._rolled_out(forward, fused),
            output_norm_product(forward.records[-1], gradients[-1]),
        )
