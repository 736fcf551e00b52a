"""Where a model's tokens are and which of them its head reads, read from the model itself.

A survey run on torch's meta device (shapes only: no memory, no weights, a fraction of a second)
shows every attention call. A model whose calls are not one global attention a block is refused
with the reason, since rollout is not defined for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitviz.errors import UnsupportedModelError, first_line
from vitviz.models.attention import Attention
from vitviz.models.capture import AttentionCapture
from vitviz.models.hooks import hooked
from vitviz.models.structure import (
    INSTEAD,
    blocks_of,
    input_channels,
    on_meta,
    patch_embedding,
    patch_grid,
    trunk,
)
from vitviz.models.twofold import CLASS_BESIDE_AVERAGE

__all__ = ["AttentionCall", "Readout", "TokenLayout", "read_layout", "survey", "token_count"]


class Readout(Enum):
    """Which tokens of the last block the head pools."""

    CLASS_TOKEN = "class token"
    FIRST_TOKEN = "first token"
    CLASS_AND_DISTILLATION = "mean of the class and the distillation token"
    PATCH_AVERAGE = "average of the patch tokens"
    TOKEN_AVERAGE = "average of all tokens"
    CLASS_BESIDE_AVERAGE = "class token beside the average of the patch tokens"
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
    def outline(self) -> str:
        """What the head reads, and the grid, in a few words."""
        rows, cols = self.grid
        return f"{self.readout.value.partition(',')[0]}, {rows}×{cols} patches"

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
        elif self.readout is Readout.CLASS_BESIDE_AVERAGE:
            weights[self.prefix_tokens :] = 0.5 / (tokens - self.prefix_tokens)
            weights[0] = 0.5
        elif self.tail or self.readout is Readout.TOKEN_AVERAGE:
            weights[self.pooled_from :] = 1 / (tokens - self.pooled_from)
        else:
            weights[0] = 1
        return weights

    def average(self, evidence: Sequence[Tensor]) -> Tensor:
        """Average what the tokens hold in front of each block; (batch, tokens) each, and all."""
        return torch.stack(list(evidence)).mean(dim=0)

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
    state, image = on_meta(module, (input_channels(module), *input_size))
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
                f"{type(module).__name__} does not run on a {input_size[0]}×{input_size[1]} image "
                f"({first_line(error)})"
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
            f"attention maps cannot be multiplied into a rollout; {INSTEAD}"
        )
    channels = input_channels(module)
    if channels not in (1, 3):
        raise UnsupportedModelError(
            f"{type(module).__name__} takes images of {channels} channels; expected 3 (red, green, "
            "blue) or 1 (grey): try a model built with in_chans=3 or 1"
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


class _Running:
    """Knows which block is running, and on how many tokens."""

    def __init__(self) -> None:
        self.block: int | None = None
        self.tokens: int | None = None

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        with hooked(self._hooks(module)):
            yield

    def _hooks(self, module: nn.Module) -> Iterator[RemovableHandle]:
        for index, block in enumerate(blocks_of(module)):
            yield block.register_forward_pre_hook(partial(self._enter, index))
            yield block.register_forward_hook(self._leave)

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
            f"{name} makes {len(inside)} visible attention calls in {blocks} blocks, but rollout "
            f"needs exactly one per block; {INSTEAD}"
        )
    sizes = {size for call in inside for size in (call.tokens, *call.shape[-2:])}
    if len(sizes) != 1 or any(len(call.shape) != 4 or call.shape[0] != 1 for call in inside):
        seen = ", ".join(str(size) for size in sorted(size for size in sizes if size))
        raise UnsupportedModelError(
            f"{name} attends within windows or across channels, or changes its number of tokens "
            f"({seen} seen), so its attention maps cannot be multiplied; {INSTEAD}"
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
            f"attention; {INSTEAD}"
        )
    return outside


def _prefix_counts(module: nn.Module) -> tuple[int, int, int]:
    """Count class, distillation and other prefix tokens; the first two stand in front."""
    owner = trunk(module)
    owners = (module, owner, patch_embedding(module))
    total = int(getattr(module, "num_prefix_tokens", getattr(owner, "num_prefix_tokens", 0)))
    class_tokens = min(token_count(owners, "cls_token"), total)
    distillation = min(token_count(owners, "dist_token"), total - class_tokens)
    return class_tokens, distillation, total - class_tokens - distillation


def token_count(owners: tuple[Any, ...], name: str) -> int:
    """Count the tokens that a parameter of this name holds."""
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
    if pooling == CLASS_BESIDE_AVERAGE:
        return Readout.CLASS_BESIDE_AVERAGE
    if pooling == "avg" and not merged:
        everything = getattr(module, "pool_include_prefix", False) or not prefix
        return Readout.TOKEN_AVERAGE if everything else Readout.PATCH_AVERAGE
    how = f"{pooling or 'nothing'!r}" + (" after merging them" if merged else "")
    raise UnsupportedModelError(
        f"{type(module).__name__} pools its tokens by {how}, which gives each token no fixed "
        "weight in the output; expected a class token, an average or attention pooling"
    )
