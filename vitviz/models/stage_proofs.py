"""Proofs on the model itself that evidence is exact at each stage, and lies where maps say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitviz.errors import UnsupportedModelError
from vitviz.models.hooks import hooked
from vitviz.models.linear_backward import LinearizedBackward
from vitviz.models.stages import Stage, StageCapture, StageLayout
from vitviz.models.structure import input_channels
from vitviz.models.wrapping import logits_of
from vitviz.options import AttentionRule

__all__ = ["check_completeness", "prove_places"]

_TOLERANCE = 0.005
"""How far the evidence of a stage may sum up beside the logit, as a share of it."""

_CONSTANTS = re.compile(r"(.*bias|beta|running_mean|.*pos_embed.*|.*_tokens?)$")
_PROBES = 3  # changes of the image along each side, to see where they arrive
_CHANGED = 7  # a probe changes this part of a side
_OFF = 0.75  # cells; overlapping strides put places up to half a cell beside their cells
_STRETCHED = 0.75  # cells, from the first third of a side to the last
_FAR = 2.5  # cells
_DRAWS = 16  # of noise, at most, to find an order by


def check_completeness(module: nn.Module, layout: StageLayout, input_size: tuple[int, int]) -> int:
    """Prove that the evidence of each stage sums to the logit, in the model without its constants.

    With biases and other constants left out, a network that is linear on the way back splits its
    logit into the contributions of what it is computed from: what does not sum to the logit is
    not linear, or does not pass the stage.

    Args:
        module: The model with its weights.
        layout: Its stages.
        input_size: (height, width) of the images that it will see.

    Returns:
        How many numbers it puts out for an image.

    Raises:
        UnsupportedModelError: Some stage's evidence does not sum to the logit.
    """
    some = next(module.parameters())
    image = _noise(1, module, input_size).to(some.device)
    with (
        StageCapture(module, layout) as capture,
        LinearizedBackward(AttentionRule.VALUE),
        torch.enable_grad(),
    ):
        state = _without_constants(module)
        given = torch.func.functional_call(module, state, (image,))
        output = logits_of(module, given).flatten()
        score = output[output.abs().argmax()]
        tokens = capture.take_tokens()
        if not score.requires_grad:
            raise UnsupportedModelError(f"{layout.reason}. Its stages do not lead to its output")
        gradients = torch.autograd.grad(score, tokens, materialize_grads=True)
    for stage, each, gradient in zip(layout.stages, tokens, gradients, strict=True):
        share = float((each.detach().double() * gradient.double()).sum() / score.detach().double())
        if not abs(share - 1) <= _TOLERANCE:  # which no number that is not finite passes
            raise UnsupportedModelError(
                f"{layout.reason}. Nor by evidence: at {stage.module} it sums to {share:.3g} of "
                "the logit, expected 1.00 (without biases)"
            )
    return output.numel()


def _without_constants(module: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers in float32, biases and other constants set to 0."""
    named = (*module.named_parameters(), *module.named_buffers())
    state = {name: t.detach().float() if t.is_floating_point() else t for name, t in named}
    constants = [name for name in state if _CONSTANTS.match(name.rpartition(".")[2])]
    return state | {name: torch.zeros_like(state[name]) for name in constants}


def prove_places(
    module: nn.Module, layout: StageLayout, input_size: tuple[int, int]
) -> StageLayout:
    """Prove that what changes in the image changes the places of each stage that lie there.

    Args:
        module: The model with its weights.
        layout: Its stages, places taken to stand row by row.
        input_size: (height, width) of the images that it will see.

    Returns:
        The layout, with the order of places that do not stand row by row.

    Raises:
        UnsupportedModelError: The places of a stage do not lie on its grid, in any order.
    """
    images, where = _probed(module, input_size)
    found = _run(module, layout, images)
    displaced = [_displacement(s, t, where) for s, t in zip(layout.stages, found, strict=True)]
    astray = [not _lies_there(each) for each in displaced]
    if not any(astray):
        return layout
    ordered = _ordered(module, layout, astray, input_size)
    for stage, tokens in zip(ordered.stages, _run(module, ordered, images), strict=True):
        displacement = _displacement(stage, tokens, where)
        if not _lies_there(displacement):
            far = float(displacement.abs().max())
            lie = f"lie up to {far:.1f} cells beside" if math.isfinite(far) else "do not tell"
            raise UnsupportedModelError(
                f"{layout.reason}. Nor by evidence: places of {stage.module} {lie} where the image "
                "changes"
            )
    return ordered


def _noise(count: int, module: nn.Module, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Return random images (count, channels, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, input_channels(module), *size, generator=generator)


def _probed(module: nn.Module, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Change an image at one spot in each ninth of it.

    Returns:
        The image and, behind it, the changed ones (1 + probes, channels, height, width); the
        centres of the spots (probes, 2), row and column as shares of the sides.
    """
    base, other = _noise(2, module, size)
    generator = torch.Generator().manual_seed(0)
    images, centres = [base], []
    sides = [max(side // _CHANGED, 1) for side in size]
    for ninth in range(_PROBES**2):
        shares = (torch.tensor(divmod(ninth, _PROBES)) + torch.rand(2, generator=generator)).div(3)
        top, left = (
            int(share * (side - spot))
            for share, side, spot in zip(shares, size, sides, strict=True)
        )
        spot = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
        changed = base.clone()
        changed[spot] = other[spot]
        images.append(changed)
        centres.append(((top + sides[0] / 2) / size[0], (left + sides[1] / 2) / size[1]))
    return torch.stack(images), torch.tensor(centres)


def _run(module: nn.Module, layout: StageLayout, images: Tensor) -> list[Tensor]:
    """Return how much each image but the first changes the places (images, rows, cols)."""
    some = next(module.parameters())
    last = module.get_submodule(layout.stages[-1].module)
    with StageCapture(module, layout) as capture, torch.no_grad():
        with hooked([last.register_forward_hook(_stop)]), suppress(_EnoughSeenError):
            module(images.to(device=some.device, dtype=some.dtype))
        tokens = capture.take_tokens()
    changes = []
    for stage, each in zip(layout.stages, tokens, strict=True):
        places = torch.unflatten(each[:, stage.prefix :].double(), 1, stage.grid)
        changes.append((places[1:] - places[:1]).norm(dim=-1).cpu())
    return changes


def _displacement(stage: Stage, change: Tensor, where: Tensor) -> Tensor:
    """Measure how far from its cause the middle of a change is.

    Args:
        stage: The stage, with its grid.
        change: (probes, rows, cols), how much its places change.
        where: (probes, 2), the middle of each spot that was changed, as shares of the sides.

    Returns:
        (probes, 2), rows and columns, in cells; not finite where nothing changed.
    """
    # What changes wherever the image does, as by attention to all of it, tells of no place.
    here = (change - change.mean(dim=0)).clamp(min=0)
    weights = (here / here.amax(dim=(1, 2), keepdim=True)).square()
    total = weights.sum(dim=(1, 2))
    rows, cols = ((torch.arange(size) + 0.5) / size for size in stage.grid)
    middle = torch.stack(
        [
            (weights.sum(dim=2) @ rows.double()) / total,
            (weights.sum(dim=1) @ cols.double()) / total,
        ],
        dim=1,
    )
    return (middle - where) * torch.tensor(stage.grid)


def _lies_there(displacement: Tensor) -> bool:
    """Tell whether changes arrive where they were made: on average, at each side, and each."""
    ninths = displacement.view(_PROBES, _PROBES, 2)
    off = ninths.mean(dim=(0, 1)).abs().max()
    # Of a grid that reaches beyond the image, places lie too near to the middle or the front.
    downwards, across = ninths[..., 0].mean(dim=1), ninths[..., 1].mean(dim=0)
    stretched = max(abs(float(each[-1] - each[0])) for each in (downwards, across))
    return bool(off <= _OFF) and stretched <= _STRETCHED and bool(displacement.abs().max() <= _FAR)


def _ordered(
    module: nn.Module,
    layout: StageLayout,
    astray: Sequence[bool],
    input_size: tuple[int, int],
) -> StageLayout:
    """Find the order of sequences that go astray.

    Each row and column of cells has a pattern of its own: of a pair of images, the cells whose row
    (or column) has bit k set in a Gray code are changed in one, all others in the other; which of
    them changes a place more tells this bit of its own row.
    """
    stages = tuple(
        replace(stage, order=_order(module, replace(layout, stages=(stage,)), input_size))
        if wanted and stage.axes == 3
        else stage
        for stage, wanted in zip(layout.stages, astray, strict=True)
    )
    return replace(layout, stages=stages)


def _order(
    module: nn.Module, layout: StageLayout, input_size: tuple[int, int]
) -> tuple[int, ...] | None:
    """Find the order of one stage's places; None where it is not to be found.

    Where the fields of places overlap, one noise may tell wrong: the votes of several are added.
    """
    (stage,) = layout.stages
    votes: list[Tensor] = []
    for seed in range(_DRAWS):
        found = _votes(module, layout, _noise(2, module, input_size, seed))
        votes = [old + new for old, new in zip(votes, found, strict=True)] if votes else found
        bits = (stage.grid[0] - 1).bit_length()
        rows, cols = (
            _decoded([vote > 0 for vote in half]) for half in (votes[:bits], votes[bits:])
        )
        codes = rows * stage.grid[1] + cols
        if torch.equal(codes.sort().values, torch.arange(len(codes))):
            return tuple(codes.argsort().tolist())
    return None


def _votes(module: nn.Module, layout: StageLayout, noise: Tensor) -> list[Tensor]:
    """Return for each bit, of rows and then of columns, how much it is for its being set."""
    (stage,), (base, other) = layout.stages, noise
    votes = []
    for axis, cells in enumerate(stage.grid):
        side = base.shape[axis + 1]
        index = torch.arange(side) * cells // side
        for mask in _bits(index ^ (index >> 1), cells):
            shown = mask.view(-1, 1) if axis == 0 else mask.view(1, -1)
            images = [base, *(torch.where(where, other, base) for where in (shown, ~shown))]
            there, elsewhere = _run(module, layout, torch.stack(images))[0].flatten(1)
            votes.append(there - elsewhere)
    return votes


def _decoded(bits: list[Tensor]) -> Tensor:
    """Read numbers in Gray code, of which each bit is that of the number XOR the one before."""
    numbers = torch.zeros_like(bits[0], dtype=torch.long)
    last = torch.zeros_like(bits[0])
    for bit in bits:
        last = last ^ bit
        numbers = (numbers << 1) | last
    return numbers


def _bits(numbers: Tensor, count: int) -> Iterator[Tensor]:
    """Yield the bits of numbers, the highest that ``count`` of them need first, as masks."""
    for bit in reversed(range((count - 1).bit_length())):
        yield (numbers >> bit & 1).bool()


def _stop(*_: object) -> None:
    """End a forward pass whose rest is of no interest."""
    raise _EnoughSeenError


class _EnoughSeenError(Exception):
    """All stages that are asked for have run."""
