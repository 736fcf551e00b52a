"""Gradient relevance: r carried down through the attention that supports a class.

Sources: Chefer, Gur & Wolf 2021 (arXiv 2103.15679) for the classic form; the linearised backward
pass and the weighing of values: see ``linear_backward`` and ``row_form``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vitviz.methods.method import ClassMethod, Method, TokenMap, option, require_start
from vitviz.options import AttentionRule

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.methods.forward import ForwardPass, Target

__all__ = ["Relevance"]


@dataclass(frozen=True, kw_only=True)
class Relevance(ClassMethod):
    """Gradient relevance with a linearised backward pass and weighted values.

    r ← r + r·E from the last block down, E = mean over heads of relu(A ⊙ ∂y/∂A), column j times
    ‖W_o v_j‖, which is how much the value of token j can move others. It starts from
    r = relu(Σ over channels of x ⊙ ∂y/∂x) behind the last block, divided by its sum.

    Attributes:
        classic: Exactly Chefer, Gur & Wolf 2021 (arXiv 2103.15679) instead: true gradients, all
            blocks, no weighting, read out as the model's head does.
        start_layer: Blocks before this one are left out. None: if not classic, the average of
            what each block gives as the first, as shares of its sum.
    """

    name: ClassVar[str] = "relevance"
    help: ClassVar[str] = (
        "Draw gradient relevance: the best outline of what the decision for a class rests on."
    )
    needs_attention_gradients: ClassVar[bool] = True

    classic: bool = option(
        False,
        "Compute it as Chefer, Gur & Wolf (ICCV 2021) do, to compare with papers.",
        doc="Exactly Chefer, Gur & Wolf 2021 (arXiv 2103.15679): true gradients, no weighting.",
    )
    start_layer: int | None = option(
        None,
        "Leave out the blocks before this one; blocks count from 0.",
        doc="Blocks before this one are left out; None: the average over all starts, 0 if classic.",
        metavar="N",
        shown_default="the average over all starts; 0 with --classic",
    )

    def __post_init__(self) -> None:
        """Check the ranges; raises ``OptionError``."""
        require_start(self.start_layer)
        super().__post_init__()

    @classmethod
    def variants(cls) -> Mapping[str, Method]:
        """Return what ``evaluate`` compares of this method, by name."""
        return {each.title: each for each in (cls(), cls(classic=True))}

    @property
    def title(self) -> str:
        """The classic form has a name of its own."""
        return f"{self.name}-classic" if self.classic else self.name

    @property
    def first_block(self) -> int:
        """The first block that takes part."""
        return self.start_layer or 0

    @property
    def weighs_values(self) -> bool:
        """The classic form does not."""
        return not self.classic

    @property
    def backward_rule(self) -> AttentionRule | None:
        """The values alone pass relevance on; the classic form uses true gradients."""
        return None if self.classic else AttentionRule.VALUE

    @property
    def averages_starts(self) -> bool:
        """Whether maps are averages over all blocks that relevance can start from."""
        return not self.classic and self.start_layer is None

    def to_record(self) -> dict[str, Any]:
        """Return the options that shape its maps, for records and provenance."""
        start = "every" if self.averages_starts else self.first_block
        return {**super().to_record(), "start_layer": start}

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Carry relevance (batch, tokens) down to the first block that takes part."""
        assert target is not None
        return (self._classic if self.classic else self._linearised)(forward, target)

    def _classic(self, forward: ForwardPass, target: Target) -> TokenMap:
        from vitviz.methods.diagnostics import output_norm_product
        from vitviz.methods.fusion import fuse_positive
        from vitviz.methods.row_form import gradient_relevance

        # E of the pooling behind the blocks, too, which is what the head's readout is made of.
        gradients = target.output_gradients(forward.records)
        fusions = list(map(fuse_positive, forward.records, gradients))
        start, of_blocks = forward.readout(fusions), fusions[: len(forward.blocks)]
        carried = gradient_relevance(forward.blocks, of_blocks, start, weigh_values=False)
        return TokenMap(carried[-1], output_norm_product(forward.records[-1], gradients[-1]))

    def _linearised(self, forward: ForwardPass, target: Target) -> TokenMap:
        from vitviz.methods.contributions import mean_share, signed_evidence
        from vitviz.methods.diagnostics import gradient_norm_product
        from vitviz.methods.fusion import fuse_positive
        from vitviz.methods.row_form import gradient_relevance

        outputs = [record.output for record in forward.blocks if record.output is not None]
        behind = forward.tokens[-1]
        *gradients, of_tokens = target.gradients([*outputs, behind])
        # Start: what speaks for the class behind the last block finds the readout by itself.
        start = mean_share([signed_evidence(behind, of_tokens).relu_()])
        fusions = list(map(fuse_positive, forward.blocks, gradients))
        # r ← r + r·E: in front of each block, r is the map that starts there.
        carried = gradient_relevance(forward.blocks, fusions, start, weigh_values=True)
        relevance = mean_share(carried) if self.averages_starts else carried[-1]
        return TokenMap(relevance, gradient_norm_product(behind, of_tokens))
