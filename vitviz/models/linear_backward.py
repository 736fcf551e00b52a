"""A backward pass in which normalisation, activation and attention count as linear.

Forward values stay as they are, to the bit. On the way back three things count as constants: the
standard deviation in a normalisation (the subtraction of the mean stays), the gate act(x)/x of an
activation, and the attention probabilities. All are function calls, so a torch function mode
applies them to any model without knowing its modules. Residual additions can be balanced besides:
see ``residuals``.

Sources: Ali et al. 2022, "XAI for Transformers: Better Explanations through Conservative
Propagation" (arXiv 2202.07304); Achtibat et al. 2024, "AttnLRP" (arXiv 2402.05602); Mehri et al.
2025, "LibraGrad" (arXiv 2411.16760).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitviz.models.attention import SdpaArguments
from vitviz.models.residuals import ADDITIONS, BalancedResiduals
from vitviz.options import AttentionRule

__all__ = ["LinearizedBackward"]


_NEAR_ZERO = 1e-6  # below it act(x)/x is taken for the slope ½ that GELU and SiLU have at 0
_ACTIVATIONS = frozenset(
    (F.gelu, F.silu, F.relu, F.mish, F.hardswish, F.leaky_relu, F.elu, F.celu, F.selu, F.relu6)
    + (F.hardtanh,)
    + (torch.relu, torch.celu, torch.selu, Tensor.relu)
)
_GATES = frozenset((torch.sigmoid, F.sigmoid, F.hardsigmoid, Tensor.sigmoid))
_PROBABILITIES = frozenset((torch.softmax, F.softmax, Tensor.softmax))


_SQUARES = frozenset((torch.square, torch.pow, Tensor.square, Tensor.pow, Tensor.__pow__))
_SCALES = frozenset(
    (torch.sqrt, torch.rsqrt, torch.norm, torch.linalg.vector_norm)
    + (Tensor.sqrt, Tensor.rsqrt, Tensor.norm)
)


class LinearizedBackward(TorchFunctionMode):
    """Makes the gradient of what runs inside ``with`` that of a network made linear.

    It belongs to the thread that enters it.
    """

    def __init__(self, rule: AttentionRule, residuals: BalancedResiduals | None = None) -> None:
        """Choose how relevance passes attention and residual additions.

        Args:
            rule: ``value``: probabilities are constants, all goes to the values. ``shared``: half
                goes to the values, a quarter each to queries and keys; not for attention that a
                module computes itself, whose values are not seen.
            residuals: What balances residual additions; None: their operands get equal gradients.
        """
        super().__init__()
        self._rule = rule
        self._residuals = residuals

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, with another way back where it is not linear."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if self._residuals is not None and func in ADDITIONS:
            return self._residuals.add(func, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **kwargs)
        if func is F.layer_norm:
            return _normalize(*args, **kwargs)
        if func is F.rms_norm:
            return _scale_to_unit(*args, **kwargs)
        if func is F.group_norm:
            return _normalize_groups(*args, **kwargs)
        if func in _ACTIVATIONS or func in _SQUARES:
            args, kwargs = _operand_first(args, kwargs)
        if func in _ACTIVATIONS:
            return _Gated.apply(args[0], _beside_its_argument(func, args, kwargs))
        if func in _SQUARES and _exponent(func, *args[1:], **kwargs) == 2:  # x · |x|, of StarReLU
            return _Gated.apply(args[0], torch.square)
        if func in _SCALES:  # of a normalisation, written out
            return func(*args, **kwargs).detach()
        if func in _GATES:  # x·sigmoid(x), written out
            return func(*args, **kwargs).detach()
        if func in _PROBABILITIES and self._rule is AttentionRule.VALUE:  # attention, written out
            return func(*args, **kwargs).detach()
        return func(*args, **kwargs)

    def _attend(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        # The output is bilinear in probabilities and values. Either all of it counts as the values'
        # doing, or half, and the rest comes from queries and keys in equal parts.
        if self._rule is AttentionRule.VALUE:
            query, key = query.detach(), key.detach()
            # On an accelerator, torch's way back to all three is fast.
            if value.device.type != "cpu" or not _is_plain(query, key, value):
                return func(query, key, value, *args, **kwargs)
            call = partial(func, query, key, value.detach(), *args, **kwargs)
            arguments = SdpaArguments(query, key, value.detach(), *args, **kwargs)
            output: Tensor = _ThroughValues.apply(value, arguments, call)
            return output
        shares = ((query, 0.25), (key, 0.25), (value, 0.5))
        return func(*(_Shared.apply(*share) for share in shares), *args, **kwargs)


def _operand_first(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with the first one by position, also where it was given as ``input``."""
    if args or "input" not in kwargs:
        return args, kwargs
    return (kwargs["input"],), {name: each for name, each in kwargs.items() if name != "input"}


def _beside_its_argument(
    activation: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """Return an activation of one argument that leaves it as it is: the gate needs it."""
    if kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}
    return lambda x: activation(x, *args[1:], **kwargs)


def _exponent(func: Callable[..., Any], exponent: Any = None, **_: Any) -> Any:
    """Return the exponent of a power."""
    return 2 if func in (torch.square, Tensor.square) else exponent


def _normalize(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation; its standard deviation is a constant on the way back."""
    normalized: Tensor = _Normalized.apply(input, tuple(normalized_shape), weight, bias, eps)
    return normalized


def _normalize_groups(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise groups of channels; their standard deviations are constants on the way back."""
    normalized: Tensor = _NormalizedGroups.apply(input, num_groups, weight, bias, eps)
    return normalized


def _scale_to_unit(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Root mean square normalisation; the root is a constant on the way back."""
    scaled: Tensor = _ScaledToUnit.apply(input, tuple(normalized_shape), weight, eps)
    return scaled


class _Normalized(torch.autograd.Function):
    """(x − mean)/deviation · weight + bias, linear in x − mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
        output, _, inverse = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(weight, inverse)
        ctx.over = tuple(range(-len(shape), 0))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, inverse = ctx.saved_tensors
        gradient = gradient if weight is None else gradient * weight
        # The Jacobian of (x − mean)/σ with σ constant is (I − 1/n)/σ, which is symmetric.
        centred = gradient - gradient.mean(dim=ctx.over, keepdim=True)
        return centred.mul_(inverse), None, None, None, None


class _NormalizedGroups(torch.autograd.Function):
    """The same for each group of channels (batch, channels, …), over all its places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Any, bias: Any, eps: float) -> Tensor:
        batch, channels = x.shape[:2]
        places = x[0, 0].numel()
        output, _, inverse = torch.native_group_norm(
            x.contiguous(), weight, bias, batch, channels, places, groups, eps
        )
        ctx.save_for_backward(weight, inverse)
        ctx.groups = groups
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, inverse = ctx.saved_tensors
        if weight is not None:
            gradient = gradient * weight.view(-1, *(1,) * (gradient.dim() - 2))
        grouped = gradient.reshape(len(gradient), ctx.groups, -1)
        centred = grouped - grouped.mean(dim=2, keepdim=True)
        scaled = centred * inverse.unsqueeze(2)
        return scaled.view(gradient.shape), None, None, None, None


class _ScaledToUnit(torch.autograd.Function):
    """x/root · weight, linear in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Any, eps: float | None) -> Tensor:
        wide = x.float() if x.element_size() < 4 else x
        mean = wide.square().mean(dim=tuple(range(-len(shape), 0)), keepdim=True)
        inverse = (mean + (torch.finfo(wide.dtype).eps if eps is None else eps)).rsqrt()
        ctx.save_for_backward(weight, inverse)
        return F.rms_norm(x, shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, inverse = ctx.saved_tensors
        weighted = gradient if weight is None else gradient * weight
        # With the root constant, the Jacobian of x/root is diagonal: nothing is to be centred.
        return (weighted * inverse).to(gradient.dtype), None, None, None


class _Gated(torch.autograd.Function):
    """An activation act(x) as the product of x with the constant act(x)/x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        output = activation(x)
        ctx.save_for_backward(x, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, output = ctx.saved_tensors
        # In the memory of one tensor: torch.where takes ten times as long. Near 0, x is taken for
        # 0, so that the quotient is no number; other outputs that are none show in the logits.
        gate = F.hardshrink(x, _NEAR_ZERO)
        torch.div(output, gate, out=gate).nan_to_num_(0.5, 0.5, 0.5)
        return gate.mul_(gradient), None


def _is_plain(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether attention is of (batch, heads, tokens, channels), none of them broadcast."""
    same_batch = query.shape[:1] == key.shape[:1] == value.shape[:1]
    return value.dim() == 4 and same_batch and key.shape[1] == value.shape[1]


class _ThroughValues(torch.autograd.Function):
    """Attention whose probabilities are constants: half the work of a way back to all three."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, arguments: SdpaArguments, call: Callable[[], Tensor]
    ) -> Tensor:
        ctx.arguments = arguments
        return call()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.arguments.record().value_gradients(gradient), None, None


class _Shared(torch.autograd.Function):
    """The identity, with a share of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * ctx.share, None
