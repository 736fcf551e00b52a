"""Which methods can share a forward pass, and what is recorded of it for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from vitviz.errors import CaptureError
from vitviz.methods.forward import ForwardPass
from vitviz.methods.method import Method
from vitviz.models.attention import Attention
from vitviz.models.capture import AttentionCapture
from vitviz.models.layouts import all_blocks
from vitviz.models.linear_backward import LinearizedBackward
from vitviz.models.model import Model
from vitviz.models.residuals import BalancedResiduals
from vitviz.models.stages import StageCapture, StageLayout
from vitviz.models.structure import blocks_of, patch_grid, token_head, token_norm

__all__ = ["Backward", "Capture", "backward_of", "captured", "run", "shared_passes"]

Backward = Callable[[], AbstractContextManager[object]]
Capture = AttentionCapture | StageCapture


def shared_passes(model: Model, methods: Sequence[Method]) -> list[list[Method]]:
    """Group methods that can look at the same forward pass.

    Those that explain a class share it where they ask for the same backward pass, and lead their
    group; those that explain none join any group with images of their size.

    Args:
        model: The model.
        methods: Which are defined for it.

    Returns:
        The methods of each forward pass.
    """
    passes: list[list[Method]] = []
    for method in sorted(methods, key=lambda each: not each.explains_class):
        fitting = (each for each in passes if _can_join(model, method, each[0]))
        found = next(fitting, None)
        if found is None:
            passes.append([method])
        else:
            found.append(method)
    return passes


def _can_join(model: Model, method: Method, leader: Method) -> bool:
    same_way_back = (
        method.backward_rule is leader.backward_rule
        and method.balances_residuals == leader.balances_residuals
    )
    return (
        (same_way_back or not method.explains_class)
        and method.refine == leader.refine
        and list(method.watched(model)) == list(leader.watched(model))
    )


def captured(model: Model, methods: Sequence[Method]) -> AbstractContextManager[Capture]:
    """Capture what the methods of one forward pass need."""
    if isinstance(model.layout, StageLayout):
        return StageCapture(model.module, model.layout).attached()
    blocks = blocks_of(model.module)
    starts = [each.first_block for each in methods if each.needs_attention_gradients]
    return AttentionCapture(
        model.module,
        first_gradient=min(starts) if starts else None,
        projections=any(each.weighs_values for each in methods),
        blocks=blocks if any(each.needs_block_inputs for each in methods) else blocks[-1:],
        parts=methods[0].watched(model),
    ).attached()


@contextmanager
def backward_of(model: Model, leader: Method) -> Iterator[Backward]:
    """Make what changes the gradients of a method in each thread that enters it."""
    with ExitStack() as stack:
        residuals = None
        if leader.balances_residuals:
            blocks = all_blocks(model.module, model.layout)
            residuals = stack.enter_context(BalancedResiduals(blocks).followed())
        rule = leader.backward_rule
        yield nullcontext if rule is None else partial(LinearizedBackward, rule, residuals)


def run(
    model: Model, capture: Capture, backward: Backward, methods: Sequence[Method], images: Tensor
) -> tuple[Tensor, list[ForwardPass]]:
    """Run the model; return its output and what each method needs of the way there.

    Args:
        model: The model.
        capture: What records it.
        backward: Makes what changes its gradients.
        methods: Those of this forward pass.
        images: (images, 3, height, width).

    Raises:
        CaptureError: The attention seen is not what the model's layout promises.
    """
    with backward(), capture.recording():  # which sees what the backward pass is changed to
        output = model.output(images)
        records = capture.take(model.layout.calls)
        tokens, outputs = capture.take_tokens(), capture.take_outputs()
    return output, [
        ForwardPass(
            layout=model.layout,
            records=records[method.first_block :],
            tokens=tokens,
            grid=_expect_grid(model, records[method.first_block :], images),
            # As wide as the model's numbers, and at least float32.
            dtype=torch.promote_types(model.dtype, torch.float32),
            device=model.device,
            norm=token_norm(model.module),
            head=token_head(model.module),
            outputs=outputs,
        )
        for method in methods
    ]


def _expect_grid(model: Model, records: Sequence[Attention], images: Tensor) -> tuple[int, int]:
    """Make sure that all blocks attend from all tokens to all; return the patches' (rows, cols)."""
    if isinstance(model.layout, StageLayout):
        return model.layout.grid
    tokens = records[0].shape[-1]
    blocks = records[: len(records) - model.layout.tail]
    if any(record.shape[2:] != (tokens, tokens) for record in blocks):
        raise CaptureError(
            "the number of tokens changes between blocks, so attention maps cannot be multiplied"
        )
    height, width = images.shape[-2:]
    return patch_grid(model.module, (height, width), tokens - model.layout.prefix_tokens)
