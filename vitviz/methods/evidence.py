"""Signed evidence: what each token contributes to a class, for or against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vitviz.errors import OptionError
from vitviz.methods.method import ClassMethod, Method, TokenMap, option
from vitviz.options import AttentionRule, Colormap, ResidualRule, Unit

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.methods.forward import ForwardPass, Target
    from vitviz.models.model import Model

__all__ = ["Evidence"]


@dataclass(frozen=True, kw_only=True)
class Evidence(ClassMethod):
    """Signed evidence for a class: x ⊙ ∂y/∂x at all blocks, with a linearised backward pass.

    The mean over block inputs x of Σ over channels of x ⊙ ∂y/∂x, sign kept: above 0 speaks for
    the class, below 0 against it; in a model of several stages, over their outputs, on one grid.
    See ``linear_backward`` for the rules and their sources.

    Attributes:
        rule: How evidence passes attention on its way back.
        residual: How it passes residual additions.
    """

    name: ClassVar[str] = "evidence"
    help: ClassVar[str] = (
        "Draw signed evidence: what supports a class (red) and what contradicts it (blue)."
    )
    is_signed: ClassVar[bool] = True
    colormap: ClassVar[Colormap] = Colormap.REDBLUE
    unit: ClassVar[Unit] = Unit.LOGIT
    needs_block_inputs: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = False

    rule: AttentionRule = option(
        AttentionRule.VALUE,
        "Pass evidence through attention by the values alone, or share it with queries and keys.",
        doc="How evidence passes attention: ``value`` or ``shared``; see ``linear_backward``.",
    )

    residual: ResidualRule = option(
        ResidualRule.BALANCED,
        "Balance evidence that cancels out in residual connections, for sharper outlines, or pass "
        "it on unchanged.",
        doc="How evidence passes residual connections: ``balanced`` or ``plain``; see "
        "``residuals``.",
    )

    @classmethod
    def variants(cls) -> Mapping[str, Method]:
        """Return what ``evaluate`` compares of this method, by name."""
        made = (cls(), cls(rule=AttentionRule.SHARED), cls(residual=ResidualRule.PLAIN))
        return {each.title: each for each in made}

    @property
    def title(self) -> str:
        """Other rules than by default have names of their own."""
        shared, plain = self.rule is AttentionRule.SHARED, self.residual is ResidualRule.PLAIN
        return self.name + "-shared" * shared + "-plain" * plain

    @property
    def backward_rule(self) -> AttentionRule | None:
        """How the linearised backward pass treats attention."""
        return self.rule

    @property
    def balances_residuals(self) -> bool:
        """Whether the linearised backward pass balances residual additions."""
        return self.residual is ResidualRule.BALANCED

    def require_model(self, model: Model) -> None:
        """Refuse ``shared`` where the values are not seen; raises ``OptionError``."""
        from vitviz.models.capture import own_attention
        from vitviz.models.stages import StageLayout

        if self.rule is AttentionRule.SHARED and isinstance(model.layout, StageLayout):
            raise OptionError(
                f"--rule is shared, but what shares evidence in {model.name} is not known, since "
                "it is no plain ViT; use --rule value"
            )
        if self.rule is AttentionRule.SHARED and own_attention(model.module):
            raise OptionError(
                f"--rule is shared, but {model.name} mixes its heads after the softmax (talking "
                "heads), which hides how much the values contribute; use --rule value"
            )

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Average evidence (batch, tokens) over the inputs of all blocks, or over all stages."""
        from vitviz.methods.contributions import signed_evidence
        from vitviz.methods.diagnostics import gradient_norm_product

        assert target is not None
        depths = forward.depths
        gradients = target.gradients(depths)
        evidence = list(map(signed_evidence, depths, gradients))
        return TokenMap(
            forward.layout.average(evidence), gradient_norm_product(depths[-1], gradients[-1])
        )
