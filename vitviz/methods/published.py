"""Published methods to compare with: ``evaluate`` measures them, no command draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vitviz.errors import OptionError, UnsupportedModelError
from vitviz.methods.method import ClassMethod, TokenMap

if TYPE_CHECKING:  # these load torch
    from torch import nn

    from vitviz.methods.forward import ForwardPass, Target
    from vitviz.models.model import Model

__all__ = ["GradCam", "LeGrad"]


@dataclass(frozen=True, kw_only=True)
class LeGrad(ClassMethod):
    """LeGrad (Bousselham et al. 2024, arXiv 2404.03214): how attention forms a class, by layer.

    The mean over blocks l of the mean over heads and queries of relu(∂s_l/∂A_l), where A_l are
    the attention probabilities of block l, and s_l is the logit that the model's own norm and
    head make of the tokens that leave block l.
    """

    name: ClassVar[str] = "legrad"
    help: ClassVar[str] = "LeGrad, to compare with."
    needs_attention_gradients: ClassVar[bool] = True
    needs_block_inputs: ClassVar[bool] = True

    def require_model(self, model: Model) -> None:
        """Refuse a model whose head is not to be had apart; raises ``OptionError``."""
        from vitviz.models.structure import token_head

        if token_head(model.module) is None:
            raise OptionError(
                f"{self.name} reads the tokens of every block with the model's head, and "
                f"{model.name} has none that works alone (a forward_head, as in timm)"
            )

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Average the positive gradients (batch, tokens) that attention gets in each block."""
        import torch

        from vitviz.methods.diagnostics import output_norm_product
        from vitviz.methods.fusion import fuse_positive_gradient
        from vitviz.methods.row_form import gathered

        assert target is not None
        assert forward.head is not None
        maps = []
        for record, tokens in zip(forward.blocks, forward.tokens[1:], strict=True):
            at_block = target.again(forward.head(tokens))
            (gradient,) = at_block.output_gradients([record])
            queries = tokens.shape[:2]
            every = torch.full(queries, 1 / queries[1], dtype=forward.dtype, device=forward.device)
            maps.append(gathered(record, fuse_positive_gradient(record, gradient), every))
        # What the last block's tokens are read with must be what the model reads them with.
        if not torch.allclose(at_block.score, target.score, rtol=0.01, atol=0.01):
            raise UnsupportedModelError(
                f"{self.name} found no head that gives the model's own logits"
            )
        product = output_norm_product(forward.blocks[-1], gradient)
        return TokenMap(torch.stack(maps).mean(dim=0), product)


@dataclass(frozen=True, kw_only=True)
class GradCam(ClassMethod):
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) at the last block's first norm.

    relu(Σ over channels of h ⊙ α), where h are the tokens that leave ``norm1`` of the last block
    and α is the mean of ∂y/∂h over the patch tokens: what pytorch-grad-cam does with ViTs.
    """

    name: ClassVar[str] = "gradcam"
    help: ClassVar[str] = "Grad-CAM at the last block, to compare with."
    follows_attention: ClassVar[bool] = False

    def watched(self, model: Model) -> Sequence[nn.Module]:
        """Return ``norm1`` of the last block; raises ``OptionError`` where there is none."""
        from vitviz.models.structure import blocks_of

        norm = getattr(blocks_of(model.module)[-1], "norm1", None)
        if norm is None:
            raise OptionError(
                f"{self.name} looks at norm1 of the last block, and that of {model.name} has none"
            )
        return [norm]

    def require_model(self, model: Model) -> None:
        """Refuse a model without that norm; raises ``OptionError``."""
        self.watched(model)

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Weigh the channels of each token (batch, tokens) with their mean gradients."""
        from vitviz.methods.diagnostics import gradient_norm_product
        from vitviz.models.attention import at_least_float32

        assert target is not None
        (tokens,) = forward.outputs
        (gradient,) = target.gradients([tokens])
        patches = at_least_float32(gradient[:, forward.layout.prefix_tokens :])
        weights = patches.mean(dim=1, keepdim=True)
        relevance = (at_least_float32(tokens.detach()) * weights).sum(dim=-1).relu_()
        return TokenMap(relevance, gradient_norm_product(tokens, gradient))
