"""One batch through one model: logits and relevance; knows no files and no pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitviz.errors import CaptureError, LabelError, OptionError, UnsupportedModelError
from vitviz.explaining.parallel import map_parts
from vitviz.methods.diagnostics import leverage, outlier_tokens, prefix_attention
from vitviz.methods.linear_backward import LinearizedBackward
from vitviz.methods.propagation import (
    Fusion,
    attention_rollout,
    fuse_heads,
    fuse_positive,
    fuse_with_gradient,
    gathered_by_heads,
    gradient_relevance,
    mean_share,
    pooled_readout,
    signed_evidence,
)
from vitviz.methods.refinement import place_back, shifted, shifts
from vitviz.models.attention import Attention
from vitviz.models.capture import AttentionCapture, output_gradients, own_attention
from vitviz.models.labels import ClassRequest, parse_requests
from vitviz.models.model import Model
from vitviz.models.prepared import prepared
from vitviz.models.structure import blocks_of, patch_grid
from vitviz.options import AttentionRule, HeadFusion, Method, MethodOptions

__all__ = ["BatchMaps", "class_requests", "expect_query", "explain_batch", "predict_batch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchMaps:
    """What a batch gave.

    Attributes:
        relevance: (batch, maps, rows, cols), float32 on the CPU, before any normalisation; not
            finite where there is none. Raw attention has (batch, 1, blocks, heads, rows, cols).
        logits: (batch, classes), on the CPU; classes is 0 for a model without a head.
        class_indices: (batch, maps), the class of each map; None for a class-agnostic method.
        requests: What each map was asked for; empty for a class-agnostic method.
        prefix_attention: (batch), share of attention that goes to prefix tokens.
        outlier_tokens: (batch), number of patch tokens of large norm.
        leverage: (batch, maps), what the gradients could move; None for a class-agnostic method.
    """

    relevance: Tensor
    logits: Tensor
    class_indices: Tensor | None
    requests: tuple[ClassRequest, ...]
    prefix_attention: Tensor
    outlier_tokens: Tensor
    leverage: Tensor | None


def class_requests(model: Model, options: MethodOptions) -> tuple[ClassRequest, ...]:
    """Check options against a model and return the classes that maps are asked for.

    Returns:
        The requests; empty for a class-agnostic method.

    Raises:
        OptionError: ``start_layer`` leaves no block, patches are too small for ``refine``, there
            is no logit to take gradients of, or ``rule`` is not defined for the model.
        LabelError: A class request fits no class of the model.
    """
    if options.first_block >= model.layout.blocks:
        raise OptionError(
            f"--start-layer is {options.start_layer}, but {model.name} has {model.layout.blocks} "
            f"blocks; give a number from 0 to {model.layout.blocks - 1}"
        )
    shifts(options.refine, model.preprocessing.patch)
    if not options.method.explains_class:
        return ()
    if not model.num_classes:
        raise OptionError(
            f"{model.name} has no classification head, so there is no class to explain with "
            f"{options.method}; use rollout, or give a fine-tuned checkpoint with --weights"
        )
    if options.method is Method.EVIDENCE and options.rule is AttentionRule.SHARED:
        _expect_visible_values(model)
    requests = parse_requests(options.classes, model.labels, model.num_classes)
    if not requests:
        raise LabelError("no class asked for; give an index, a label or top1")
    return requests


def _expect_visible_values(model: Model) -> None:
    if own_attention(model.module.modules()):
        raise OptionError(
            f"--rule is shared, but {model.name} mixes its heads after the softmax (talking "
            "heads), and what values get is not seen there; use --rule value"
        )


def explain_batch(
    model: Model,
    images: Tensor,
    options: MethodOptions,
    *,
    class_indices: Tensor | None = None,
    at_once: int = 1,
) -> BatchMaps:
    """Run a batch and compute its relevance maps.

    Args:
        model: The model; it is left as it was.
        images: (batch, 3, height, width), preprocessed for the model.
        options: Method and its parameters.
        class_indices: (batch, maps), the classes to explain in place of those in the options.
        at_once: How many images may be run together, where refinement makes more of them.

    Raises:
        CaptureError: The attention seen is not what the model's layout promises.
        OptionError: The options do not fit the model.
        UnsupportedModelError: The model gives no logits, where these are needed.
        LabelError: A class request fits no class of the model.
        MemoryError: The device has too little memory for this batch.
    """
    requests = class_requests(model, options)
    made = shifts(options.refine, model.preprocessing.patch)
    copies = max(1, at_once // len(images))
    images = images.to(model.device)
    with _named_memory_errors(), _captured(model, options) as capture:
        work = partial(_explain_part, model, capture, options, requests)
        whole = _in_parts(work, images, class_indices, model.layout.tokens)
        maps = [whole.relevance]
        for first in range(1, len(made), copies):
            some = made[first : first + copies]
            moved = torch.cat([shifted(images, shift) for shift in some])
            classes = whole.class_indices  # ranks are those of the image where it is
            repeated = None if classes is None else classes.repeat(len(some), 1)
            found = _in_parts(work, moved, repeated, model.layout.tokens)
            maps += torch.split(found.relevance, len(images))
    return replace(whole, relevance=place_back(maps, made, options.refine))


@contextmanager
def _captured(model: Model, options: MethodOptions) -> Iterator[AttentionCapture]:
    """Capture what a method needs."""
    method = options.method
    from_attention = method in (Method.GRAD_ROLLOUT, Method.RELEVANCE)
    blocks = blocks_of(model.module)
    with AttentionCapture(
        model.module,
        first_gradient=options.first_block if from_attention else None,
        blocks=blocks if method is Method.EVIDENCE else blocks[-1:],
    ) as capture:
        yield capture


def _way_back(options: MethodOptions) -> AbstractContextManager[object]:
    """Return what changes the gradients of a method in the thread that enters it."""
    if options.method is Method.EVIDENCE:
        return LinearizedBackward(options.rule)
    if options.method is Method.RELEVANCE and not options.classic:
        return LinearizedBackward(AttentionRule.VALUE)
    return nullcontext()


def _in_parts(
    work: Callable[[Tensor, Tensor], BatchMaps],
    images: Tensor,
    class_indices: Tensor | None,
    tokens: int,
) -> BatchMaps:
    """Explain a batch in parts, and put them together."""
    classes = torch.empty(len(images), 0) if class_indices is None else class_indices
    parts = map_parts(work, images, classes, tokens=tokens)
    joined: dict[str, Any] = {
        field.name: torch.cat([getattr(part, field.name) for part in parts]).cpu()
        for field in fields(BatchMaps)
        if isinstance(getattr(parts[0], field.name), Tensor)
    }
    return replace(parts[0], **joined)


@contextmanager
def _named_memory_errors() -> Iterator[None]:
    """Raise by its name what torch says of missing memory, on each device in its own words."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise MemoryError(str(error)) from None


def predict_batch(
    model: Model, batch: Tensor, prepare: Callable[[Tensor], Tensor] = lambda images: images
) -> Tensor:
    """Run a plain forward pass, in the same lanes as ``explain_batch``.

    Args:
        model: The model; it is left as it was.
        batch: (batch, ...), what ``prepare`` makes images of.
        prepare: Makes images (part, 3, height, width), preprocessed, of a part of the batch, when
            its turn comes; the batch is the images if left out.

    Returns:
        Logits (batch, classes), float32 on the CPU.

    Raises:
        MemoryError: The device has too little memory for this batch.
    """

    def work(part: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return model.module(prepare(part)).float()  # type: ignore[no-any-return]

    with _named_memory_errors(), prepared(model.module):
        return torch.cat(map_parts(work, batch.to(model.device), tokens=model.layout.tokens)).cpu()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """What a capture saw of a forward pass.

    Attributes:
        records: Attention of the blocks that take part, and of the tail.
        tokens: Tokens before and after the last block; for evidence, before and after each.
        grid: (rows, cols) of the patch tokens.
    """

    records: list[Attention]
    tokens: list[Tensor]
    grid: tuple[int, int]


def _explain_part(
    model: Model,
    capture: AttentionCapture,
    options: MethodOptions,
    requests: tuple[ClassRequest, ...],
    images: Tensor,
    classes: Tensor,
) -> BatchMaps:
    """Explain some images of a batch in the thread that calls.

    Args:
        model: The model.
        capture: What records it.
        options: Method and its parameters.
        requests: The classes that are asked for.
        images: (images, 3, height, width).
        classes: (images, maps), or (images, 0) where the requests have the word.
    """
    about_classes = options.method.explains_class
    with torch.inference_mode(False), torch.set_grad_enabled(about_classes):
        with capture.recording(), _way_back(options):
            output = model.module(images)
            records = capture.take(model.layout.calls)[options.first_block :]
            grid = _expect_grid(model, records, images)
            seen = _Seen(records=records, tokens=capture.take_tokens(), grid=grid)
        logits = output.detach().float().cpu() if model.num_classes else torch.empty(len(images), 0)
        if about_classes:
            _expect_logits(model, output)
            classes = classes if classes.shape[1] else _class_indices(logits, requests)
            scores = output.gather(1, classes.to(output.device)).sum(dim=0).unbind()
            explain = _CLASS_METHODS[options.method]
            found = [explain(model, seen, options, score, score is scores[-1]) for score in scores]
            maps = [relevance for relevance, _ in found]
            leverages = torch.stack([leverage for _, leverage in found], dim=1)
        else:
            maps, leverages = [_IMAGE_METHODS[options.method](model, seen, options)], None
        readout = model.layout.readout_weights(records[0].shape[-1])
        in_prefix = prefix_attention(_blocks(model, records), readout, model.layout.prefix_tokens)
    return BatchMaps(
        relevance=torch.stack([_on_grid(model, each, grid) for each in maps], dim=1),
        logits=logits,
        class_indices=classes if about_classes else None,
        requests=requests,
        prefix_attention=in_prefix,
        outlier_tokens=outlier_tokens(seen.tokens[-1], model.layout.prefix_tokens),
        leverage=leverages,
    )


def _expect_logits(model: Model, output: Tensor) -> None:
    if not output.requires_grad:
        raise UnsupportedModelError(
            f"{model.name} gives probabilities, it seems, by a sigmoid or a softmax behind its "
            "head, where logits are needed; leave that out, or use grad-rollout or --classic"
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


def _rollout(model: Model, seen: _Seen, options: MethodOptions) -> Tensor:
    """Roll attention out; (batch, tokens), as all methods."""
    fusions = [fuse_heads(record, options.head_fusion) for record in seen.records]
    return _rolled_out(model, seen.records, fusions, options.discard)


def _attention(model: Model, seen: _Seen, options: MethodOptions) -> Tensor:
    """Leave blocks and heads apart; (batch, blocks, heads, tokens)."""
    if options.query is None:
        fusions = [fuse_heads(record, HeadFusion.MEAN) for record in seen.records]
        _, _, readout = _read_out(model, seen.records, fusions)
    else:
        readout = _row_of(model, options.query, seen)
    return gathered_by_heads(_blocks(model, seen.records), readout)


def _grad_rollout(
    model: Model, seen: _Seen, options: MethodOptions, score: Tensor, last: bool
) -> tuple[Tensor, Tensor]:
    """Roll out attention weighted with the gradient of a class; relevance and leverage."""
    gradients = output_gradients(seen.records, score, last=last)
    fusions = list(map(fuse_with_gradient, seen.records, gradients))
    relevance = _rolled_out(model, seen.records, fusions, options.discard)
    return relevance, _leverage(seen.records[-1], gradients[-1])


def _relevance(
    model: Model, seen: _Seen, options: MethodOptions, score: Tensor, last: bool
) -> tuple[Tensor, Tensor]:
    """Carry the relevance of a class down through attention that speaks for it."""
    if options.classic:
        gradients = output_gradients(seen.records, score, last=last)
        fusions = list(map(fuse_positive, seen.records, gradients))
        blocks, fusions, start = _read_out(model, seen.records, fusions)
        carried = gradient_relevance(blocks, fusions, start, weigh_values=False)
        return carried[-1], _leverage(seen.records[-1], gradients[-1])
    blocks = _blocks(model, seen.records)
    outputs = [record.output for record in blocks if record.output is not None]
    *gradients, behind = torch.autograd.grad(
        score, [*outputs, seen.tokens[-1]], retain_graph=not last
    )
    start = mean_share([signed_evidence(seen.tokens[-1:], [behind]).relu_()])
    fusions = list(map(fuse_positive, blocks, gradients))
    carried = gradient_relevance(blocks, fusions, start, weigh_values=True)
    relevance = mean_share(carried) if options.averages_starts else carried[-1]
    return relevance, leverage(seen.tokens[-1], behind)


def _evidence(
    model: Model, seen: _Seen, options: MethodOptions, score: Tensor, last: bool
) -> tuple[Tensor, Tensor]:
    """Sum what tokens at the blocks' inputs contribute to a class."""
    inputs = seen.tokens[:-1]
    gradients = torch.autograd.grad(score, inputs, retain_graph=not last)
    return signed_evidence(inputs, gradients), leverage(inputs[-1], gradients[-1])


_IMAGE_METHODS = {Method.ROLLOUT: _rollout, Method.ATTENTION: _attention}
_CLASS_METHODS = {
    Method.GRAD_ROLLOUT: _grad_rollout,
    Method.RELEVANCE: _relevance,
    Method.EVIDENCE: _evidence,
}


def _leverage(record: Attention, gradient: Tensor) -> Tensor:
    """Compute the leverage of an attention's output."""
    assert record.output is not None
    return leverage(record.output, gradient)


def _rolled_out(
    model: Model, records: list[Attention], fusions: list[Fusion], discard: float
) -> Tensor:
    """Compute wᵀR (batch, tokens)."""
    blocks, fusions, readout = _read_out(model, records, fusions)
    return attention_rollout(blocks, fusions, readout, discard=discard)


def _read_out(
    model: Model, records: list[Attention], fusions: list[Fusion]
) -> tuple[list[Attention], list[Fusion], Tensor]:
    """Split off the tail; return the blocks' records and fusions, and w (batch, tokens)."""
    blocks = _blocks(model, records)
    batch, tokens = blocks[-1].shape[0], blocks[-1].shape[-1]
    if model.layout.tail:
        readout = pooled_readout(fusions[len(blocks) :], tokens)
    else:
        weights = model.layout.readout_weights(tokens)
        readout = weights.to(model.device, _width(model)).expand(batch, tokens)
    return blocks, fusions[: len(blocks)], readout


def _blocks(model: Model, records: list[Attention]) -> list[Attention]:
    """Leave out the attention that pools the tokens after the blocks."""
    return records[: len(records) - model.layout.tail]


def _row_of(model: Model, query: tuple[int, int], seen: _Seen) -> Tensor:
    """Return the w (batch, tokens) that names one patch alone."""
    expect_query(query, seen.grid)
    batch, tokens = seen.records[0].shape[0], seen.records[0].shape[-1]
    token = model.layout.prefix_tokens + query[0] * seen.grid[1] + query[1]
    row = torch.eye(tokens, device=model.device, dtype=_width(model))[token]
    return row.expand(batch, tokens)


def _width(model: Model) -> torch.dtype:
    """Return the numbers that maps are computed with: float32, or the model's if wider."""
    return torch.promote_types(model.dtype, torch.float32)


def _expect_grid(model: Model, records: list[Attention], images: Tensor) -> tuple[int, int]:
    """Make sure that all blocks attend from all tokens to all; return the patches' (rows, cols)."""
    tokens = records[0].shape[-1]
    if any(record.shape[2:] != (tokens, tokens) for record in _blocks(model, records)):
        raise CaptureError("the number of tokens changes between blocks, so maps do not chain")
    height, width = images.shape[-2:]
    return patch_grid(model.module, (height, width), tokens - model.layout.prefix_tokens)


def expect_query(query: tuple[int, int], grid: tuple[int, int]) -> None:
    """Make sure that a patch is on the grid.

    Raises:
        OptionError: It is not.
    """
    if not all(0 <= place < side for place, side in zip(query, grid, strict=True)):
        raise OptionError(
            f"--query is {query[0]},{query[1]}, but this makes {grid[0]} × {grid[1]} patches; "
            f"give ROW,COL from 0,0 to {grid[0] - 1},{grid[1] - 1}"
        )


def _on_grid(model: Model, relevance: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the relevance (..., rows, cols) of the patch tokens, of (..., tokens)."""
    patches = relevance[..., model.layout.prefix_tokens :]
    return patches.reshape(*patches.shape[:-1], *grid).float()
