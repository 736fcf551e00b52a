"""The third part of a model: from the last block's tokens to the logits."""

from __future__ import annotations

import math

from torch import nn

from vitviz.inspection.events import ModuleRun
from vitviz.inspection.outline import outline_runs
from vitviz.inspection.parts import Head, Layer
from vitviz.inspection.traced import (
    TracedModel,
    is_within,
    layer_of_product,
    norms_between,
    outermost_layers,
)
from vitviz.models.catalogue import Support
from vitviz.models.structure import has_classifier

__all__ = ["measure_head"]

_POOLINGS = {"avg": "average", "token": "first token", "max": "maximum"}
_POOLING_MODULES = {
    "average": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    "maximum": (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
}


def measure_head(traced: TracedModel, support: Support) -> Head:
    """Measure what turns the last tokens into logits: its norms, its pooling, its classifier."""
    begin = _head_begin(traced)
    norms = norms_between(traced, begin, math.inf)
    shape = norms[0].input_shape if norms else None
    return Head(
        cost=traced.part_cost(2),
        order=tuple(outermost_layers(traced, "", begin)),
        norms=tuple(traced.layer(run) for run in norms),
        # One vector is (1, channels), or (1, channels, 1, 1) where a map was pooled.
        norm_after_pooling=None if shape is None else sum(size > 1 for size in shape) == 1,
        pooling=_pooling(traced, support, begin),
        linears=(linears := _classifier(traced)),
        classes=_classes(traced, linears),
    )


def _classes(traced: TracedModel, linears: tuple[Layer, ...]) -> int:
    """Count the logits, by the layer that makes them before what is declared."""
    if linears and linears[-1].outputs:
        return linears[-1].outputs
    declared = int(getattr(traced.module, "num_classes", 0) or 0)
    return declared if has_classifier(traced.module) else 0


def _head_begin(traced: TracedModel) -> float:
    """Return the step at which the head begins; never, where that cannot be told.

    It is the end of the last block. A model without a sequence of blocks has its head after the
    last module with a linear layer or convolution, other than the module of the classifier.
    """
    if traced.block_runs or traced.trace.error:
        return traced.blocks_end
    classifier = _classifier_paths(traced)
    begin = math.inf
    for run in outline_runs(traced):
        if any(is_within(path, run.path) for path in classifier):
            break  # timm's heads hold norm and pooling beside the classifier
        if _has_products(traced, run):
            begin = run.leave or math.inf
    return begin


def _has_products(traced: TracedModel, run: ModuleRun) -> bool:
    end = run.leave or math.inf
    return any(run.enter < product.step < end for product in traced.trace.products)


def _pooling(traced: TracedModel, support: Support, begin: float) -> str | None:
    if support.readout:
        return support.readout
    late = [
        home
        for attention, home in zip(traced.trace.attentions, traced.homes, strict=True)
        if traced.block_runs and traced.stage(attention.step) == 2 and home
    ]
    if late:
        kind = type(traced.modules[late[0]]).__name__
        return f"attention in {late[0]} ({kind})"
    # timm names the pooling on the model; a model that does not may still have a module for it.
    declared = _pooling_of(getattr(traced.module, "global_pool", None))
    ran = [_pooling_of(traced.modules[run.path]) for run in traced.trace.runs if run.enter > begin]
    return declared or next((pooling for pooling in ran if pooling), None)


def _pooling_of(pooling: object) -> str | None:
    """Name the pooling that timm's attribute or a module stands for."""
    for word, kinds in _POOLING_MODULES.items():
        if isinstance(pooling, kinds):
            return word
    declared = getattr(pooling, "pool_type", None) if isinstance(pooling, nn.Module) else pooling
    return _POOLINGS.get(declared) if isinstance(declared, str) else None


def _classifier(traced: TracedModel) -> tuple[Layer, ...]:
    """List the linear layers of timm's classifier that ran."""
    paths = _classifier_paths(traced)
    return tuple(
        layer_of_product(traced, product, "")
        for product in traced.trace.products
        if any(is_within(product.path, path) for path in paths)
    )


def _classifier_paths(traced: TracedModel) -> list[str]:
    """Name the modules that timm calls the classifier; some models have two."""
    getter = getattr(traced.module, "get_classifier", None)
    classifier = getter() if callable(getter) else None
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return [path for path, part in traced.modules.items() if any(part is one for one in parts)]
