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
from typing import Any

import torch
from torch import Tensor, nn

from vitviz.capture import AttentionCapture, AttentionRecord
from vitviz.errors import UnsupportedModelError

__all__ = ["AttentionCall", "Readout", "TokenLayout", "check_readout", "read_layout", "survey"]


class Readout(Enum):
    """Which tokens of the last block the head pools."""

    CLASS_TOKEN = "class token"
    FIRST_TOKEN = "first token"
    CLASS_AND_DISTILLATION = "mean of the class and the distillation token"
    PATCH_AVERAGE = "average of the patch tokens"
    TOKEN_AVERAGE = "average of all tokens"


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The token sequence of a model at one input size.

    Attributes:
        class_tokens: Number of class tokens, at the front.
        distillation_tokens: Number of distillation tokens.
        register_tokens: Number of registers and other prefix tokens.
        grid: (rows, cols) of the patch tokens.
        blocks: Number of transformer blocks, one attention call each.
        heads: Attention heads of the first block.
        readout: Which tokens the head reads.
    """

    class_tokens: int
    distillation_tokens: int
    register_tokens: int
    grid: tuple[int, int]
    blocks: int
    heads: int
    readout: Readout

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

        Args:
            tokens: Length of the sequence, which differs from ``self.tokens`` at other input sizes.
        """
        weights = torch.zeros(tokens)
        if self.readout is Readout.CLASS_AND_DISTILLATION:
            weights[:2] = 0.5
        elif self.readout is Readout.PATCH_AVERAGE:
            weights[self.prefix_tokens :] = 1 / (tokens - self.prefix_tokens)
        elif self.readout is Readout.TOKEN_AVERAGE:
            weights[:] = 1 / tokens
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
        shape: Of its probabilities: (batch, heads, queries, keys) where it attends globally.
    """

    block: int | None
    shape: tuple[int, ...]


def survey(module: nn.Module, input_size: tuple[int, int]) -> list[AttentionCall]:
    """Run a model on the meta device and list its attention calls in execution order.

    Args:
        module: The model, with or without weights.
        input_size: (height, width) of the image.

    Raises:
        UnsupportedModelError: The model does not run on the meta device at this size.
    """
    state = {
        name: tensor.detach().to("meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    some = next(iter(state.values()), torch.empty(0))
    channels = _input_channels(module)
    image = torch.empty(1, channels, *input_size, device="meta", dtype=some.dtype)
    calls: list[AttentionCall] = []
    current: list[int | None] = [None]

    def note(record: AttentionRecord) -> None:
        shape = (*record.query.shape[:-1], record.key.shape[-2])
        calls.append(AttentionCall(block=current[0], shape=shape))

    with AttentionCapture(module, on_record=note), _block_marks(module, current), torch.no_grad():
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
    blocks = _blocks(module)
    if not blocks:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no single sequence of transformer blocks, so its "
            "attention does not chain into a rollout; use a plain ViT (deit_small, say)"
        )
    calls = survey(module, input_size)
    tokens = _constant_tokens(module, calls, len(blocks))
    prefix = _prefix_counts(module)
    return TokenLayout(
        class_tokens=prefix[0],
        distillation_tokens=prefix[1],
        register_tokens=prefix[2],
        grid=patch_grid(module, input_size, tokens - sum(prefix)),
        blocks=len(blocks),
        heads=calls[0].shape[1],
        readout=_readout(module, prefix),
    )


def patch_grid(module: nn.Module, input_size: tuple[int, int], patches: int) -> tuple[int, int]:
    """Find the (rows, cols) of the patch tokens; the token count has the last word.

    Raises:
        UnsupportedModelError: No grid fits the number of patch tokens.
    """
    embed: Any = getattr(module, "patch_embed", None)
    candidates = []
    if hasattr(embed, "dynamic_feat_size"):
        candidates.append(tuple(embed.dynamic_feat_size(input_size)))
    candidates.append(tuple(getattr(embed, "grid_size", None) or ()))
    for grid in candidates:
        if len(grid) == 2 and math.prod(grid) == patches:
            return int(grid[0]), int(grid[1])
    raise UnsupportedModelError(
        f"{type(module).__name__} makes {patches} patch tokens of a "
        f"{input_size[0]}×{input_size[1]} image, and no grid that it names has that many"
    )


def check_readout(module: nn.Module, layout: TokenLayout) -> None:
    """Prove the readout on the head itself: gradients reach exactly the tokens that it names.

    Args:
        module: The model with its weights, in evaluation mode.
        layout: What was read from its attributes.

    Raises:
        UnsupportedModelError: The head reads other tokens.
    """
    some = next(module.parameters())
    width = int(getattr(module, "embed_dim", 0) or getattr(module, "num_features", 0))
    generator = torch.Generator().manual_seed(0)
    last = torch.randn(1, layout.tokens, width, generator=generator)
    last = last.to(device=some.device, dtype=some.dtype).requires_grad_(True)
    with AttentionCapture(module), torch.enable_grad():
        pooled = module.forward_head(last, pre_logits=True)  # type: ignore[operator]
        direction = torch.randn(pooled.shape, generator=generator).to(pooled)
        (gradient,) = torch.autograd.grad((pooled * direction).sum(), last)
    reached = gradient[0].abs().amax(dim=-1).cpu() > 0
    expected = layout.readout_weights(layout.tokens) > 0
    if not torch.equal(reached, expected):
        raise UnsupportedModelError(
            f"{type(module).__name__} should read the {layout.readout.value}, but its head depends "
            f"on {int(reached.sum())} of {layout.tokens} tokens, not on those "
            f"{int(expected.sum())}: its readout is unknown to vitviz"
        )


def _blocks(module: nn.Module) -> list[nn.Module]:
    blocks = getattr(module, "blocks", None)
    return list(blocks) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else []


def _input_channels(module: nn.Module) -> int:
    config = getattr(module, "pretrained_cfg", None) or {}
    return int(config.get("input_size", (3,))[0])


@contextmanager
def _block_marks(module: nn.Module, current: list[int | None]) -> Iterator[None]:
    """Keep in a one-element list the index of the block that is running."""

    def enter(index: int | None) -> None:
        current[0] = index

    handles = []
    for index, block in enumerate(_blocks(module)):
        handles += [
            block.register_forward_pre_hook(lambda *_, index=index: enter(index)),
            block.register_forward_hook(lambda *_: enter(None)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _constant_tokens(module: nn.Module, calls: list[AttentionCall], blocks: int) -> int:
    """Return the token count, if each block makes one attention call over all tokens."""
    name = type(module).__name__
    inside = [call for call in calls if call.block is not None]
    if [call.block for call in inside] != list(range(blocks)):
        raise UnsupportedModelError(
            f"{name} makes {len(inside)} visible attention calls in {blocks} blocks, and rollout "
            "needs exactly one in each; use a plain ViT (deit_small, say)"
        )
    if len(calls) != len(inside):
        raise UnsupportedModelError(
            f"{name} makes {len(calls) - len(inside)} attention calls outside its blocks "
            "(attention pooling), which vitviz does not read yet"
        )
    sizes = {size for call in calls for size in call.shape[-2:]}
    if len(sizes) != 1 or any(len(call.shape) != 4 or call.shape[0] != 1 for call in calls):
        raise UnsupportedModelError(
            f"{name} attends within windows or changes its number of tokens "
            f"({', '.join(map(str, sorted(sizes)))} seen), so its maps do not chain; "
            "use a plain ViT (deit_small, say)"
        )
    return sizes.pop()


def _prefix_counts(module: nn.Module) -> tuple[int, int, int]:
    """Count class, distillation and other prefix tokens; the first two stand in front."""
    total = int(getattr(module, "num_prefix_tokens", 0))
    class_tokens = _token_count(getattr(module, "cls_token", None))
    distillation = _token_count(getattr(module, "dist_token", None))
    return class_tokens, distillation, total - class_tokens - distillation


def _token_count(parameter: Tensor | None) -> int:
    return 0 if parameter is None else int(parameter.shape[-2])


def _readout(module: nn.Module, prefix: tuple[int, int, int]) -> Readout:
    pooling = getattr(module, "global_pool", None)
    if prefix[1] and hasattr(module, "head_dist"):
        return Readout.CLASS_AND_DISTILLATION
    if pooling == "token":
        return Readout.CLASS_TOKEN if prefix[0] else Readout.FIRST_TOKEN
    if pooling == "avg":
        everything = getattr(module, "pool_include_prefix", False) or not sum(prefix)
        return Readout.TOKEN_AVERAGE if everything else Readout.PATCH_AVERAGE
    raise UnsupportedModelError(
        f"{type(module).__name__} pools its tokens by {pooling or 'nothing'!r}, which gives no "
        "weights to read the rollout with; expected class token or average pooling"
    )
