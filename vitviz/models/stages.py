"""Where a model of several stages keeps its places, for evidence, which needs no attention maps.

Hierarchical and convolutional models have no single sequence of tokens, but all that reaches
their head passes the output of each stage, which has a place for each cell of a grid. What is read
here from names and shapes is proved on the model itself, in ``stage_proofs``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitviz.errors import CaptureError, UnsupportedModelError
from vitviz.models.hooks import ModelCapture, hooked
from vitviz.models.prepared import prepared
from vitviz.models.structure import blocks_of, input_channels, on_meta

__all__ = ["Stage", "StageCapture", "StageLayout", "blocks_within", "read_stages"]

_HOMES = ("stages", "layers", "levels", "transformers", "blocks")  # of stages, as timm names them
_PREFIXES = (0, 1, 2)  # numbers of tokens that may stand before those of a square grid
_FINEST = 32  # places along a side of the finest map: beyond it, places see little but edges


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The output of one stage.

    Attributes:
        module: Name of the module that gives it.
        grid: (rows, cols) of its places.
        axes: Of its tensor: 4 for a map, 3 for a sequence.
        channels_first: Whether a map has its channels in front of rows and columns.
        prefix: Number of tokens before the places of a sequence.
        order: For each place, row by row, its position in the sequence; None: the same.
    """

    module: str
    grid: tuple[int, int]
    axes: int
    channels_first: bool = False
    prefix: int = 0
    order: tuple[int, ...] | None = None

    def tokens(self, output: Tensor) -> Tensor:
        """Lay an output out as (batch, tokens, channels), places row by row behind the prefix.

        Raises:
            CaptureError: It has another shape than the layout says.
        """
        if output.dim() == 3:
            tokens = output
        elif self.channels_first:
            tokens = output.flatten(2).transpose(1, 2)
        else:
            tokens = output.flatten(1, 2)
        if output.dim() != self.axes or tokens.shape[1] != self.prefix + math.prod(self.grid):
            raise CaptureError(
                f"{self.module} gives {tuple(output.shape)}, expected {self.grid[0]} × "
                f"{self.grid[1]} places; is the image of another size?"
            )
        return tokens if self.order is None else tokens[:, self._positions]

    def output(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Lay tokens out as the stage gave them; undoes ``tokens``."""
        if self.order is not None:
            tokens = tokens[:, torch.tensor(self._positions).argsort()]
        if self.axes == 3:
            return tokens
        tokens = tokens.transpose(1, 2) if self.channels_first else tokens
        return torch.unflatten(tokens, 2 if self.channels_first else 1, self.grid).view(like.shape)

    @property
    def _positions(self) -> list[int]:
        assert self.order is not None
        return [*range(self.prefix), *(self.prefix + position for position in self.order)]


@dataclass(frozen=True, kw_only=True)
class StageLayout:
    """The places of a model of several stages at one input size.

    Attributes:
        stages: In execution order.
        grid: (rows, cols) of maps: the finest grid of a stage that has at most 32 places a side,
            since places of finer ones see little but edges; what they hold is summed into its
            cells.
        reason: Why the model has no maps of chained attention.
    """

    stages: tuple[Stage, ...]
    grid: tuple[int, int]
    reason: str
    prefix_tokens: int = 0
    tail: int = 0

    @property
    def blocks(self) -> int:
        """Number of stages."""
        return len(self.stages)

    @property
    def outline(self) -> str:
        """How many stages there are, and the grid of maps, in a few words."""
        rows, cols = self.grid
        return f"{self.blocks} stages, maps of {rows}×{cols}"

    @property
    def tokens(self) -> int:
        """Number of places of the finest stage, which tells how much memory an image takes."""
        return max(math.prod(stage.grid) for stage in self.stages)

    @property
    def calls(self) -> int:
        """Number of attention calls that are recorded."""
        return 0

    def average(self, evidence: Sequence[Tensor]) -> Tensor:
        """Average what the places of each stage hold, spread evenly over the cells of one grid.

        Args:
            evidence: Of each stage (batch, tokens); the sum over its places is kept.

        Returns:
            (batch, rows · cols).
        """
        spread = [
            _on_grid(torch.unflatten(each[:, stage.prefix :], 1, stage.grid), self.grid)
            for stage, each in zip(self.stages, evidence, strict=True)
        ]
        return torch.stack(spread).mean(dim=0).flatten(1)


def _on_grid(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Spread values (batch, rows, cols) evenly over the cells of another grid; sums are kept."""
    if values.shape[1:] == grid:
        return values
    rows, cols = (
        _overlap(size, cells).to(values) for size, cells in zip(values.shape[1:], grid, strict=True)
    )
    return rows @ values @ cols.T


def _overlap(count: int, cells: int) -> Tensor:
    """Compute which share of each of ``count`` intervals lies in each of ``cells`` others.

    Returns:
        (cells, count), columns sum to 1.
    """
    edges, bounds = torch.linspace(0, 1, count + 1), torch.linspace(0, 1, cells + 1)
    begin = torch.maximum(edges[:-1], bounds[:-1, None])
    end = torch.minimum(edges[1:], bounds[1:, None])
    return (end - begin).clamp(min=0) * count


def read_stages(module: nn.Module, input_size: tuple[int, int], reason: str) -> StageLayout:
    """Read from names and shapes where the places of each stage are.

    Args:
        module: The model, with or without weights.
        input_size: (height, width) of the images that it will see.
        reason: Why it has no maps of chained attention.

    Raises:
        UnsupportedModelError: It has no stages that are known, or one of them no grid.
    """
    names = _stage_names(module) if input_channels(module) in (1, 3) else []
    shapes = _output_shapes(module, names, input_size)
    stages = [_stage(name, shape, input_size) for name, shape in shapes.items()]
    known = tuple(stage for stage in stages if stage)
    if not known or len(known) < len(names):
        raise UnsupportedModelError(reason)
    sizes = [stage.grid for stage in known]
    fine = [grid for grid in sizes if max(grid) <= _FINEST]
    return StageLayout(stages=known, grid=max(fine) if fine else min(sizes), reason=reason)


def blocks_within(module: nn.Module, layout: StageLayout) -> list[nn.Module]:
    """List the blocks of all stages in execution order, by where timm keeps them.

    A stage keeps them in ``blocks``, or is a sequence of them; in a model of one sequence of
    blocks, stages end at some of them.
    """
    if blocks := blocks_of(module):
        return blocks
    modules = dict(module.named_modules())
    homes = [
        modules.get(f"{stage.module}.blocks", modules[stage.module]) for stage in layout.stages
    ]
    return [
        block
        for home in homes
        if isinstance(home, (nn.Sequential, nn.ModuleList))
        for block in home
    ]


def _stage_names(module: nn.Module) -> list[str]:
    """Name the modules whose outputs end the stages, as timm lists them or where it keeps them."""
    modules = dict(module.named_modules())
    listed = [each.get("module", "") for each in getattr(module, "feature_info", None) or []]
    if listed and all(name in modules for name in listed):
        return [_last_inside(modules, name) for name in listed]
    homes = (name for name in _HOMES if name in modules)
    home = next(homes, None)
    if home is None:
        return []
    return [_last_inside(modules, f"{home}.{name}") for name, _ in modules[home].named_children()]


def _last_inside(modules: dict[str, nn.Module], name: str) -> str:
    """Name the last part of a list of modules, which runs part by part; else the module itself."""
    while isinstance(modules[name], nn.ModuleList) and len(modules[name]):  # type: ignore[arg-type]
        name = f"{name}.{len(modules[name]) - 1}"  # type: ignore[arg-type]
    return name


def _output_shapes(
    module: nn.Module, names: Sequence[str], input_size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Run a model on the meta device; return the shapes of what modules give, as they ran."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, part: nn.Module, inputs: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) and output else output
        if isinstance(tensor, Tensor):
            shapes[name] = tuple(tensor.shape)

    state, image = on_meta(module, (input_channels(module), *input_size))
    parts = ((name, module.get_submodule(name)) for name in names)
    hooks = (part.register_forward_hook(partial(note, name)) for name, part in parts)
    with prepared(module), hooked(hooks):
        try:
            with torch.no_grad():
                torch.func.functional_call(module, state, (image,))
        except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError):
            return {}
    return shapes


def _stage(name: str, shape: tuple[int, ...] | None, input_size: tuple[int, int]) -> Stage | None:
    """Find the grid in the shape of a stage's output; None where there is none."""
    if shape is None or len(shape) not in (3, 4):
        return None
    if len(shape) == 4:
        for grid, first in ((shape[2:], True), (shape[1:3], False)):
            if _like_image(grid, input_size):
                return Stage(module=name, grid=(grid[0], grid[1]), axes=4, channels_first=first)
        return None
    for prefix in _PREFIXES:
        rows = round(math.sqrt((shape[1] - prefix) * input_size[0] / input_size[1]))
        grid = (rows, (shape[1] - prefix) // rows if rows else 0)
        if math.prod(grid) == shape[1] - prefix and _like_image(grid, input_size):
            return Stage(module=name, grid=(grid[0], grid[1]), axes=3, prefix=prefix)
    return None


def _like_image(grid: Sequence[int], input_size: tuple[int, int]) -> bool:
    """Tell whether a grid can be of an image's cells: as wide for its height, but for rounding."""
    (rows, cols), (height, width) = grid, input_size
    return (
        1 < rows <= height
        and 1 < cols <= width
        and abs(rows * width - cols * height) <= max(height, width)
    )


class StageCapture(ModelCapture):
    """Keeps the output of each stage; what the model computes stays as it is."""

    def __init__(self, module: nn.Module, layout: StageLayout) -> None:
        """Prepare the capture of a module's stages."""
        super().__init__(module)
        self._layout = layout

    def _begin(self) -> None:
        self._of_thread.tokens = {}

    def _hooks(self) -> Iterator[RemovableHandle]:
        for index, stage in enumerate(self._layout.stages):
            part = self._module.get_submodule(stage.module)
            yield part.register_forward_hook(partial(self._leave_stage, index))

    def take(self, expected: int | None = None) -> list[Any]:
        """Return no attention: none is recorded."""
        return []

    def take_outputs(self) -> list[Tensor]:
        """Return no outputs of parts: none are kept."""
        return []

    def take_tokens(self) -> list[Tensor]:
        """Hand out the tokens (batch, tokens, channels) of each stage, and forget them.

        Raises:
            CaptureError: A stage did not run, or not once.
        """
        tokens = dict(self._of_thread.tokens)
        self._of_thread.tokens.clear()
        if len(tokens) != self._layout.blocks:
            raise CaptureError(
                f"saw {len(tokens)} of {self._layout.blocks} stages of "
                f"{type(self._module).__name__}: a map from part of them would mislead"
            )
        return [tokens[index] for index in range(self._layout.blocks)]

    def _leave_stage(self, index: int, part: nn.Module, inputs: object, output: Any) -> Any:
        if not self._is_recording:
            return None
        given = output[0] if isinstance(output, tuple) else output
        stage = self._layout.stages[index]
        tokens = stage.tokens(given)
        if torch.is_grad_enabled() and not tokens.requires_grad:
            tokens = tokens.detach().requires_grad_(True)  # the graph begins at the first stage
        self._of_thread.tokens[index] = tokens
        # What follows is computed from these tokens, so that they have a gradient.
        passed = stage.output(tokens, given)
        return (passed, *output[1:]) if isinstance(output, tuple) else passed
