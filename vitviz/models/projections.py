"""The matrix behind attention, which joins its heads: found in the graph, never guessed by shape.

In nearly all models it is the weight of one linear layer that takes what attention gives. Where it
is not (low-rank adapters, products written out, weights kept as integers), what the module does to
each token is differentiated, and taken if it is linear.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

__all__ = ["Joining"]


# What leaves each number as it is, or changes the scale of a whole token.
_RESHAPES = ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Clone", "ToCopy")
_RESCALES = ("NativeLayerNorm", "FusedRmsNorm", "_Normalized", "_ScaledToUnit")
_SUMS = ("Add", "Mul", *_RESHAPES)
_LONGEST_WAY = 200  # nodes of the graph of one block


class Joining:
    """Follows what one attention call gives until the module that made the call ends."""

    def __init__(self, output: Tensor) -> None:
        """Begin behind attention.

        Args:
            output: (batch, heads, queries, value_dim), part of a graph.
        """
        self._output = output
        self._start = get_gradient_edge(output).node
        self._layers: list[tuple[Any, Any, Tensor]] = []

    def see(self, input: Tensor, weight: Tensor, output: Tensor) -> None:
        """Take note of a linear layer, if it takes what attention gave and nothing else."""
        if input.requires_grad and _before(input, (*_RESHAPES, *_RESCALES)) is self._start:
            self._layers.append((_before(output, _RESHAPES), output.grad_fn, weight.detach()))

    def matrix(self, output: Tensor, *, with_residual: bool) -> Tensor | None:
        """Return the matrix by which the heads were joined; None if there is none to be found.

        Args:
            output: (batch, queries, channels), what the module gives that attended.
            with_residual: Whether that is a whole block, which adds its input and more to it.
        """
        if not output.requires_grad:
            return None
        node = _before(output, _RESHAPES)
        for product, layer, weight in self._layers:
            if product is node or (with_residual and self._leads_alone(layer, weight, output)):
                return weight
        return None if with_residual else self._differentiated(output)

    def _leads_alone(self, layer: Any, weight: Tensor, output: Tensor) -> bool:
        """Tell whether a layer's output is added to the residual, and nothing leads around it."""
        if len(weight) != output.shape[-1]:
            return False
        pending: list[Any] = [output.grad_fn]
        seen: set[Any] = set()
        after: list[Any] = []
        while pending and len(seen) < _LONGEST_WAY:
            node = pending.pop()
            if node is self._start:
                return False
            if node in seen or node is layer:
                continue
            seen.add(node)
            following = [each for each, _ in node.next_functions if each is not None]
            after += [node] if layer in following else []
            pending += following
        return bool(after) and all(_is(node, _SUMS) for node in after)

    def _differentiated(self, output: Tensor) -> Tensor | None:
        """Differentiate what happens to a token, and check on all that it is linear."""
        batch, heads, tokens, width = self._output.shape
        if output.shape[:-1] != (batch, tokens):
            return None
        rows = _rows_of_jacobian(self._output, output.reshape(batch * tokens, -1))
        if rows is None:
            return None
        with torch.no_grad():
            joined = self._output.transpose(1, 2).reshape(batch, tokens, heads * width)
            rest = output - F.linear(joined, rows)
            spread = (rest - rest[:1, :1]).abs().max()
            exact = spread <= torch.finfo(output.dtype).eps ** 0.5 * output.abs().max()
        return rows if bool(exact) else None


def _rows_of_jacobian(source: Tensor, output: Tensor) -> Tensor | None:
    """Differentiate outputs (batch · tokens, channels), another channel of each token at a time.

    Returns:
        (channels, heads · value_dim); None where no gradient comes back.
    """
    count, channels = output.shape
    rows = []
    for first in range(0, channels, count):
        wanted = torch.arange(first, min(first + count, channels), device=output.device)
        one = torch.zeros_like(output)
        one[wanted - first, wanted] = 1
        (gradient,) = torch.autograd.grad(output, source, one, retain_graph=True, allow_unused=True)
        if gradient is None:
            return None
        joined = gradient.transpose(1, 2).reshape(count, math.prod(source.shape[1::2]))
        rows.append(joined[: len(wanted)])
    return torch.cat(rows)


def _before(tensor: Tensor, kinds: tuple[str, ...]) -> Any:
    """Go back from a tensor over nodes of some kinds; return the first of another kind."""
    node: Any = get_gradient_edge(tensor).node
    while _is(node, kinds) and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return node


def _is(node: Any, kinds: tuple[str, ...]) -> bool:
    """Tell whether a node of the graph is of one of these kinds: ``ViewBackward0``, say."""
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward") in kinds
