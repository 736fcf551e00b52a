"""One batch through one model: logits and relevance; knows no files and no pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vitviz.capture import Attention, AttentionCapture, output_gradients
from vitviz.errors import CaptureError, LabelError, OptionError
from vitviz.labels import ClassRequest, parse_requests
from vitviz.lanes import in_lanes
from vitviz.layout import patch_grid
from vitviz.models import Model
from vitviz.options import Method, MethodOptions
from vitviz.propagation import (
    Fusion,
    attention_rollout,
    fuse_heads,
    fuse_with_gradient,
    pooled_readout,
)

__all__ = ["BatchMaps", "class_requests", "explain_batch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchMaps:
    """What a batch gave.

    Attributes:
        relevance: (batch, maps, rows, cols), float32 on the CPU, before any normalisation; not
            finite where there is none.
        logits: (batch, classes), on the CPU; classes is 0 for a model without a head.
        class_indices: (batch, maps), the class of each map; None for a class-agnostic method.
        requests: What each map was asked for; empty for a class-agnostic method.
    """

    relevance: Tensor
    logits: Tensor
    class_indices: Tensor | None
    requests: tuple[ClassRequest, ...]


def class_requests(model: Model, options: MethodOptions) -> tuple[ClassRequest, ...]:
    """Check options against a model and return the classes that maps are asked for.

    Returns:
        The requests; empty for a class-agnostic method.

    Raises:
        OptionError: ``start_layer`` leaves no block, or there is no logit to take gradients of.
        LabelError: A class request fits no class of the model.
    """
    if options.start_layer >= model.layout.blocks:
        raise OptionError(
            f"--start-layer is {options.start_layer}, but {model.name} has {model.layout.blocks} "
            f"blocks; give a number from 0 to {model.layout.blocks - 1}"
        )
    if options.method is Method.ROLLOUT:
        return ()
    if not model.num_classes:
        raise OptionError(
            f"{model.name} has no classification head, so there is no class to explain with "
            f"{options.method}; use rollout, or give a fine-tuned checkpoint with --weights"
        )
    requests = parse_requests(options.classes, model.labels, model.num_classes)
    if not requests:
        raise LabelError("no class asked for; give an index, a label or top1")
    return requests


def explain_batch(model: Model, images: Tensor, options: MethodOptions) -> BatchMaps:
    """Run a batch and compute its relevance maps.

    Args:
        model: The model; it is left as it was.
        images: (batch, 3, height, width), preprocessed for the model.
        options: Method and its parameters.

    Raises:
        CaptureError: The attention seen is not what the model's layout promises.
        OptionError: The options do not fit the model.
        LabelError: A class request fits no class of the model.
        MemoryError: The device has too little memory for this batch.
    """
    requests = class_requests(model, options)
    first_gradient = options.start_layer if options.method is Method.GRAD_ROLLOUT else None
    with (
        _named_memory_errors(),
        AttentionCapture(model.module, first_gradient=first_gradient) as capture,
    ):
        work = partial(_explain_part, model, capture, options, requests)
        parts = in_lanes(work, images.to(model.device), model.layout.tokens)
    indices = [part.class_indices for part in parts if part.class_indices is not None]
    return BatchMaps(
        relevance=torch.cat([part.relevance for part in parts]).cpu(),
        logits=torch.cat([part.logits for part in parts]).cpu(),
        class_indices=torch.cat(indices).cpu() if indices else None,
        requests=requests,
    )


@contextmanager
def _named_memory_errors() -> Iterator[None]:
    """Raise by its name what torch says of missing memory, on each device in its own words."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise MemoryError(str(error)) from None


def _explain_part(
    model: Model,
    capture: AttentionCapture,
    options: MethodOptions,
    requests: tuple[ClassRequest, ...],
    images: Tensor,
) -> BatchMaps:
    """Explain some images of a batch in the thread that calls."""
    needs_gradient = options.method is Method.GRAD_ROLLOUT
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(needs_gradient),
        capture.recording(),
    ):
        output = model.module(images)
        records = capture.take(model.layout.calls)[options.start_layer :]
        logits = output.detach().float().cpu() if model.num_classes else torch.empty(len(images), 0)
        if needs_gradient:
            class_indices = _class_indices(logits, requests)
            fusions = _class_fusions(records, output, class_indices)
        else:
            class_indices = None
            fusions = iter([[fuse_heads(record, options.head_fusion) for record in records]])
        maps = [_patch_relevance(model, records, each, options.discard, images) for each in fusions]
    return BatchMaps(
        relevance=torch.stack(maps, dim=1),
        logits=logits,
        class_indices=class_indices,
        requests=requests,
    )


def _class_indices(logits: Tensor, requests: Sequence[ClassRequest]) -> Tensor:
    """Return the class (batch, maps) of each request, ranks resolved per image."""
    ranked = logits.argsort(dim=1, descending=True, stable=True)
    columns = [
        ranked[:, request.rank - 1]
        if request.class_index is None
        else torch.full_like(ranked[:, 0], request.class_index)
        for request in requests
    ]
    return torch.stack(columns, dim=1)


def _class_fusions(
    records: list[Attention], output: Tensor, class_indices: Tensor
) -> Iterator[list[Fusion]]:
    """Yield for each map the gradient-weighted fusion of each block."""
    last = class_indices.shape[1] - 1
    for position, classes in enumerate(class_indices.T):
        score = output.gather(1, classes.unsqueeze(1)).sum()
        gradients = output_gradients(records, score, last=position == last)
        yield list(map(fuse_with_gradient, records, gradients))


def _patch_relevance(
    model: Model,
    records: list[Attention],
    fusions: list[Fusion],
    discard: float,
    images: Tensor,
) -> Tensor:
    """Compute relevance (batch, rows, cols), the part of wᵀR on the patch tokens."""
    layout = model.layout
    tokens = records[0].shape[-1]
    inside = records[: len(records) - layout.tail]
    if any(record.shape[2:] != (tokens, tokens) for record in inside):
        raise CaptureError("the number of tokens changes between blocks, so maps do not chain")
    if layout.tail:
        readout = pooled_readout(fusions[-layout.tail :], tokens)
        fusions = fusions[: -layout.tail]
    else:
        readout = layout.readout_weights(tokens).to(model.device)
    relevance = attention_rollout(inside, fusions, readout, discard=discard)
    height, width = images.shape[-2:]
    rows, cols = patch_grid(model.module, (height, width), tokens - layout.prefix_tokens)
    return relevance[:, layout.prefix_tokens :].reshape(-1, rows, cols).float()
