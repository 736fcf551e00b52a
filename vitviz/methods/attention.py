"""Raw attention: what tokens attend to, in each head of each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from vitviz.errors import OptionError
from vitviz.methods.method import Method, TokenMap, option
from vitviz.methods.patch import place, read_patch, require_on_grid
from vitviz.options import HeadFusion

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.methods.forward import ForwardPass, Target

__all__ = ["RawAttention"]


@dataclass(frozen=True, kw_only=True)
class RawAttention(Method):
    """Raw attention, blocks and heads apart; it draws itself as a contact sheet.

    Attributes:
        query: (row, col) of the patch whose attention is wanted; None: the tokens that the
            model's head reads.
    """

    name: ClassVar[str] = "attention"
    help: ClassVar[str] = "Draw raw attention: a contact sheet for each image, blocks by heads."

    query: tuple[int, int] | None = option(
        None,
        "Show what this patch attends to, instead of the tokens that the classifier uses.",
        doc="(row, col) of the patch whose attention is wanted; None: the tokens that the model's "
        "head reads.",
        metavar="ROW,COL",
        parse=partial(read_patch, "--query"),
    )

    @property
    def title(self) -> str:
        """Of a patch, its place is named."""
        return self.name if self.query is None else f"{self.name} of patch {place(self.query)}"

    @property
    def axes(self) -> tuple[str, ...]:
        """Of each head of each block there is a map."""
        return ("blocks", "heads", "rows", "cols")

    def __post_init__(self) -> None:
        """Check that the options go together; raises ``OptionError``."""
        super().__post_init__()
        if self.query is not None and self.refine > 1:
            raise OptionError(
                "--query names a patch of the image where it is, and --refine moves the image "
                "under the patches; use one of them"
            )

    @classmethod
    def variants(cls) -> Mapping[str, Method]:
        """Return nothing: a map of each head is no answer that could be measured."""
        return {}

    def require_grid(self, grid: tuple[int, int]) -> None:
        """Make sure that the patch is on the grid; raises ``OptionError``."""
        if self.query is not None:
            require_on_grid("--query", self.query, grid)

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Compute wᵀA (batch, blocks, heads, tokens) of each head of each block."""
        from vitviz.methods.fusion import fuse_heads
        from vitviz.methods.row_form import gathered_by_heads

        if self.query is None:
            fusions = [fuse_heads(record, HeadFusion.MEAN) for record in forward.records]
            readout = forward.readout(fusions)
        else:
            self.require_grid(forward.grid)
            readout = forward.row_of(self.query)
        return TokenMap(gathered_by_heads(forward.blocks, readout))
