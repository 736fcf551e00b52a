"""One batch through one model: logits and relevance; knows no files and no pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitviz.errors import LabelError, OptionError, UnsupportedModelError
from vitviz.explaining.parallel import map_parts
from vitviz.explaining.passes import Backward, Capture, backward_of, captured, run
from vitviz.explaining.targets import own_request, scores_of, targets_of, without_equals
from vitviz.methods.diagnostics import outlier_tokens, prefix_attention
from vitviz.methods.forward import ForwardPass, Target
from vitviz.methods.method import ClassMethod, Method, TokenMap
from vitviz.methods.refinement import Shift, place_back, shifted, shifts
from vitviz.models.labels import ClassRequest, parse_requests
from vitviz.models.model import Model
from vitviz.models.prepared import prepared
from vitviz.models.stages import StageLayout
from vitviz.models.wrapping import own_numbers

__all__ = ["BatchMaps", "class_requests", "explain_batch", "predict_batch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchMaps:
    """What a batch gave.

    Attributes:
        relevance: (batch, maps, rows, cols), float32 on the CPU, before any normalisation; not
            finite where there is none. Raw attention has (batch, 1, blocks, heads, rows, cols).
        logits: (batch, classes), on the CPU; classes is 0 for a model without a head.
        targets: (batch, maps, 1), the class of each map, (batch, maps, 2) with the one that it is
            compared with, (batch, 1, 0) for a score of the user's own; None for a class-agnostic
            method.
        scores: (batch, maps), y: the logit, the difference of two, or the user's own score; None
            for a class-agnostic method.
        requests: What each map was asked for; empty for a class-agnostic method.
        prefix_attention: (batch), share of attention that goes to prefix tokens.
        outlier_tokens: (batch, rows, cols), which patch tokens are of large norm, where the image
            is not shifted.
        gradient_norm_product: (batch, maps), what the gradients could move at most; None for a
            class-agnostic method.
        beside: What the same forward pass gave the methods beside the first.
    """

    relevance: Tensor
    logits: Tensor
    targets: Tensor | None
    scores: Tensor | None
    requests: tuple[ClassRequest, ...]
    prefix_attention: Tensor
    outlier_tokens: Tensor
    gradient_norm_product: Tensor | None
    beside: tuple[BatchMaps, ...] = ()

    @property
    def class_indices(self) -> Tensor | None:
        """(batch, maps), the class of each map; None where maps are of no class."""
        if self.targets is None or not self.targets.shape[2]:
            return None
        return self.targets[..., 0]


def class_requests(
    model: Model, method: Method, target: Callable[[Tensor], Tensor] | None = None
) -> tuple[ClassRequest, ...]:
    """Check a method against a model and return the classes that maps are asked for.

    Args:
        model: The model.
        method: The method, with its options.
        target: A function of logits (batch, classes) to scores (batch), in place of the method's
            classes.

    Returns:
        The requests; empty for a method that explains no class.

    Raises:
        OptionError: No block is left to take part, patches are too small for ``refine``, there
            is no logit to take gradients of, or the method is not defined for the model.
        LabelError: A class request fits no class of the model.
    """
    method.require_layout(model)
    if method.first_block >= model.layout.blocks:
        raise OptionError(
            f"--start-layer is {method.first_block}, but {model.name} has {model.layout.blocks} "
            f"blocks; give a number from 0 to {model.layout.blocks - 1}"
        )
    shifts(method.refine, model.preprocessing.patch)
    if isinstance(method, ClassMethod) and not model.num_classes:
        raise OptionError(
            f"{model.name} has no classification head, so there is no class to explain with "
            f"{method.name}; use rollout, or give a fine-tuned checkpoint with --weights"
        )
    method.require_model(model)
    if not isinstance(method, ClassMethod):
        return ()
    if target is not None:
        return own_request(model, method, target)
    requests = parse_requests(method.classes, model.labels, model.num_classes, method.versus)
    if not requests:
        raise LabelError("no class asked for; give an index, a label or top1")
    return requests


def explain_batch(
    model: Model,
    images: Tensor,
    method: Method,
    *,
    requests: tuple[ClassRequest, ...] | None = None,
    class_indices: Tensor | None = None,
    at_once: int = 1,
    beside: Sequence[Method] = (),
) -> BatchMaps:
    """Run a batch and compute its relevance maps.

    Args:
        model: The model; it is left as it was.
        images: (batch, 3, height, width), preprocessed for the model.
        method: The method, with its options.
        requests: From ``class_requests``; None: found out here, as is done once a run.
        class_indices: (batch, maps), the classes to explain in place of those asked for;
            (batch, maps, 2) with those that they are compared with.
        at_once: How many images may be run together, where refinement makes more of them.
        beside: Methods that share its forward pass, as ``shared_passes`` finds them; those that
            explain a class explain the same ones.

    Raises:
        CaptureError: The attention seen is not what the model's layout promises.
        OptionError: The options do not fit the model.
        UnsupportedModelError: The model gives no logits, where these are needed.
        LabelError: A class request fits no class of the model.
        MemoryError: The device has too little memory for this batch.
    """
    if requests is None:
        requests = class_requests(model, method)
    methods = (method, *beside)
    made = shifts(method.refine, model.preprocessing.patch)
    images = images.to(model.device)
    with (
        _named_memory_errors(),
        captured(model, methods) as capture,
        backward_of(model, method) as backward,
    ):
        work = partial(_explain_part, model, capture, backward, methods, requests)
        explain = partial(_in_parts, work, tokens=model.layout.tokens)
        whole = explain(images, class_indices)
        # Ranks are those of the image where it is.
        moved = list(_at_shifts(explain, images, whole[0].targets, made[1:], at_once))
    found: list[BatchMaps] = [
        replace(each, relevance=place_back([each.relevance, *maps], made, method.refine))
        for each, *maps in zip(whole, *moved, strict=True)
    ]
    return replace(found[0], beside=tuple(found[1:]))


def _at_shifts(
    explain: Callable[[Tensor, Tensor | None], list[BatchMaps]],
    images: Tensor,
    targets: Tensor | None,
    made: Sequence[Shift],
    at_once: int,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield, of each shift, the maps (batch, maps, ...) of each method."""
    copies = max(1, at_once // len(images))
    for first in range(0, len(made), copies):
        some = made[first : first + copies]
        moved = torch.cat([shifted(images, shift) for shift in some])
        found = explain(moved, None if targets is None else targets.repeat(len(some), 1, 1))
        yield from zip(*(torch.split(each.relevance, len(images)) for each in found), strict=True)


def _in_parts(
    work: Callable[[Tensor, Tensor], list[BatchMaps]],
    images: Tensor,
    class_indices: Tensor | None,
    tokens: int,
) -> list[BatchMaps]:
    """Explain a batch in parts, and put those of each method together."""
    given = torch.empty(len(images), 0, 1) if class_indices is None else class_indices
    given = given.unsqueeze(2) if given.ndim == 2 else given
    parts = map_parts(work, images, given, tokens=tokens)
    return [_joined(of_method) for of_method in zip(*parts, strict=True)]


def _joined(parts: Sequence[BatchMaps]) -> BatchMaps:
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
    """Run a plain forward pass, in the same parts as ``explain_batch``.

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
        with own_numbers(), torch.no_grad():
            return model.output(prepare(part)).float()

    with _named_memory_errors(), prepared(model.module):
        return torch.cat(map_parts(work, batch.to(model.device), tokens=model.layout.tokens)).cpu()


def _explain_part(
    model: Model,
    capture: Capture,
    backward: Backward,
    methods: Sequence[Method],
    requests: tuple[ClassRequest, ...],
    images: Tensor,
    given: Tensor,
) -> list[BatchMaps]:
    """Explain some images of a batch in the thread that calls, with one forward pass.

    Args:
        model: The model.
        capture: What records it.
        backward: Makes what changes its gradients.
        methods: The methods, with their options; the first explains a class if any does.
        requests: The classes that are asked for.
        images: (images, 3, height, width).
        given: (images, maps, 1 or 2), the classes; no maps where the requests have the word.
    """
    with own_numbers(), torch.set_grad_enabled(methods[0].explains_class):
        output, passes = run(model, capture, backward, methods, images)
        logits = output.detach().float().cpu() if model.num_classes else torch.empty(len(images), 0)
        targets = scores = None
        if methods[0].explains_class:
            _expect_logits(model, output)
            targets = targets_of(logits, requests, given)
            scores = scores_of(output, targets, requests)
        asked = _Asked(logits, targets, scores, requests)
        last = max((i for i, each in enumerate(methods) if each.explains_class), default=0)
        return [
            _maps_of(method, forward, asked, is_last=number == last)
            for number, (method, forward) in enumerate(zip(methods, passes, strict=True))
        ]


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the methods of a forward pass are asked about.

    Attributes:
        logits: (images, classes), on the CPU.
        targets: As in ``BatchMaps``; None where no method explains a class.
        scores: (images, maps), part of the graph; likewise.
        requests: The classes that are asked for.
    """

    logits: Tensor
    targets: Tensor | None
    scores: Tensor | None
    requests: tuple[ClassRequest, ...]


def _maps_of(method: Method, forward: ForwardPass, asked: _Asked, *, is_last: bool) -> BatchMaps:
    """Compute the maps of one method; the last one frees the graph."""
    if asked.scores is None or asked.targets is None or not method.explains_class:
        with torch.no_grad():
            found = [method.compute(forward, None)]
        return _batch_maps(method, forward, found, _Asked(asked.logits, None, None, ()))
    requests, targets = asked.requests, asked.targets

    def score_of(logits: Tensor, *, number: int) -> Tensor:
        return scores_of(logits, targets, requests)[:, number].sum()

    summed = asked.scores.sum(dim=0).unbind()
    found = [
        method.compute(
            forward,
            Target(
                score=score,
                score_of=partial(score_of, number=number),
                is_last=is_last and number == len(summed) - 1,
            ),
        )
        for number, score in enumerate(summed)
    ]
    return _batch_maps(method, forward, found, asked)


def _batch_maps(
    method: Method, forward: ForwardPass, found: Sequence[TokenMap], asked: _Asked
) -> BatchMaps:
    """Put the maps that a method found of some images with what is known of them."""
    products = [each.gradient_norm_product for each in found]
    relevance = torch.stack([_on_grid(forward, each.relevance) for each in found], dim=1)
    prefix, outliers = _diagnosed(method, forward, len(asked.logits))
    return BatchMaps(
        relevance=relevance if asked.targets is None else without_equals(relevance, asked.targets),
        logits=asked.logits,
        targets=asked.targets,
        scores=None if asked.scores is None else asked.scores.detach().float(),
        requests=asked.requests,
        prefix_attention=prefix,
        outlier_tokens=outliers.view(-1, *forward.grid),
        gradient_norm_product=(
            torch.stack([each for each in products if each is not None], dim=1)
            if method.explains_class and None not in products
            else None
        ),
    )


def _diagnosed(method: Method, forward: ForwardPass, images: int) -> tuple[Tensor, Tensor]:
    """Find the share of attention (images) that goes to prefix tokens, and outlier tokens.

    Of stages neither is known: their places are no tokens of one sequence.
    """
    layout = forward.layout
    if isinstance(layout, StageLayout):
        return torch.zeros(images), torch.zeros(images, *forward.grid, dtype=torch.bool)
    readout = layout.readout_weights(forward.records[0].shape[-1])
    prefix = prefix_attention(forward.blocks, readout, layout.prefix_tokens)
    return prefix, outlier_tokens(method.tokens(forward), layout.prefix_tokens)


def _expect_logits(model: Model, output: Tensor) -> None:
    if not output.requires_grad:
        raise UnsupportedModelError(
            f"{model.name} gives probabilities, it seems, by a sigmoid or a softmax behind its "
            "head, where logits are needed; leave that out, or use grad-rollout or --classic"
        )


def _on_grid(forward: ForwardPass, relevance: Tensor) -> Tensor:
    """Return the relevance (..., rows, cols) of the patch tokens, of (..., tokens)."""
    patches = relevance[..., forward.layout.prefix_tokens :]
    return patches.reshape(*patches.shape[:-1], *forward.grid).float()
