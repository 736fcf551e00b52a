"""The third part of a model: from the last block's tokens to the logits."""

from __future__ import annotations

from torch import nn

from vitviz.inspection.parts import Head, Layer
from vitviz.inspection.traced import TracedModel, is_within, norm_runs, outermost, product_layer
from vitviz.models.catalogue import Support

__all__ = ["measure_head"]


def measure_head(traced: TracedModel, support: Support) -> Head:
    """Measure what follows the last block."""
    cost = traced.part_cost(2)
    norms = norm_runs(traced, 2) if cost else []
    shape = norms[0].input_shape if norms else None
    return Head(
        cost=cost,
        order=tuple(outermost(traced, "", traced.last)) if cost else (),
        norms=tuple(traced.layer(run) for run in norms),
        norm_after_pooling=None if shape is None else len(shape) == 2,
        pooling=_pooling(traced, support),
        linears=_classifier(traced),
        classes=int(getattr(traced.module, "num_classes", 0) or 0),
    )


def _pooling(traced: TracedModel, support: Support) -> str | None:
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
    pooling = getattr(traced.module, "global_pool", None)
    if isinstance(pooling, nn.Module):
        pooling = getattr(pooling, "pool_type", None)
    words = {"avg": "average", "token": "first token", "max": "maximum"}
    return words.get(pooling) if isinstance(pooling, str) else None


def _classifier(traced: TracedModel) -> tuple[Layer, ...]:
    """List the linear layers of timm's classifier that ran."""
    getter = getattr(traced.module, "get_classifier", None)
    classifier = getter() if callable(getter) else None
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    paths = [path for path, part in traced.modules.items() if any(part is one for one in parts)]
    return tuple(
        product_layer(traced, product, "")
        for product in traced.trace.products
        if any(is_within(product.path, path) for path in paths)
    )
