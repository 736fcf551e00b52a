"""Proofs on the model itself: its head reads the tokens named, and attention alone mixes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitviz.errors import UnsupportedModelError
from vitviz.models.attention import Attention, AttentionRecord
from vitviz.models.capture import AttentionCapture
from vitviz.models.structure import INSTEAD, blocks_of, input_channels
from vitviz.models.tokens import Readout, TokenLayout

__all__ = ["check_mixing", "check_readout"]


def check_readout(module: nn.Module, layout: TokenLayout, input_size: tuple[int, int]) -> None:
    """Prove the readout on the model itself: gradients reach exactly the tokens that it names.

    The blocks are skipped, so this costs little. The same image a second time has the tokens that
    are averaged in another order, which must not matter.

    Args:
        module: The model with its weights.
        layout: What was read from its attributes.
        input_size: (height, width) of the images that it will see.

    Raises:
        UnsupportedModelError: The head reads other tokens, or not all of them alike.
    """
    weights = layout.readout_weights(layout.tokens)
    expected = weights > 0
    order = torch.arange(layout.tokens)
    if layout.readout in (Readout.PATCH_AVERAGE, Readout.TOKEN_AVERAGE):
        order[expected] = order[expected].roll(1)
    some = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, input_channels(module), *input_size, generator=generator)
    images = image.repeat(2, 1, 1, 1).to(device=some.device, dtype=some.dtype)
    last: list[Tensor] = []

    def begin(block: nn.Module, inputs: object, output: Tensor) -> Tensor:
        tokens = output.detach().clone()
        if tokens.shape[1] == layout.tokens:
            tokens[1] = tokens[1, order.to(tokens.device)]
        last.append(tokens.requires_grad_(True))
        return tokens

    handle = blocks_of(module)[-1].register_forward_hook(begin)
    try:
        with AttentionCapture(module), _skipped(blocks_of(module)) as passed, torch.enable_grad():
            output = module(images).flatten(1)
            direction = torch.randn(output.shape[1], generator=generator).to(output)
            (gradient,) = torch.autograd.grad((output[0] * direction).sum(), last)
    finally:
        handle.remove()
    if any(tokens is not passed[0] for tokens in passed):
        raise UnsupportedModelError(
            f"{type(module).__name__} changes its tokens between its blocks, which attention maps "
            f"do not show; {INSTEAD}"
        )
    if not output.isfinite().all():
        raise UnsupportedModelError(
            f"{type(module).__name__} gives values that are not finite as {output.dtype}, even "
            "with its blocks skipped: its weights are too large; try --precision fp32"
        )
    reached = gradient[0].abs().amax(dim=-1).cpu() > 0
    if not torch.equal(reached, expected):
        raise UnsupportedModelError(
            f"{type(module).__name__} declares that it reads the {layout.readout.value} "
            f"({int(expected.sum())} of {len(expected)} tokens), but its output depends on "
            f"{int(reached.sum())} of {len(reached)} tokens: vitviz cannot tell what its head "
            f"reads; {INSTEAD}"
        )
    tolerance = torch.finfo(output.dtype).eps ** 0.5
    if not bool((output[0] - output[1]).abs().max() <= tolerance * output.abs().max()):
        raise UnsupportedModelError(
            f"{type(module).__name__} declares that it reads the {layout.readout.value}, but its "
            "output changes with the order of its tokens: vitviz cannot tell what its head reads; "
            f"{INSTEAD}"
        )


def check_mixing(module: nn.Module, input_size: tuple[int, int]) -> None:
    """Prove that blocks mix tokens by attention alone, so that attention tells the whole story.

    With every token attending to itself only, a change of one token must not reach
    another one. Blocks of the same structure are tried once.

    Args:
        module: The model with its weights.
        input_size: (height, width) of the images that it will see.

    Raises:
        UnsupportedModelError: Something else mixes tokens.
    """
    some = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, input_channels(module), *input_size, generator=generator)
    images = image.repeat(2, 1, 1, 1).to(device=some.device, dtype=some.dtype)
    seen: list[Tensor] = []

    def enter(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = inputs[0].clone()
        one = tokens.shape[1] // 2
        tokens[1, one] = tokens[0, one].flip(0)
        seen.append(torch.arange(tokens.shape[1], device=tokens.device) == one)
        return (tokens, *inputs[1:])

    def ask(record: Attention) -> None:
        if isinstance(record, AttentionRecord) and seen:
            seen.append(_changed(record.query.transpose(1, 2).flatten(2)))

    def leave(block: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(_changed(output))
        raise _EnoughSeenError

    blocks = blocks_of(module)
    structures = [_structure(block) for block in blocks]
    last = blocks[max(structures.index(structure) for structure in structures)]
    handles = [blocks[0].register_forward_pre_hook(enter), last.register_forward_hook(leave)]
    try:
        with AttentionCapture(module, isolate=True, on_record=ask), torch.no_grad():
            module(images)
    except _EnoughSeenError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    entered, *changed = seen
    if any(tokens.shape != entered.shape for tokens in changed):
        raise UnsupportedModelError(
            f"{type(module).__name__} changes its number of tokens from {len(entered)} to "
            f"{len(changed[-1])}, so its attention maps cannot be multiplied; {INSTEAD}"
        )
    if any(bool((tokens & ~entered).any()) for tokens in changed):
        raise UnsupportedModelError(
            f"{type(module).__name__} mixes tokens by more than attention inside its blocks, and "
            f"attention maps do not show the rest; {INSTEAD}"
        )


@contextmanager
def _skipped(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Let blocks hand on what they get, and list that."""
    passed: list[Tensor] = []

    def hand_on(tokens: Tensor, *_: object, **__: object) -> Tensor:
        passed.append(tokens)
        return tokens

    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = hand_on
        yield passed
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:  # somebody else's, put there before
                block.forward = forward


def _changed(tokens: Tensor) -> Tensor:
    """Tell which tokens (2, tokens, channels) differ between two images."""
    change = (tokens[0] - tokens[1]).abs().amax(dim=-1)
    # Equal rows of a product may differ in their last digits.
    return torch.gt(change, torch.finfo(change.dtype).eps ** 0.5 * change.max())


def _structure(block: nn.Module) -> tuple[str, list[dict[str, Any]]]:
    """Describe a block by its modules and their plain attributes: all that forward can ask."""
    plain = (bool, int, float, str, tuple)
    return repr(block), [
        {name: value for name, value in vars(part).items() if isinstance(value, plain)}
        for part in block.modules()
    ]


class _EnoughSeenError(Exception):
    """Ends a forward pass whose rest is of no interest."""
