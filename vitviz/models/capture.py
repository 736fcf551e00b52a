"""Records of each attention call while a model runs; never changes what the model computes.

timm's fused attention ends in one function, ``scaled_dot_product_attention``. A torch function
mode sees every call of it with its queries and keys, so nothing has to be known about modules,
and nothing has to be switched off. The few modules that compute attention themselves hand it to a
dropout, where a hook sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vitviz.errors import CaptureError
from vitviz.models.attention import Attention, MaterializedAttention, SdpaArguments
from vitviz.models.hooks import ModelCapture
from vitviz.models.projections import Joining
from vitviz.models.structure import blocks_of

__all__ = ["AttentionCapture", "output_gradients", "own_attention"]


class AttentionCapture(ModelCapture):
    """Collects the attention of every forward pass made inside ``with``, in execution order.

    Example:
        >>> with AttentionCapture(model) as capture, torch.no_grad():
        ...     logits = model(images)
        >>> len(capture.take())
        12
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        first_gradient: int | None = None,
        projections: bool = False,
        blocks: Sequence[nn.Module] = (),
        parts: Sequence[nn.Module] = (),
        on_record: Callable[[Attention], None] | None = None,
        isolate: bool = False,
    ) -> None:
        """Prepare the capture of a module.

        Args:
            module: The model.
            first_gradient: From this call on, outputs can be differentiated through; None: never.
            projections: With a ``first_gradient``, also find what joins the heads of each call.
            blocks: Blocks before, between and after which the tokens are kept too; they can be
                differentiated through.
            parts: Parts whose outputs are kept.
            on_record: Takes each record at once, instead of keeping it for ``take``.
            isolate: Let each token attend to itself alone, to see what else mixes tokens.
        """
        super().__init__(module)
        self._first_gradient = first_gradient
        self._projections = projections and first_gradient is not None
        self._blocks = blocks
        self._parts = parts
        self._whole_blocks = frozenset(blocks_of(module))
        self._isolate = isolate
        self._on_record = on_record

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread runs; threads do not see each other's records.

        It may be nested: only the innermost mode of a thread records, so that it sees calls before
        modes that were entered in between change them.
        """
        with super().recording():
            outer = self._mode
            with _CallMode(self) as self._of_thread.mode:
                try:
                    yield
                finally:
                    self._of_thread.mode = outer

    def _begin(self) -> None:
        self._of_thread.records, self._of_thread.tokens = [], []
        self._of_thread.outputs = []
        self._of_thread.begun, self._of_thread.joining = {}, None

    def _hooks(self) -> Iterator[RemovableHandle]:
        for dropout in own_attention(self._module):
            yield dropout.register_forward_hook(self._record_given)
        for block in self._blocks:
            yield block.register_forward_pre_hook(self._enter_block)
        for block in self._blocks[-1:]:
            yield block.register_forward_hook(self._leave_blocks)
        for part in self._parts:
            yield part.register_forward_hook(self._leave_part)
        # Heads are joined by what the module that attends does to them until it ends.
        for module in self._module.modules() if self._projections else ():
            yield module.register_forward_pre_hook(self._begin_module)
            yield module.register_forward_hook(self._end_module)

    @property
    def _mode(self) -> _CallMode | None:
        """The innermost mode of this thread, which alone sees calls; None outside."""
        return getattr(self._of_thread, "mode", None)

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

    def take_outputs(self) -> list[Tensor]:
        """Hand out what the parts gave, in execution order, and forget it."""
        outputs = list(self._of_thread.outputs)
        self._of_thread.outputs.clear()
        return outputs

    def _enter_block(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._is_recording:
            return inputs
        tokens = inputs[0]
        if not tokens.requires_grad and torch.is_grad_enabled():
            tokens = tokens.detach().requires_grad_(True)  # the graph begins at the first block
        self._of_thread.tokens.append(tokens)
        return (tokens, *inputs[1:])

    def _leave_blocks(self, block: nn.Module, inputs: object, tokens: Tensor) -> None:
        if self._is_recording:
            self._of_thread.tokens.append(tokens)

    def _leave_part(self, part: nn.Module, inputs: object, output: Tensor) -> None:
        if self._is_recording:
            self._of_thread.outputs.append(output)

    def _record_call(self, call: Callable[..., Tensor], arguments: SdpaArguments) -> Tensor:
        output = _own_values(arguments.query, arguments.value) if self._isolate else call()
        differentiable = self._differentiable(output)
        value = None if differentiable is None else arguments.value.detach()
        self._keep(arguments.record(value=value, output=differentiable))
        self._follow(differentiable)
        return output

    def _record_given(self, module: nn.Module, inputs: object, attention: Tensor) -> Tensor | None:
        if not self._is_recording:
            return None
        given = MaterializedAttention(
            attention=attention.detach(), output=self._differentiable(attention)
        )
        self._keep(given)
        if self._isolate:
            return torch.eye(attention.shape[-1]).to(attention).expand_as(attention)
        return None

    def _record_value(self, attention: Tensor, other: Tensor, *, product: Tensor) -> None:
        """Add to a record of given attention what it is multiplied with."""
        last = self._records[-1] if self._records else None
        if isinstance(last, MaterializedAttention) and attention is last.output:
            self._records[-1] = replace(last, value=other.detach())
            self._follow(product)

    def _follow(self, output: Tensor | None) -> None:
        """Begin to follow what a call gives, to find what its heads are joined with."""
        if self._projections and self._is_recording:
            self._of_thread.joining = None if output is None else Joining(output)

    def _record_layer(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, product: Tensor
    ) -> None:
        """Take note of a linear layer, which may be the one that joins heads."""
        if self._is_recording and self._of_thread.joining is not None:
            self._of_thread.joining.see(input, weight, product)

    def _begin_module(self, module: nn.Module, inputs: object) -> None:
        if self._is_recording:
            self._of_thread.begun[module] = len(self._records)

    def _end_module(self, module: nn.Module, inputs: object, output: object) -> None:
        """Add to the last record what its heads are joined with, if this module attended."""
        if not self._is_recording:
            return
        attended = self._of_thread.begun.pop(module, None) == len(self._records) - 1
        joining = self._of_thread.joining
        if not attended or joining is None:
            return
        self._of_thread.joining = None
        given = output[0] if isinstance(output, tuple) and output else output
        if isinstance(given, Tensor):
            matrix = joining.matrix(given, with_residual=module in self._whole_blocks)
            self._records[-1] = replace(self._records[-1], projection=matrix)

    def _keep(self, record: Attention) -> None:
        (self._on_record or self._records.append)(record)

    def _differentiable(self, output: Tensor) -> Tensor | None:
        """Let the graph begin at this output where it is the first one that is asked for."""
        first = self._first_gradient
        if first is not None and len(self._records) >= first and not output.requires_grad:
            output.requires_grad_(True)
        return output if output.requires_grad else None


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


def own_attention(module: nn.Module) -> list[nn.Module]:
    """List the dropouts that follow attention computed without torch's function (talking heads)."""
    named = module.named_modules(remove_duplicate=False)  # one dropout may have several names
    names = [name.rpartition(".") for name, _ in named]
    parents = [module.get_submodule(parent) for parent, _, name in names if name == "attn_drop"]
    unfused = [parent.attn_drop for parent in parents if not hasattr(parent, "fused_attn")]
    return [dropout for dropout in dict.fromkeys(unfused) if isinstance(dropout, nn.Dropout)]


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
        if self._capture._mode is not self:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            call = partial(func, *args, **kwargs)
            return self._capture._record_call(call, SdpaArguments(*args, **kwargs))
        product = func(*args, **kwargs)
        if func is F.linear:
            self._capture._record_layer(*args, **kwargs, product=product)
        elif func in (Tensor.matmul, torch.matmul):
            self._capture._record_value(*args, **kwargs, product=product)
        return product


def _own_values(query: Tensor, value: Tensor) -> Tensor:
    """Return what attention gives when each query sees its own value alone."""
    repeats = query.shape[1] // value.shape[1]
    return value.repeat_interleave(repeats, dim=1)[:, :, : query.shape[2]]
