"""Proofs on the model itself: its head reads the tokens named, and attention alone mixes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitviz.errors import UnsupportedModelError
from vitviz.models.attention import Attention, AttentionRecord
from vitviz.models.capture import AttentionCapture
from vitviz.models.hooks import hooked
from vitviz.models.structure import INSTEAD, blocks_of, input_channels
from vitviz.models.tokens import Readout, TokenLayout
from vitviz.models.wrapping import logits_of

__all__ = ["check_mixing", "check_readout"]


def check_readout(module: nn.Module, layout: TokenLayout, input_size: tuple[int, int]) -> int:
    """Prove the readout on the model itself: gradients reach exactly the tokens that it names.

    The blocks are skipped, so this costs little. The same image a second time has the tokens that
    are averaged in another order, which must not matter.

    Args:
        module: The model with its weights.
        layout: What was read from its attributes.
        input_size: (height, width) of the images that it will see.

    Returns:
        How many numbers it puts out for an image.

    Raises:
        UnsupportedModelError: The head reads other tokens, or not all of them alike.
    """
    expected = layout.readout_weights(layout.tokens) > 0
    order = torch.arange(layout.tokens)
    if layout.readout in (Readout.PATCH_AVERAGE, Readout.TOKEN_AVERAGE):
        order[expected] = order[expected].roll(1)
    elif layout.readout is Readout.CLASS_BESIDE_AVERAGE:
        order[layout.prefix_tokens :] = order[layout.prefix_tokens :].roll(1)
    run = _run_without_blocks(module, input_size, order)
    _require_untouched_between_blocks(module, run)
    _require_finite_output(module, run)
    _require_gradients_at(module, layout, run, expected)
    _require_any_order(module, layout, run)
    return run.output.shape[1]


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
    entered, *changed = _run_with_one_token_changed(module, input_size)
    # Each block hands on as many tokens as it gets: only then do its maps chain.
    if any(tokens.shape != entered.shape for tokens in changed):
        raise UnsupportedModelError(
            f"{type(module).__name__} changes its number of tokens from {len(entered)} to "
            f"{len(changed[-1])}, so its attention maps cannot be multiplied; {INSTEAD}"
        )
    # Attention apart, a token depends on itself alone.
    if any(bool((tokens & ~entered).any()) for tokens in changed):
        raise UnsupportedModelError(
            f"{type(module).__name__} mixes tokens by more than attention inside its blocks, and "
            f"attention maps do not show the rest; {INSTEAD}"
        )


def _same_image_twice(
    module: nn.Module, input_size: tuple[int, int]
) -> tuple[Tensor, torch.Generator]:
    """Return a batch (2, channels, height, width) of one random image, and its generator."""
    some = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, input_channels(module), *input_size, generator=generator)
    return image.repeat(2, 1, 1, 1).to(device=some.device, dtype=some.dtype), generator


@dataclass(frozen=True, kw_only=True, eq=False)
class _HeadRun:
    """What a model gives when its blocks are skipped.

    Attributes:
        output: (2, numbers), of the image and of the image with its tokens in another order.
        gradient: (2, tokens, channels), of a random direction of the first output.
        passed: The tokens that each block got.
    """

    output: Tensor
    gradient: Tensor
    passed: list[Tensor]


def _run_without_blocks(module: nn.Module, input_size: tuple[int, int], order: Tensor) -> _HeadRun:
    """Run a model on an image twice without its blocks, the second time with tokens in an order."""
    images, generator = _same_image_twice(module, input_size)
    last: list[Tensor] = []

    def begin(block: nn.Module, inputs: object, output: Tensor) -> Tensor:
        tokens = output.detach().clone()
        if tokens.shape[1] == len(order):
            tokens[1] = tokens[1, order.to(tokens.device)]
        last.append(tokens.requires_grad_(True))
        return tokens

    blocks = blocks_of(module)
    with (
        hooked([blocks[-1].register_forward_hook(begin)]),
        AttentionCapture(module),
        _skipped(blocks) as passed,
        torch.enable_grad(),
    ):
        output = logits_of(module, module(images)).flatten(1)
        direction = torch.randn(output.shape[1], generator=generator).to(output)
        (gradient,) = torch.autograd.grad((output[0] * direction).sum(), last)
    return _HeadRun(output=output, gradient=gradient, passed=passed)


def _require_untouched_between_blocks(module: nn.Module, run: _HeadRun) -> None:
    """Prove that a block gets what the one before it gave: skipped blocks hand on one tensor."""
    if any(tokens is not run.passed[0] for tokens in run.passed):
        raise UnsupportedModelError(
            f"{type(module).__name__} changes its tokens between its blocks, which attention maps "
            f"do not show; {INSTEAD}"
        )


def _require_finite_output(module: nn.Module, run: _HeadRun) -> None:
    """Make sure that there are numbers to prove anything by."""
    if not run.output.isfinite().all():
        raise UnsupportedModelError(
            f"{type(module).__name__} gives values that are not finite as {run.output.dtype}, "
            "even with its blocks skipped: its weights are too large; try --precision fp32"
        )


def _require_gradients_at(
    module: nn.Module, layout: TokenLayout, run: _HeadRun, expected: Tensor
) -> None:
    """Prove that the head reads the tokens (tokens,) named, each of them, and no others."""
    reached = run.gradient[0].abs().amax(dim=-1).cpu() > 0
    if not torch.equal(reached, expected):
        raise UnsupportedModelError(
            f"{type(module).__name__} declares that it reads the {layout.readout.value} "
            f"({int(expected.sum())} of {len(expected)} tokens), but its output depends on "
            f"{int(reached.sum())} of {len(reached)} tokens: vitviz cannot tell what its head "
            f"reads; {INSTEAD}"
        )


def _require_any_order(module: nn.Module, layout: TokenLayout, run: _HeadRun) -> None:
    """Prove that tokens that are averaged count alike: their order does not matter."""
    tolerance = torch.finfo(run.output.dtype).eps ** 0.5
    change = (run.output[0] - run.output[1]).abs().max()
    if not bool(change <= tolerance * run.output.abs().max()):
        raise UnsupportedModelError(
            f"{type(module).__name__} declares that it reads the {layout.readout.value}, but its "
            "output changes with the order of its tokens: vitviz cannot tell what its head reads; "
            f"{INSTEAD}"
        )


def _run_with_one_token_changed(module: nn.Module, input_size: tuple[int, int]) -> list[Tensor]:
    """Run an image twice, tokens attending to themselves only, one token of the second changed.

    Returns:
        Which tokens (tokens,) differ between the two: as they enter the first block, at every
        query after that, and as they leave the last block that is tried.
    """
    images, _ = _same_image_twice(module, input_size)
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

    def hooks() -> Iterator[RemovableHandle]:
        yield blocks[0].register_forward_pre_hook(enter)
        yield _last_to_try(blocks).register_forward_hook(leave)

    with (
        hooked(hooks()),
        AttentionCapture(module, isolate=True, on_record=ask),
        torch.no_grad(),
        suppress(_EnoughSeenError),
    ):
        module(images)
    return seen


def _last_to_try(blocks: list[nn.Module]) -> nn.Module:
    """Return the first block by which every structure has come once."""
    structures = [_structure(block) for block in blocks]
    return blocks[max(structures.index(structure) for structure in structures)]


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
