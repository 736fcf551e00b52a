"""Attention rollout, and gradient rollout: which patches flow into the tokens that are read.

Sources: Abnar & Zuidema 2020 (arXiv 2005.00928) for rollout; the gradient form follows
J. Gildenblat, "Exploring Explainability for Vision Transformers" (2020), with gradients with
respect to the probabilities of the same block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from vitviz.methods.method import (
    ClassMethod,
    Method,
    TokenMap,
    option,
    require_share,
    require_start,
)
from vitviz.options import HeadFusion

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.methods.forward import ForwardPass, Target

__all__ = ["GradRollout", "Rollout"]

_discard_option: Any = partial(
    option,
    0.9,
    "Share of the lowest attention set to 0, in [0, 1).",
    doc="Share of the lowest fused attention set to 0, per image and block, in [0, 1).",
    metavar="R",
)
_start_option: Any = partial(
    option,
    0,
    "Leave out the blocks before this one; blocks count from 0.",
    doc="Blocks before this one are left out; blocks count from 0.",
    metavar="N",
)


@dataclass(frozen=True, kw_only=True)
class Rollout(Method):
    """Attention rollout, which knows no class (Abnar & Zuidema 2020, arXiv 2005.00928).

    R = Â_{L−1} ⋯ Â_s, with Â = (F + I)/2, rows divided by their sums, and F the attention of a
    block, its heads fused and its lowest entries discarded. The map is wᵀR, w being the weights
    with which the model's head pools tokens.

    Attributes:
        discard: Share of the lowest fused attention set to 0, per image and block, in [0, 1).
        start_layer: Blocks before this one are left out.
        head_fusion: Reduction over heads.
    """

    name: ClassVar[str] = "rollout"
    help: ClassVar[str] = (
        "Draw attention rollout: which patches flow into the tokens that the classifier uses. "
        "The same for all classes."
    )

    discard: float = _discard_option()
    start_layer: int = _start_option()
    head_fusion: HeadFusion = option(
        HeadFusion.MAX,
        "How the heads of a block become one map.",
        doc="How heads become one map: ``mean``, ``max`` or ``min``.",
    )

    def __post_init__(self) -> None:
        """Check the ranges; raises ``OptionError``."""
        require_share(self.discard)
        require_start(self.start_layer)
        super().__post_init__()

    @property
    def first_block(self) -> int:
        """The first block that takes part."""
        return self.start_layer

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Compute wᵀR (batch, tokens)."""
        from vitviz.methods.fusion import fuse_heads

        fusions = [fuse_heads(record, self.head_fusion) for record in forward.records]
        return TokenMap(forward.rolled_out(fusions, self.discard))


@dataclass(frozen=True, kw_only=True)
class GradRollout(ClassMethod):
    """Rollout of attention weighted with the gradient of a class's logit.

    As ``Rollout``, with F = relu(mean over heads of A ⊙ ∂y/∂A), the gradient of the logit y with
    respect to the attention probabilities A of the same block (J. Gildenblat 2020).

    Attributes:
        discard: As for ``Rollout``.
        start_layer: As for ``Rollout``.
    """

    name: ClassVar[str] = "grad-rollout"
    help: ClassVar[str] = (
        "Draw gradient rollout: rollout of the attention whose gradient supports a class."
    )
    needs_attention_gradients: ClassVar[bool] = True

    discard: float = _discard_option()
    start_layer: int = _start_option()

    def __post_init__(self) -> None:
        """Check the ranges; raises ``OptionError``."""
        require_share(self.discard)
        require_start(self.start_layer)
        super().__post_init__()

    @property
    def first_block(self) -> int:
        """The first block that takes part."""
        return self.start_layer

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Compute wᵀR (batch, tokens) for a class."""
        from vitviz.methods.diagnostics import output_norm_product
        from vitviz.methods.fusion import fuse_with_gradient

        assert target is not None
        gradients = target.output_gradients(forward.records)
        fusions = list(map(fuse_with_gradient, forward.records, gradients))
        return TokenMap(
            forward.rolled_out(fusions, self.discard),
            output_norm_product(forward.records[-1], gradients[-1]),
        )
