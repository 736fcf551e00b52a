"""Evidence of a model of several stages in float64, from the formulas; knows nothing of vitviz.

The model runs once while each part that is not linear notes down its constants (standard
deviations, gates, attention probabilities). Then these parts are replaced by the linear maps that
the constants make, and what ordinary differentiation says of that linear network is exact.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import GroupNorm1, LayerNorm2d
from timm.models.convnext import ConvNeXtBlock
from timm.models.metaformer import MetaFormerBlock, StarReLU
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from linear_oracles import balanced

Array = NDArray[np.float64]


def stage_evidence(
    model: nn.Module,
    image: Tensor,
    class_index: int,
    stages: Sequence[str],
    *,
    balanced_blocks: slice = slice(0),
) -> tuple[list[Array], float]:
    """Compute Σ over channels of x ⊙ ∂y/∂x at the output of some modules.

    Args:
        model: A model of timm, without attention that is fused.
        image: (1, channels, height, width).
        class_index: y is the logit of this class.
        stages: Names of modules.
        balanced_blocks: The blocks, of all in execution order, whose residual additions go by the
            residual rule.

    Returns:
        Of each module (rows, cols), and y.
    """
    linear = copy.deepcopy(model).double().eval()
    for part in linear.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    blocks = [part for part in linear.modules() if type(part) in _BLOCKS]
    for block in blocks[balanced_blocks]:
        block.forward = partial(_BLOCKS[type(block)], block)
    for part in list(linear.modules()):
        make = _frozen(part)
        if make is not None:
            part.forward = _noting(part, make)
    with torch.no_grad():
        noted = linear(image.double())
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, inputs: object, output: Tensor) -> None:
            outputs[name] = output

        return hook

    for name in stages:
        linear.get_submodule(name).register_forward_hook(keep(name))
    replayed = linear(image.double().requires_grad_(True))
    assert torch.allclose(noted, replayed, rtol=1e-12, atol=1e-12)
    score = replayed[0, class_index]
    gradients = torch.autograd.grad(score, [outputs[name] for name in stages])
    maps = []
    for name, gradient in zip(stages, gradients, strict=True):
        product = (outputs[name] * gradient)[0].detach().numpy()
        channels = outputs[name].shape[1:].index(min(outputs[name].shape[1:], key=_odd(product)))
        maps.append(product.sum(axis=channels))
    return maps, float(score.detach())


def _add(a: Tensor, b: Tensor) -> Tensor:
    """Add by the residual rule, whose shares keep the sum."""
    of_a, of_b = balanced(a.detach(), b.detach())
    return of_a * a + of_b * b


def _swin(block: Any, x: Tensor) -> Tensor:
    x = _add(x, block._attn(block.norm1(x)))
    return _add(x, block.mlp(block.norm2(x)))


def _convnext(block: Any, x: Tensor) -> Tensor:
    made = block.mlp(block.norm(block.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    return _add(x, made * block.gamma.view(-1, 1, 1))


def _metaformer(block: Any, x: Tensor) -> Tensor:
    x = _add(block.res_scale1(x), block.layer_scale1(block.token_mixer(block.norm1(x))))
    return _add(block.res_scale2(x), block.layer_scale2(block.mlp(block.norm2(x))))


_BLOCKS = {
    SwinTransformerBlock: _swin,
    ConvNeXtBlock: _convnext,
    MetaFormerBlock: _metaformer,
}


def _odd(product: Array) -> Callable[[int], int]:
    """Order sizes so that the one of channels, which is none of the two equal ones, is first."""
    return lambda size: list(product.shape).count(size)


def spread(values: Array, grid: tuple[int, int]) -> Array:
    """Spread the values of cells over the cells of another grid by the area that they share."""
    high, wide = (_shares(size, new) for size, new in zip(values.shape, grid, strict=True))
    result: Array = high @ values @ wide.T
    return result


def _shares(size: int, new_size: int) -> Array:
    """Return which share (new_size, size) of each cell of a side lies in each new one."""
    return np.array(
        [
            [_shared(cell / size, (cell + 1) / size, new, new_size) * size for cell in range(size)]
            for new in range(new_size)
        ]
    )


def _shared(begin: float, end: float, index: int, count: int) -> float:
    return max(0.0, min(end, (index + 1) / count) - max(begin, index / count))


def _noting(part: nn.Module, make: Callable[[Tensor], tuple[Tensor, Any]]) -> Callable[..., Any]:
    """Let a part note down its constants when it first runs, and be linear from then on."""
    constants: list[Any] = []

    def forward(x: Tensor, *_: Any) -> Tensor:
        if torch.is_grad_enabled():
            return constants[0](x)
        output, linear = make(x)
        constants.append(linear)
        return output

    return forward


def _frozen(part: nn.Module) -> Callable[[Tensor], tuple[Tensor, Any]] | None:
    """Return what runs a part and makes a linear map of it; None for parts that are linear."""
    if isinstance(part, LayerNorm2d):
        return _normalised(part, (1,), shape=(-1, 1, 1))
    if isinstance(part, GroupNorm1):
        return _normalised(part, (1, 2, 3), shape=(-1, 1, 1))
    if isinstance(part, nn.LayerNorm):
        return _normalised(part, (-1,), shape=(-1,))
    if isinstance(part, nn.Softmax):
        return lambda x: _fixed(x.softmax(dim=-1))
    if type(part).__name__ == "GELU":  # of torch and of timm
        return lambda x: _gated(x, x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
    if isinstance(part, StarReLU):
        return lambda x: _gated(x, x.clamp(min=0) ** 2 * part.scale.detach(), _bias(part))
    return None


def _bias(part: StarReLU) -> Tensor | float:
    return 0.0 if part.bias is None else part.bias.detach()


def _fixed(probabilities: Tensor) -> tuple[Tensor, Any]:
    return probabilities, lambda _: probabilities


def _gated(x: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Any]:
    gate = torch.where(x == 0, torch.zeros_like(x), value / x)
    return value + bias, lambda other: other * gate + bias


def _normalised(
    part: Any, over: tuple[int, ...], shape: tuple[int, ...]
) -> Callable[[Tensor], tuple[Tensor, Any]]:
    weight = part.weight.detach().view(shape)
    bias = 0.0 if part.bias is None else part.bias.detach().view(shape)

    def make(x: Tensor) -> tuple[Tensor, Any]:
        variance = ((x - x.mean(dim=over, keepdim=True)) ** 2).mean(dim=over, keepdim=True)
        deviation = (variance + part.eps).sqrt()

        def linear(other: Tensor) -> Tensor:
            return (other - other.mean(dim=over, keepdim=True)) / deviation * weight + bias

        return linear(x), linear

    return make
