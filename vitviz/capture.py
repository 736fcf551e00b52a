"""Records of each attention call while a model runs; never changes what the model computes.

timm's fused attention ends in one function, ``scaled_dot_product_attention``. A torch function
mode sees every call of it with its queries and keys, so nothing has to be known about modules,
and nothing has to be switched off. The few modules that compute attention themselves hand it to a
dropout, where a hook sees it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitviz.errors import CaptureError

__all__ = [
    "Attention",
    "AttentionCapture",
    "AttentionRecord",
    "GivenAttention",
    "output_gradients",
    "own_attention",
    "settled",
    "widened",
]

_SETTLING = threading.Lock()
_SETTLED: WeakKeyDictionary[nn.Module, tuple[int, ExitStack]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionRecord:
    """One call of attention: what is needed to compute any part of its probabilities.

    Attributes:
        query: (batch, heads, queries, head_dim).
        key: (batch, key_heads, keys, head_dim); key_heads divides heads.
        value: (batch, key_heads, keys, value_dim); None without a gradient, which alone needs it.
        output: (batch, heads, queries, value_dim), before heads are joined; None unless it can be
            differentiated through.
        bias: Added to the scores, broadcastable to (batch, heads, queries, keys), or None.
        scale: Factor on the scores.
        projection: (channels, heads · value_dim), the weight that joins the heads of the output;
            None where it was not seen.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    output: Tensor | None
    bias: Tensor | None
    scale: float
    projection: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the probabilities: (batch, heads, queries, keys)."""
        return (*self.query.shape[:-1], self.key.shape[-2])

    def probabilities(self, images: slice, queries: slice) -> Tensor:
        """Compute attention probabilities for some images and some queries.

        Returns:
            (images, heads, queries, keys), float32 or wider; each row sums to 1.
        """
        query = widened(self.query[images, :, queries])
        key = self._per_head(self.key[images])
        scores = _products(query, key, self.scale)
        if self.bias is not None:
            scores += self._bias(images, queries)
        return scores.softmax(dim=-1)

    def probability_gradients(self, gradient: Tensor, images: slice, queries: slice) -> Tensor:
        """Compute ∂y/∂A = (∂y/∂O)·Vᵀ per head for some images and some queries.

        Args:
            gradient: ∂y/∂O for the whole batch, shaped as ``output``.
            images: Which images of the batch.
            queries: Which rows.

        Returns:
            (images, heads, queries, keys), the gradient with respect to the probabilities.
        """
        assert self.value is not None
        return _products(widened(gradient[images, :, queries]), self._per_head(self.value[images]))

    def value_norms(self) -> Tensor:
        """Compute ‖W_o v_j‖, how much the value of each token j can move the tokens that see it.

        Returns:
            (batch, keys), float32 or wider.
        """
        assert self.value is not None
        return _projected_norms(self._per_head(self.value), self.projection)

    def _per_head(self, shared: Tensor) -> Tensor:
        """Repeat grouped keys or values (images, key_heads, …) so that each head has its own."""
        repeats = self.query.shape[1] // shared.shape[1]
        return widened(shared.repeat_interleave(repeats, dim=1) if repeats > 1 else shared)

    def _bias(self, images: slice, queries: slice) -> Tensor:
        assert self.bias is not None
        bias = widened(self.bias)
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
        if bias.shape[0] > 1:
            bias = bias[images]
        return bias[:, :, queries] if bias.shape[2] > 1 else bias


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenAttention:
    """Attention that a module computes itself, and mixes between heads after the softmax.

    Attributes:
        attention: (batch, heads, queries, keys), what the values are multiplied with; with
            talking heads its rows need not sum to 1, nor be positive.
        output: The same tensor, where it can be differentiated through; else None.
        value: (batch, heads, keys, value_dim); None where it was not seen.
        projection: As for ``AttentionRecord``.
    """

    attention: Tensor
    output: Tensor | None
    value: Tensor | None = None
    projection: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the attention: (batch, heads, queries, keys)."""
        return tuple(self.attention.shape)

    def probabilities(self, images: slice, queries: slice) -> Tensor:
        """Return the attention of some images and some queries, a copy."""
        return widened(self.attention[images, :, queries]).clone()

    def probability_gradients(self, gradient: Tensor, images: slice, queries: slice) -> Tensor:
        """Return ∂y/∂A of some images and some queries; the output being A, it is given."""
        return widened(gradient[images, :, queries])

    def value_norms(self) -> Tensor:
        """Compute ‖W_o v_j‖ (batch, keys), as for ``AttentionRecord``."""
        return _projected_norms(self.value, self.projection)


Attention = AttentionRecord | GivenAttention


class AttentionCapture:
    """Collects the attention of every forward pass made inside ``with``, in execution order.

    Example:
        >>> with AttentionCapture(model) as capture, torch.no_grad():
        ...     logits = model(images)
        >>> len(capture.take())
        12

    Inside, the model is in evaluation mode, fused attention is on (TIMM_FUSED_ATTN=0 switches it
    off), no block runs twice to save memory, and no parameter asks for a gradient; outside it is
    as it was, also after an error. It records what the thread that entered it runs, and other
    threads inside ``recording``, each for itself.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        first_gradient: int | None = None,
        blocks: Sequence[nn.Module] = (),
        on_record: Callable[[Attention], None] | None = None,
        isolate: bool = False,
    ) -> None:
        """Prepare the capture of a module.

        Args:
            module: The model.
            first_gradient: From this call on, outputs can be differentiated through; None: never.
            blocks: Blocks before, between and after which the tokens are kept too; without a
                ``first_gradient``, they can be differentiated through.
            on_record: Takes each record at once, instead of keeping it for ``take``.
            isolate: Let each token attend to itself alone, to see what else mixes tokens.
        """
        self._module = module
        self._first_gradient = first_gradient
        self._blocks = blocks
        self._isolate = isolate
        self._on_record = on_record
        self._of_thread = threading.local()
        self._stack = ExitStack()

    def __enter__(self) -> AttentionCapture:
        """Start recording."""
        with ExitStack() as stack:
            stack.enter_context(settled(self._module))
            for dropout in own_attention(self._module.modules()):
                stack.callback(dropout.register_forward_hook(self._record_given).remove)
            for block in self._blocks:
                stack.callback(block.register_forward_pre_hook(self._enter_block).remove)
            for block in self._blocks[-1:]:
                stack.callback(block.register_forward_hook(self._leave_blocks).remove)
            stack.enter_context(self.recording())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop recording and leave the model as it was."""
        self._stack.close()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread runs; threads do not see each other's records."""
        if self._is_recording:
            yield
            return
        self._of_thread.records, self._of_thread.tokens = [], []
        try:
            with _CallMode(self):
                yield
        finally:
            del self._of_thread.records, self._of_thread.tokens

    @property
    def _is_recording(self) -> bool:
        """Whether this thread is inside; hooks are called in all threads that run the model."""
        return hasattr(self._of_thread, "records")

    @property
    def _records(self) -> list[Attention]:
        """Records of this thread, none outside."""
        return getattr(self._of_thread, "records", [])

    def take(self, expected: int | None = None) -> list[Attention]:
        """Hand out the records of the forward pass just made, and forget them.

        Args:
            expected: Number of attention calls that the model's layout promises.

        Raises:
            CaptureError: Another number of calls was seen.
        """
        records = list(self._records)
        self._records.clear()
        if expected is not None and len(records) != expected:
            raise CaptureError(
                f"saw {len(records)} attention calls in {type(self._module).__name__}, expected "
                f"{expected}, one for each block: a map from part of them would mislead; "
                "is the model compiled, wrapped or run in another thread?"
            )
        return records

    def take_tokens(self) -> list[Tensor]:
        """Hand out the tokens (batch, tokens, channels) at the blocks, and forget them.

        Returns:
            What entered each block, and what left the last one.
        """
        tokens = list(self._of_thread.tokens)
        self._of_thread.tokens.clear()
        return tokens

    def _enter_block(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._is_recording:
            return inputs
        tokens = inputs[0]
        if self._first_gradient is None and not tokens.requires_grad and torch.is_grad_enabled():
            tokens = tokens.detach().requires_grad_(True)  # the graph begins at the first block
        self._of_thread.tokens.append(tokens)
        return (tokens, *inputs[1:])

    def _leave_blocks(self, block: nn.Module, inputs: object, tokens: Tensor) -> None:
        if self._is_recording:
            self._of_thread.tokens.append(tokens)

    def _record_call(self, call: Callable[..., Tensor], arguments: _SdpaArguments) -> Tensor:
        query, key, value = arguments.query, arguments.key, arguments.value
        output = _own_values(query, value) if self._isolate else call()
        scale = arguments.scale
        differentiable = self._differentiable(output)
        self._keep(
            AttentionRecord(
                query=query.detach().contiguous(),
                key=key.detach().contiguous(),
                value=None if differentiable is None else value.detach(),
                output=differentiable,
                bias=_additive(arguments, query.shape[-2], key.shape[-2]),
                scale=query.shape[-1] ** -0.5 if scale is None else scale,
            )
        )
        return output

    def _record_given(self, module: nn.Module, inputs: object, attention: Tensor) -> Tensor | None:
        if not self._is_recording:
            return None
        given = GivenAttention(attention=attention.detach(), output=self._differentiable(attention))
        self._keep(given)
        if self._isolate:
            return torch.eye(attention.shape[-1]).to(attention).expand_as(attention)
        return None

    def _record_value(self, attention: Tensor, other: Tensor) -> None:
        """Add to a record of given attention what it is multiplied with."""
        last = self._records[-1] if self._records else None
        if isinstance(last, GivenAttention) and attention is last.output:
            self._records[-1] = replace(last, value=other.detach())

    def _record_projection(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Add to the last record the layer that its output enters with its heads side by side."""
        last = self._records[-1] if self._records else None
        if last is None or last.value is None or last.projection is not None:
            return
        if input.shape[-1] == last.shape[1] * last.value.shape[-1]:
            self._records[-1] = replace(last, projection=weight.detach())

    def _keep(self, record: Attention) -> None:
        (self._on_record or self._records.append)(record)

    def _differentiable(self, output: Tensor) -> Tensor | None:
        """Let the graph begin at this output where it is the first one that is asked for."""
        first = self._first_gradient
        if first is not None and len(self._records) >= first and not output.requires_grad:
            output.requires_grad_(True)
        return output if output.requires_grad else None


@contextmanager
def settled(module: nn.Module) -> Iterator[None]:
    """Keep a module as it is to be explained: evaluating, fused, without checkpoints, frozen.

    The last of those who ask for it, in whatever thread, puts back what the first one found.
    """
    with _SETTLING:
        users, back = _SETTLED.get(module) or (0, _settle(module))
        _SETTLED[module] = (users + 1, back)
    try:
        yield
    finally:
        with _SETTLING:
            users, back = _SETTLED.pop(module)
            if users > 1:
                _SETTLED[module] = (users - 1, back)
            else:
                back.close()


def _settle(module: nn.Module) -> ExitStack:
    """Switch a module over; return what switches it back."""
    modules = list(module.modules())
    with ExitStack() as stack:
        stack.enter_context(_switched(modules, "training", False))
        stack.enter_context(_switched(modules, "fused_attn", True))
        stack.enter_context(_switched(modules, "grad_checkpointing", False))
        stack.enter_context(_switched(module.parameters(), "requires_grad", False))
        return stack.pop_all()


def output_gradients(records: list[Attention], score: Tensor, *, last: bool) -> list[Tensor]:
    """Compute ∂score/∂O for each record, O being the output of its attention.

    Args:
        records: Records whose outputs lead to the score, captured with ``first_gradient``.
        score: Scalar; the images of a batch do not mix, so a sum over them gives each its own.
        last: Whether this is the last score asked of this forward pass (frees its graph).

    Returns:
        One tensor for each record, shaped as its ``output``.
    """
    outputs = [record.output for record in records if record.output is not None]
    return list(torch.autograd.grad(score, outputs, retain_graph=not last))


def own_attention(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """List the dropouts that follow attention computed without torch's function (talking heads)."""
    unfused = [module for module in modules if not hasattr(module, "fused_attn")]
    dropouts = [getattr(module, "attn_drop", None) for module in unfused]
    return [dropout for dropout in dropouts if isinstance(dropout, nn.Dropout)]


def widened(tensor: Tensor) -> Tensor:
    """Widen half precision, in which probabilities would not sum to 1; leave all else."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass(frozen=True)
class _SdpaArguments:
    """The arguments of ``scaled_dot_product_attention``, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class _CallMode(TorchFunctionMode):
    """Shows a capture the calls that attention is made of, and leaves all else to torch."""

    def __init__(self, capture: AttentionCapture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            call = partial(func, *args, **kwargs)
            return self._capture._record_call(call, _SdpaArguments(*args, **kwargs))
        if func is F.linear:
            self._capture._record_projection(*args, **kwargs)
        elif func is Tensor.matmul:
            self._capture._record_value(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _switched(owners: Iterable[Any], name: str, value: bool) -> Iterator[None]:
    """Set a switch that some objects have and that stands the other way, and set it back."""
    before = [(owner, getattr(owner, name, value)) for owner in owners]
    others = [(owner, old) for owner, old in before if old is not value]
    try:
        for owner, _ in others:
            setattr(owner, name, value)
        yield
    finally:
        for owner, old in others:
            setattr(owner, name, old)


def _own_values(query: Tensor, value: Tensor) -> Tensor:
    """Return what attention gives when each query sees its own value alone."""
    repeats = query.shape[1] // value.shape[1]
    return value.repeat_interleave(repeats, dim=1)[:, :, : query.shape[2]]


def _additive(arguments: _SdpaArguments, queries: int, keys: int) -> Tensor | None:
    """Turn a mask of any form into a bias on the scores."""
    mask = arguments.attn_mask
    if arguments.is_causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=arguments.query.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return bias.masked_fill(~mask, float("-inf"))
    return mask.detach()


def _projected_norms(value: Tensor | None, projection: Tensor | None) -> Tensor:
    """Norm (batch, keys) of values (batch, heads, keys, value_dim) behind a projection."""
    if value is None or projection is None:
        raise CaptureError(
            "did not see what attention multiplies its values with, so they cannot be weighed; "
            "try relevance --classic, or grad-rollout"
        )
    joined = widened(value).transpose(1, 2).flatten(2)
    norms: Tensor = F.linear(joined, widened(projection)).norm(dim=-1)
    return norms


def _products(rows: Tensor, columns: Tensor, scale: float = 1.0) -> Tensor:
    """Multiply (images, heads, m, d) with (images, heads, n, d), transposed, and with a factor."""
    left, right = rows.flatten(0, 1), columns.flatten(0, 1).transpose(1, 2)
    product = torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)
    return product.view(*rows.shape[:2], *product.shape[1:])
