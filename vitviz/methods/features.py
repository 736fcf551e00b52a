"""Patch features: the tokens behind a block as they are, and how like one patch the others are."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from vitviz.errors import OptionError
from vitviz.methods.method import Method, TokenMap, option
from vitviz.methods.patch import place, read_patch, require_on_grid
from vitviz.options import Foreground, Unit

if TYPE_CHECKING:  # these load NumPy or torch
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from vitviz.methods.forward import ForwardPass, Target
    from vitviz.models.model import Model

__all__ = ["Features", "Reference", "Similarity"]


@dataclass(frozen=True, kw_only=True)
class _OfBlock(Method):
    """What is made of the tokens that leave one block.

    Attributes:
        block: The block, counted from 0; None: the last one.
    """

    follows_attention: ClassVar[bool] = False
    needs_block_inputs: ClassVar[bool] = True

    block: int | None = option(
        None,
        "The block whose tokens are taken, counted from 0.",
        doc="The block whose tokens are taken, counted from 0; None: the last one.",
        metavar="N",
        shown_default="the last one",
    )

    def require_model(self, model: Model) -> None:
        """Make sure that the model has the block; raises ``OptionError``."""
        blocks = model.layout.blocks
        if self.block is not None and not 0 <= self.block < blocks:
            raise OptionError(
                f"--block is {self.block}, but {model.name} has {blocks} blocks; give a number "
                f"from 0 to {blocks - 1}"
            )

    def tokens(self, forward: ForwardPass) -> Tensor:
        """Return the tokens (batch, tokens, channels) that leave the block."""
        return forward.tokens[-1 if self.block is None else self.block + 1]

    def normed(self, forward: ForwardPass) -> Tensor:
        """Return them behind the model's last normalisation, if it has one of all tokens."""
        tokens = self.tokens(forward)
        return (tokens if forward.norm is None else forward.norm(tokens)).to(forward.dtype)

    def _shared_out(self, values: Tensor) -> TokenMap:
        """Return values that stay what they are where relevance is shared out among cells."""
        return TokenMap(values * self.refine**2)


@dataclass(frozen=True, kw_only=True)
class Features(_OfBlock):
    """Patch features: the tokens that leave a block, behind the model's last normalisation.

    Their pictures show the first three principal components as red, green and blue, as those of
    DINOv2 (Oquab et al. 2023, arXiv 2304.07193) do.

    Attributes:
        foreground: Whether patches are split by their first component, and only one side drawn.
        fitted_on: Digest of the images that the colours are fitted on; empty: not told.
    """

    name: ClassVar[str] = "features"
    help: ClassVar[str] = "Draw patch features: principal components as colours, for all images."

    foreground: Foreground = option(
        Foreground.AUTO,
        "Split patches by their first component and draw only the foreground, or draw all.",
        doc="``auto``: draw only the side of the first component that keeps from the edges; "
        "``off``: draw all.",
    )
    fitted_on: str = ""

    @property
    def axes(self) -> tuple[str, ...]:
        """Of each channel there is a map."""
        return ("channels", "rows", "cols")

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Return the features (batch, channels, tokens)."""
        return self._shared_out(self.normed(forward).transpose(1, 2))


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The features that others are compared with.

    Attributes:
        digest: Of the image that they are of.
        vector: (channels).
        least: Cosine of the patch of that image that is least like it.
    """

    digest: str
    vector: NDArray[np.float32]
    least: float


@dataclass(frozen=True, kw_only=True)
class Similarity(_OfBlock):
    """Cosine of the features of one patch with those of every patch.

    Attributes:
        patch: (row, col) of the patch.
        reference: Its features, of whatever image; None: of each image its own.
    """

    name: ClassVar[str] = "similarity"
    unit: ClassVar[Unit] = Unit.COSINE
    help: ClassVar[str] = "Draw how similar the patches of images are to one chosen patch."

    patch: tuple[int, int] | None = option(
        None,
        "The patch of IMAGE that all patches are compared with.",
        doc="(row, col) of the patch that all patches are compared with.",
        metavar="ROW,COL",
        parse=partial(read_patch, "--patch"),
    )
    reference: Reference | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check that there is a patch; raises ``OptionError``."""
        super().__post_init__()
        if self.patch is None or len(self.patch) != 2:
            raise OptionError("--patch is missing; give the ROW,COL of a patch of the image")

    @property
    def title(self) -> str:
        """The patch is named."""
        return f"{self.name} to patch {place(self.patch or ())}"

    @property
    def extent(self) -> tuple[float, float] | None:
        """The cosines of the image of the patch, so that colours mean the same in all images."""
        return None if self.reference is None else (self.reference.least, 1.0)

    def to_record(self) -> dict[str, Any]:
        """Return the options, with the digest of the image that the patch is of."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        reference = values.pop("reference")
        return {**values, "of": reference and reference.digest}

    def require_patch(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the patch, if it is on a grid; raises ``OptionError``."""
        assert self.patch is not None
        require_on_grid("--patch", self.patch, grid)
        return self.patch

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Compute the cosine (batch, tokens) with each token."""
        import torch
        from torch.nn import functional as F

        tokens = self.normed(forward)
        if self.reference is None:
            own = forward.token_of(self.require_patch(forward.grid))
            compared = tokens[:, own : own + 1]
        else:
            compared = torch.from_numpy(self.reference.vector).to(tokens)
        return self._shared_out(F.cosine_similarity(tokens, compared, dim=-1))
