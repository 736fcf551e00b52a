"""The mathematics of vitviz once more: slow, literal, in float64, and from the formulas alone.

Nothing here imports the package, and nothing in the package may import this. Relevance is computed
image by image from full N×N matrices in NumPy; attention and its gradients come from a copy of the
model in double precision whose attention is not fused, by hooks on the inactive ``attn_drop``.

Sources: Abnar & Zuidema 2020 (arXiv 2005.00928); J. Gildenblat, "Exploring Explainability for
Vision Transformers" (2020).
"""

from __future__ import annotations

import copy
import math
import unittest.mock
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one forward pass of a float64 model gave, with its graph kept for gradients.

    Attributes:
        attention: A_l (batch, heads, N, N) for each block in execution order.
        logits: y (batch, classes).
    """

    attention: list[Array]
    logits: Array
    probabilities: list[Tensor]
    scores: Tensor

    def gradients(
        self, class_of_image: Sequence[int], versus: Sequence[int] | None = None
    ) -> list[Array]:
        """Return ∂y_c/∂A_l (batch, heads, N, N) for each block, c given for each image.

        With ``versus``, another class for each image: ∂(y_c − y_d)/∂A_l.
        """
        chosen = self.scores[torch.arange(len(class_of_image)), list(class_of_image)]
        if versus is not None:
            chosen = chosen - self.scores[torch.arange(len(versus)), list(versus)]
        gradients = torch.autograd.grad(chosen.sum(), self.probabilities, retain_graph=True)
        return [gradient.numpy().copy() for gradient in gradients]

    def top_class(self) -> list[int]:
        """Return the class of the largest logit of each image."""
        return [int(index) for index in self.logits.argmax(axis=1)]


def trace(model: nn.Module, images: Tensor, *, blocks: int) -> Trace:
    """Run a float64 copy of a timm model and read its attention probabilities.

    Args:
        model: A timm model; it is copied, never touched.
        images: (batch, channels, height, width).
        blocks: How many transformer blocks the model has, counted by hand.
    """
    double = copy.deepcopy(model).double().eval()
    seen: list[Tensor] = []
    for block in double.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, output: seen.append(output))
    scores = double(images.double().requires_grad_(True))
    assert len(seen) == blocks, f"hooks saw {len(seen)} blocks of {blocks}"
    attention = [probabilities.detach().numpy().copy() for probabilities in seen]
    for probabilities in attention:
        assert probabilities.ndim == 4 and probabilities.shape[2] == probabilities.shape[3]
        assert probabilities.min() >= 0
        assert np.abs(probabilities.sum(axis=3) - 1).max() < 1e-12, "not the final probabilities"
    return Trace(
        attention=attention,
        logits=scores.detach().numpy().copy(),
        probabilities=seen,
        scores=scores,
    )


def trace_whole(model: nn.Module, images: Tensor) -> Trace:
    """Run a float64 copy of any model in timm's manner and read every attention that it computes.

    The calls come in execution order, those of a pooling head last; they need not be square. With
    talking heads it is the attention after their mixing, which multiplies the values.

    Args:
        model: A timm model; it is copied, never touched.
        images: (batch, channels, height, width).
    """
    double = copy.deepcopy(model).double().eval()
    seen: list[Tensor] = []
    pooling: list[nn.Module] = []
    for module in double.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "attn_drop"):
            module.attn_drop.register_forward_hook(lambda _, inputs, output: seen.append(output))
        if hasattr(module, "latent"):  # attention pooling has no dropout to look at
            module.register_forward_pre_hook(lambda module, inputs: pooling.append(module))
            module.register_forward_hook(lambda module, inputs, output: pooling.clear())
    softmax = Tensor.softmax

    def watched(scores: Tensor, dim: int) -> Tensor:
        probabilities = softmax(scores, dim=dim)
        if pooling:
            seen.append(probabilities)
        return probabilities

    with unittest.mock.patch.object(Tensor, "softmax", watched):
        scores = double(images.double().requires_grad_(True))
    return Trace(
        attention=[probabilities.detach().numpy().copy() for probabilities in seen],
        logits=scores.detach().numpy().copy(),
        probabilities=seen,
        scores=scores,
    )


def fuse_heads(attention: Array, fusion: str) -> Array:
    """Step 2, rollout: (heads, N, N) to (N, N)."""
    return {"mean": np.mean, "max": np.max, "min": np.min}[fusion](attention, axis=0)


def fuse_gradient(attention: Array, gradient: Array) -> Array:
    """Step 2, grad-rollout: relu(mean over heads of A ⊙ ∂y/∂A)."""
    return np.maximum((attention * gradient).mean(axis=0), 0)


def discard_lowest(fused: Array, ratio: float) -> Array:
    """Step 3: the floor(ratio·N²) lowest entries become 0."""
    count = math.floor(ratio * fused.size)
    lowest = np.argsort(fused, axis=None, kind="stable")[:count]
    kept = fused.copy()
    kept.flat[lowest] = 0
    return kept


def normalise(fused: Array) -> Array:
    """Step 4: (F + I)/2, each row divided by its own sum."""
    mixed = (fused + np.eye(len(fused))) / 2
    return mixed / mixed.sum(axis=1, keepdims=True)


def multiply(maps: Sequence[Array]) -> Array:
    """Step 5: R = Â_{L−1} ⋯ Â_s, later blocks from the left."""
    rollout = np.eye(len(maps[0]))
    for one in maps:
        rollout = one @ rollout
    return rollout


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Steps 2 to 5, so that a test can plant a mistake in one of them."""

    fuse_heads: Callable[[Array, str], Array] = fuse_heads
    fuse_gradient: Callable[[Array, Array], Array] = fuse_gradient
    discard_lowest: Callable[[Array, float], Array] = discard_lowest
    normalise: Callable[[Array], Array] = normalise
    multiply: Callable[[Sequence[Array]], Array] = multiply


def token_relevance(
    attention: Sequence[Array],
    gradients: Sequence[Array] | None = None,
    *,
    readout: Array,
    fusion: str = "max",
    discard: float = 0.9,
    start_layer: int = 0,
    steps: Steps | None = None,
) -> Array:
    """Steps 2 to 6 for one image: wᵀR.

    Args:
        attention: A_l (heads, N, N) of each block.
        gradients: ∂y_c/∂A_l (heads, N, N) of each block for grad-rollout; None for rollout.
        readout: w (N).
        fusion: "mean", "max" or "min"; rollout only.
        discard: Share of the lowest entries set to 0.
        start_layer: Blocks before this one are left out.
        steps: The formulas, or a mistaken version of them.

    Returns:
        (N), the prefix tokens among them.
    """
    steps = steps or Steps()
    maps = []
    for block in range(start_layer, len(attention)):
        if gradients is None:
            fused = steps.fuse_heads(attention[block], fusion)
        else:
            fused = steps.fuse_gradient(attention[block], gradients[block])
        maps.append(steps.normalise(steps.discard_lowest(fused, discard)))
    return readout @ steps.multiply(maps)


def pooling_readout(fused: Array, tokens: int) -> Array:
    """w of a head that pools by attention: its fused row (1, K) over the last K tokens."""
    weights = np.zeros(tokens)
    weights[tokens - fused.shape[1] :] = fused[0]
    return weights / weights.sum()


def class_attention_readout(fused: Sequence[Array], tokens: int) -> Array:
    """w of a class token that joins after the blocks (CaiT): its row of its own blocks' rollout.

    In these blocks (1, 1 + tokens) only the class token, in front, attends; the others stay as they
    are. What remains on the class token itself, where no image has entered, is left out.
    """
    maps = []
    for row in fused:
        whole = np.zeros((tokens + 1, tokens + 1))
        whole[0] = row[0]
        maps.append(normalise(whole))
    row = multiply(maps)[0, 1:]
    return row / row.sum()


def on_grid(tokens: Array, prefix_tokens: int, grid: tuple[int, int]) -> Array:
    """Step 7: the patch tokens of wᵀR (N) as (rows, cols)."""
    return tokens[prefix_tokens:].reshape(grid)


def score_gradient(attention: Array, gradient: Array) -> Array:
    """∂y/∂S, S the scores before softmax: what a hook on the wrong node reads as ∂y/∂A."""
    return attention * (gradient - (attention * gradient).sum(axis=-1, keepdims=True))


def threshold_gap(fused: Array, ratio: float) -> float:
    """Distance between the last discarded and the first kept entry, relative to the largest.

    Rounding may swap two entries closer than float32 resolves, which would make a test depend on
    the machine. Equal entries count as far apart: which of them goes is immaterial.
    """
    ordered = np.sort(fused, axis=None)
    count = math.floor(ratio * fused.size)
    if count == 0 or ordered[count] == ordered[count - 1]:
        return math.inf
    return float((ordered[count] - ordered[count - 1]) / ordered[-1])


def class_token(tokens: int) -> Array:
    """w of a head that reads the class token."""
    return np.eye(tokens)[0]


def class_and_distillation(tokens: int) -> Array:
    """w of a distilled head, which averages two logits."""
    return (np.eye(tokens)[0] + np.eye(tokens)[1]) / 2


def class_beside_patches_after(prefix_tokens: int) -> Callable[[int], Array]:
    """w of a head that reads the class token beside the average behind a prefix: half for each."""

    def readout(tokens: int) -> Array:
        return (class_token(tokens) + patches_after(prefix_tokens)(tokens)) / 2

    return readout


def all_tokens(tokens: int) -> Array:
    """w of a head that averages every token."""
    return np.full(tokens, 1 / tokens)


def patches_after(prefix_tokens: int) -> Callable[[int], Array]:
    """w of a head that averages the tokens behind a prefix."""

    def readout(tokens: int) -> Array:
        weights = np.zeros(tokens)
        weights[prefix_tokens:] = 1 / (tokens - prefix_tokens)
        return weights

    return readout
