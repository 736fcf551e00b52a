"""Where a model's tokens are and which of them its head reads, read from the model itself.

A survey run on torch's meta device (shapes only: no memory, no weights, a fraction of a second)
shows every attention call. A model whose calls are not one global attention a block is refused
with the reason, since rollout is not defined for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitviz.capture import Attention, AttentionCapture, AttentionRecord
from vitviz.errors import UnsupportedModelError
from vitviz.trace import on_meta

__all__ = [
    "AttentionCall",
    "Readout",
    "TokenLayout",
    "block_names",
    "blocks_of",
    "check_mixing",
    "check_readout",
    "patch_embedding",
    "patch_grid",
    "patch_size",
    "read_layout",
    "survey",
]

_INSTEAD = "use a plain ViT (deit_small, say)"


class Readout(Enum):
    """Which tokens of the last block the head pools."""

    CLASS_TOKEN = "class token"
    FIRST_TOKEN = "first token"
    CLASS_AND_DISTILLATION = "mean of the class and the distillation token"
    PATCH_AVERAGE = "average of the patch tokens"
    TOKEN_AVERAGE = "average of all tokens"
    ATTENTION_POOLING = "attention pooling"
    CLASS_ATTENTION = "class token, which joins after the blocks and attends to all tokens"


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The token sequence of a model at one input size.

    Attributes:
        class_tokens: Number of class tokens, at the front.
        distillation_tokens: Number of distillation tokens.
        register_tokens: Number of registers and other prefix tokens.
        grid: (rows, cols) of the patch tokens.
        blocks: Number of transformer blocks, one attention call each.
        readout: Which tokens the head reads.
        tail: Attention calls after the blocks, of one query each, that pool the tokens.
        pooled_from: The first token that they read; 0 without them.
    """

    class_tokens: int
    distillation_tokens: int
    register_tokens: int
    grid: tuple[int, int]
    blocks: int
    readout: Readout
    tail: int = 0
    pooled_from: int = 0

    @property
    def calls(self) -> int:
        """Number of attention calls in a forward pass."""
        return self.blocks + self.tail

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patch tokens."""
        return self.class_tokens + self.distillation_tokens + self.register_tokens

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.prefix_tokens + math.prod(self.grid)

    def readout_weights(self, tokens: int) -> Tensor:
        """Return w (tokens), the weights with which the head pools tokens; they sum to 1.

        Attention pooling has other weights for each image: here every token that it reads counts
        the same.

        Args:
            tokens: Length of the sequence, which differs from ``self.tokens`` at other input sizes.
        """
        weights = torch.zeros(tokens)
        if self.readout is Readout.CLASS_AND_DISTILLATION:
            weights[:2] = 0.5
        elif self.readout is Readout.PATCH_AVERAGE:
            weights[self.prefix_tokens :] = 1 / (tokens - self.prefix_tokens)
        elif self.tail or self.readout is Readout.TOKEN_AVERAGE:
            weights[self.pooled_from :] = 1 / (tokens - self.pooled_from)
        else:
            weights[0] = 1
        return weights

    def described_prefix(self) -> str:
        """Say in words which prefix tokens there are: "1 class + 4 registers"."""
        parts = [
            (self.class_tokens, "class"),
            (self.distillation_tokens, "distillation"),
            (self.register_tokens, "register" if self.register_tokens == 1 else "registers"),
        ]
        return " + ".join(f"{count} {name}" for count, name in parts if count) or "none"


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What the survey saw of one attention call.

    Attributes:
        block: Index of the block that made it; None outside the blocks.
        tokens: Length of the sequence that entered that block; None where it is no sequence.
        shape: Of its probabilities: (batch, heads, queries, keys) where it attends globally.
    """

    block: int | None
    tokens: int | None
    shape: tuple[int, ...]


def survey(module: nn.Module, input_size: tuple[int, int]) -> list[AttentionCall]:
    """Run a model on the meta device and list its attention calls in execution order.

    Args:
        module: The model, with or without weights.
        input_size: (height, width) of the image.

    Raises:
        UnsupportedModelError: The model does not run on the meta device at this size.
    """
    state, image = on_meta(module, (_input_channels(module), *input_size))
    calls: list[AttentionCall] = []
    running = _Running()

    def note(record: Attention) -> None:
        call = AttentionCall(block=running.block, tokens=running.tokens, shape=record.shape)
        calls.append(call)

    with AttentionCapture(module, on_record=note), running.watch(module), torch.no_grad():
        try:
            torch.func.functional_call(module, state, (image,))
        except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"{type(module).__name__} cannot be run on a {input_size[0]}×{input_size[1]} image "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error
    return calls


def read_layout(module: nn.Module, input_size: tuple[int, int]) -> TokenLayout:
    """Read the token layout and the readout from a model, or refuse it with the reason.

    Args:
        module: The model, with or without weights.
        input_size: (height, width) of the images that it will see.

    Raises:
        UnsupportedModelError: Rollout is not defined for this model, or its tokens are unknown.
    """
    blocks = len(blocks_of(module))
    if not blocks:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no single sequence of transformer blocks, so its "
            f"attention does not chain into a rollout; {_INSTEAD}"
        )
    calls = survey(module, input_size)
    tokens = _constant_tokens(module, calls, blocks)
    tail = _tail_calls(module, calls[blocks:], tokens)
    joins_late = bool(tail) and tail[0].shape[-1] > tokens
    counts = (0, 0, 0) if joins_late else _prefix_counts(module)
    if not tail:
        readout = _readout(module, sum(counts), counts[0])
    else:
        readout = Readout.CLASS_ATTENTION if joins_late else Readout.ATTENTION_POOLING
    return TokenLayout(
        class_tokens=counts[0],
        distillation_tokens=counts[1],
        register_tokens=counts[2],
        grid=patch_grid(module, input_size, tokens - sum(counts)),
        blocks=blocks,
        readout=readout,
        tail=len(tail),
        pooled_from=max(tokens - tail[0].shape[-1], 0) if tail else 0,
    )


def patch_grid(module: nn.Module, input_size: tuple[int, int], patches: int) -> tuple[int, int]:
    """Find the (rows, cols) of the patch tokens; the token count has the last word.

    Raises:
        UnsupportedModelError: No grid fits the number of patch tokens.
    """
    embed: Any = patch_embedding(module)
    candidates = []
    if hasattr(embed, "dynamic_feat_size"):
        candidates.append(tuple(embed.dynamic_feat_size(input_size)))
    candidates.append(tuple(getattr(embed, "grid_size", None) or ()))
    rows, cols = patch_size(module)
    candidates.append((input_size[0] // rows, input_size[1] // cols))
    for grid in candidates:
        if len(grid) == 2 and math.prod(grid) == patches:
            _expect_inside(module, grid, (rows, cols), input_size)
            return int(grid[0]), int(grid[1])
    raise UnsupportedModelError(
        f"{type(module).__name__} makes {patches} patch tokens of a "
        f"{input_size[0]}×{input_size[1]} image, and no grid that it names has that many"
    )


def _expect_inside(
    module: nn.Module, grid: tuple[int, ...], patch: tuple[int, int], size: tuple[int, int]
) -> None:
    """Make sure that no patch reaches beyond the image, as where a model pads it."""
    needed = tuple(count * side for count, side in zip(grid, patch, strict=True))
    if any(need > side for need, side in zip(needed, size, strict=True)):
        whole = tuple(side // each * each for side, each in zip(size, patch, strict=True))
        raise UnsupportedModelError(
            f"{type(module).__name__} pads {size[0]}×{size[1]} images to {needed[0]}×{needed[1]}, "
            f"so that patches lie beyond the image; build it for {whole[0]}×{whole[1]}, say"
        )


def block_names(module: nn.Module) -> list[str]:
    """Return the names of a model's blocks; empty where they are no single sequence."""
    home = "" if _trunk(module) is module else "encoder."
    return [f"{home}blocks.{index}" for index in range(len(blocks_of(module)))]


def patch_embedding(module: nn.Module) -> nn.Module | None:
    """Return the part that makes tokens of an image, None where it is not to be found."""
    trunk = _trunk(module)
    return getattr(trunk, "patch_embed", None) or getattr(trunk, "embeds", None)


def patch_size(module: nn.Module) -> tuple[int, int]:
    """Return the (height, width) of a patch in pixels, (1, 1) where the model does not say."""
    stem: Any = patch_embedding(module)
    if hasattr(stem, "feat_ratio"):  # with convolutions before it, which stride as well
        rows, cols = stem.feat_ratio(as_scalar=False)
        return int(rows), int(cols)
    for owner in (patch_embedding(module), _trunk(module)):
        size = getattr(owner, "patch_size", None)
        if size:
            return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return 1, 1


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
    image = torch.randn(1, _input_channels(module), *input_size, generator=generator)
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
            f"{type(module).__name__} does something to its tokens between its blocks, which "
            f"attention maps do not show; {_INSTEAD}"
        )
    if not output.isfinite().all():
        raise UnsupportedModelError(
            f"{type(module).__name__} gives numbers that are not finite as {output.dtype}, even "
            "without its blocks: its weights are too large; --precision fp32 has the widest range"
        )
    reached = gradient[0].abs().amax(dim=-1).cpu() > 0
    if not torch.equal(reached, expected):
        raise UnsupportedModelError(
            f"{type(module).__name__} should read the {layout.readout.value}, but its output "
            f"depends on {int(reached.sum())} of {len(reached)} tokens, not on those "
            f"{int(expected.sum())}: its readout is unknown to vitviz"
        )
    tolerance = torch.finfo(output.dtype).eps ** 0.5
    if not bool((output[0] - output[1]).abs().max() <= tolerance * output.abs().max()):
        raise UnsupportedModelError(
            f"{type(module).__name__} should read the {layout.readout.value}, but its output "
            "changes with the order of its tokens: its readout is unknown to vitviz"
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
    image = torch.randn(1, _input_channels(module), *input_size, generator=generator)
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
            f"{len(changed[-1])}, so its maps do not chain; {_INSTEAD}"
        )
    if any(bool((tokens & ~entered).any()) for tokens in changed):
        raise UnsupportedModelError(
            f"{type(module).__name__} mixes tokens by more than attention inside its blocks, which "
            f"attention maps do not show; {_INSTEAD}"
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


def _trunk(module: nn.Module) -> nn.Module:
    """Return the part that owns the blocks: the model itself, or the encoder that it wraps."""
    encoder = getattr(module, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) and hasattr(encoder, "blocks") else module


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return a model's blocks; none where they are no single sequence."""
    blocks = getattr(_trunk(module), "blocks", None)
    return list(blocks) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else []


def _input_channels(module: nn.Module) -> int:
    config = getattr(module, "pretrained_cfg", None) or {}
    return int(config.get("input_size", (3,))[0])


class _Running:
    """Knows which block is running, and on how many tokens."""

    def __init__(self) -> None:
        self.block: int | None = None
        self.tokens: int | None = None

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        handles = []
        for index, block in enumerate(blocks_of(module)):
            handles += [
                block.register_forward_pre_hook(partial(self._enter, index)),
                block.register_forward_hook(self._leave),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, index: int, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        first = inputs[0] if inputs else None
        self.block = index
        self.tokens = first.shape[1] if isinstance(first, Tensor) and first.dim() == 3 else None

    def _leave(self, *_: object) -> None:
        self.block = self.tokens = None


def _constant_tokens(module: nn.Module, calls: list[AttentionCall], blocks: int) -> int:
    """Return the token count, if each block makes one attention call over all tokens."""
    name = type(module).__name__
    inside = [call for call in calls if call.block is not None]
    if [call.block for call in calls[:blocks]] != list(range(blocks)) or len(inside) != blocks:
        raise UnsupportedModelError(
            f"{name} makes {len(inside)} visible attention calls in {blocks} blocks, and rollout "
            f"needs exactly one in each; {_INSTEAD}"
        )
    sizes = {size for call in inside for size in (call.tokens, *call.shape[-2:])}
    if len(sizes) != 1 or any(len(call.shape) != 4 or call.shape[0] != 1 for call in inside):
        seen = ", ".join(str(size) for size in sorted(size for size in sizes if size))
        raise UnsupportedModelError(
            f"{name} attends within windows, between channels, or changes its number of tokens "
            f"({seen} seen), so its maps do not chain; {_INSTEAD}"
        )
    (tokens,) = sizes
    assert tokens is not None
    return tokens


def _tail_calls(
    module: nn.Module, outside: list[AttentionCall], tokens: int
) -> list[AttentionCall]:
    """Return the attention calls after the blocks: none, one that pools, or class attention."""
    if not outside:
        return outside
    keys = outside[0].shape[-1]
    single = all(len(call.shape) == 4 and call.shape[2:] == (1, keys) for call in outside)
    pools = len(outside) == 1 and keys <= tokens and getattr(module, "global_pool", "") == "map"
    class_attention = keys == tokens + 1 and getattr(module, "global_pool", "") == "token"
    if not single or not (pools or class_attention):
        shapes = ", ".join(str(call.shape) for call in outside[:2])
        raise UnsupportedModelError(
            f"{type(module).__name__} makes {len(outside)} attention calls outside its blocks "
            f"({shapes}); expected none, one of a single query that pools the tokens, or class "
            f"attention; {_INSTEAD}"
        )
    return outside


def _prefix_counts(module: nn.Module) -> tuple[int, int, int]:
    """Count class, distillation and other prefix tokens; the first two stand in front."""
    trunk = _trunk(module)
    owners = (module, trunk, patch_embedding(module))
    total = int(getattr(module, "num_prefix_tokens", getattr(trunk, "num_prefix_tokens", 0)))
    class_tokens = min(_token_count(owners, "cls_token"), total)
    distillation = min(_token_count(owners, "dist_token"), total - class_tokens)
    return class_tokens, distillation, total - class_tokens - distillation


def _token_count(owners: tuple[Any, ...], name: str) -> int:
    found = next(
        (tokens for owner in owners if (tokens := getattr(owner, name, None)) is not None), None
    )
    return 0 if found is None else int(found.shape[-2])


def _readout(module: nn.Module, prefix: int, class_tokens: int) -> Readout:
    pooling = getattr(module, "global_pool", None)
    merged = getattr(module, "encoder_pool", "") not in ("", "none")
    if hasattr(module, "head_dist"):
        return Readout.CLASS_AND_DISTILLATION
    if pooling == "token":
        return Readout.CLASS_TOKEN if class_tokens else Readout.FIRST_TOKEN
    if pooling == "avg" and not merged:
        everything = getattr(module, "pool_include_prefix", False) or not prefix
        return Readout.TOKEN_AVERAGE if everything else Readout.PATCH_AVERAGE
    how = f"{pooling or 'nothing'!r}" + (" after merging them" if merged else "")
    raise UnsupportedModelError(
        f"{type(module).__name__} pools its tokens by {how}, which gives no weights to read the "
        "rollout with; expected a class token, an average or attention pooling"
    )
