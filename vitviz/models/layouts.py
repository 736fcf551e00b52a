"""What a model keeps its tokens or places in, read from it and proved on it."""

from __future__ import annotations

from torch import nn

from vitviz.errors import UnsupportedModelError
from vitviz.models.proofs import check_mixing, check_readout
from vitviz.models.stage_proofs import check_completeness, prove_places
from vitviz.models.stages import StageLayout, blocks_within, read_stages
from vitviz.models.structure import blocks_of
from vitviz.models.tokens import TokenLayout, read_layout

__all__ = ["Layout", "all_blocks", "prove_layout", "read_any_layout"]

Layout = TokenLayout | StageLayout


def all_blocks(module: nn.Module, layout: Layout) -> list[nn.Module]:
    """List a model's blocks in execution order, those of its stages where it has some."""
    if isinstance(layout, StageLayout):
        return blocks_within(module, layout)
    return blocks_of(module)


def read_any_layout(module: nn.Module, input_size: tuple[int, int]) -> Layout:
    """Read where a model's tokens are or else, for evidence alone, the places of its stages.

    Args:
        module: The model, with or without weights.
        input_size: (height, width) of the images that it will see.

    Raises:
        UnsupportedModelError: Neither is to be told.
    """
    try:
        return read_layout(module, input_size)
    except UnsupportedModelError as error:
        return read_stages(module, input_size, str(error))


def prove_layout(
    module: nn.Module, layout: Layout, input_size: tuple[int, int]
) -> tuple[Layout, int]:
    """Prove a layout on the model itself.

    Args:
        module: The model with its weights.
        layout: From ``read_any_layout``.
        input_size: (height, width) of the images that it will see.

    Returns:
        The layout as it was proved, and how many numbers the model puts out for an image.

    Raises:
        UnsupportedModelError: The model is not what its attributes say.
    """
    if isinstance(layout, TokenLayout):
        try:
            check_mixing(module, input_size)
            return layout, check_readout(module, layout, input_size)
        except UnsupportedModelError as error:  # of rollout; evidence needs less
            layout = read_stages(module, input_size, str(error))
    width = check_completeness(module, layout, input_size)
    return prove_places(module, layout, input_size), width
