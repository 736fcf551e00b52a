"""The second part of a model: its transformer blocks, alike and different."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitviz.inspection.events import AttentionUse, ModuleRun, Product
from vitviz.inspection.parts import BlockAttention, BlockKind, Blocks, FeedForward
from vitviz.inspection.traced import (
    TracedModel,
    is_within,
    layer_of_product,
    outermost_layers,
    relative_path,
    sequence_length,
)

__all__ = ["measure_blocks"]


_ACTIVATION_HOMES = ("torch.nn.modules.activation", "timm.layers.activations")


def measure_blocks(traced: TracedModel) -> Blocks | None:
    """Measure the sequence of blocks; None where there is none."""
    cost = traced.part_cost(1)
    if cost is None:
        return None
    groups: dict[Any, list[ModuleRun]] = {}
    for run in traced.block_runs:
        groups.setdefault(_signature(traced, run), []).append(run)
    kinds = tuple(_block_kind(traced, runs) for runs in groups.values())
    return Blocks(cost=cost, count=len(traced.block_runs), kinds=kinds)


def _signature(traced: TracedModel, run: ModuleRun) -> Any:
    """Return what two identical blocks have in common: how they are built and what they do.

    Drop probabilities are left out, since stochastic depth grows from block to block.
    """
    block = traced.modules[run.path]
    built = [
        (name, type(part).__name__, part.extra_repr())
        for name, part in block.named_modules()
        if not _is_drop_path(part) and not isinstance(part, nn.Identity)
    ]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in block.named_parameters()]
    calls = [
        (relative_path(one.path, run.path), one.shape, one.fused)
        for one in traced.trace.attentions
        if is_within(one.path, run.path)
    ]
    return repr((built, shapes, calls, run.macs, run.input_shape, run.output_shape))


def _block_kind(traced: TracedModel, runs: list[ModuleRun]) -> BlockKind:
    run = runs[0]
    block = traced.modules[run.path]
    return BlockKind(
        indices=tuple(int(one.path.rpartition(".")[2]) for one in runs),
        kind=run.kind,
        parameters=sum(parameter.numel() for parameter in block.parameters()),
        macs=run.macs,
        output_shape=run.output_shape,
        order=tuple(outermost_layers(traced, run.path, run.enter)),
        attentions=_block_attentions(traced, run),
        feed_forwards=_feed_forwards(traced, run),
        layer_scales=_layer_scales(block),
        drop_path=_drop_path([traced.modules[one.path] for one in runs]),
    )


def _block_attentions(traced: TracedModel, block: ModuleRun) -> tuple[BlockAttention, ...]:
    pairs = zip(traced.trace.attentions, traced.homes, strict=True)
    return tuple(
        _block_attention(traced, block, attention, home)
        for attention, home in pairs
        if is_within(home, block.path)
    )


def _block_attention(
    traced: TracedModel, block: ModuleRun, attention: AttentionUse, home: str
) -> BlockAttention:
    projections = [
        product
        for product in traced.trace.products
        if is_within(product.path, home)
        and block.enter < product.step < attention.step
        and product.from_image
    ]
    norms = [
        traced.layer(run, home)
        for run in traced.trace.runs
        if run.path.startswith(f"{home}.") and traced.is_norm(run)
    ]
    # timm's name for the dropout of the probabilities; it must also fit their shape to be named.
    drop = getattr(traced.modules[home], "attn_drop", None)
    ran = traced.trace.run_of(f"{home}.attn_drop")
    fits = attention.fused or (ran is not None and ran.input_shape == attention.shape)
    inner = relative_path(home, block.path)
    tokens = sequence_length(block.input_shape)
    # Without the plain four axes (windows, say) it is not certain which axis holds the heads.
    heads = attention.shape[1] if len(attention.shape) == 4 else None
    return BlockAttention(
        name=inner,
        kind=type(traced.modules[home]).__name__,
        heads=heads,
        head_dim=attention.head_dim or getattr(traced.modules[home], "head_dim", None),
        projections=tuple(layer_of_product(traced, product, home) for product in projections),
        norms=tuple(norms) if inner else (),
        fused=attention.fused,
        probabilities=attention.shape[1:] if attention.shape[0] == 1 else attention.shape,
        over_tokens=None if tokens is None else attention.shape[-2:] == (tokens, tokens),
        drop=f"{inner}.attn_drop".lstrip(".") if isinstance(drop, nn.Module) and fits else None,
    )


def _feed_forwards(traced: TracedModel, block: ModuleRun) -> tuple[FeedForward, ...]:
    """Find the modules of a block that hold several layers in a row and no attention.

    A single layer is no MLP: it may be a projection that joins two branches.
    """
    groups: dict[str, list[Product]] = {}
    for product in traced.trace.products:
        outside = not any(is_within(product.path, home) for home in traced.homes)
        if product.from_image and outside and is_within(product.path, block.path):
            groups.setdefault(_owner(traced, product), []).append(product)
    return tuple(
        FeedForward(
            name=relative_path(owner, block.path),
            kind=type(traced.modules[owner]).__name__,
            layers=tuple(layer_of_product(traced, product, owner) for product in products),
            activation=_activation(traced, owner),
        )
        for owner, products in groups.items()
        if len(products) > 1
    )


def _owner(traced: TracedModel, product: Product) -> str:
    """Return the module that a layer is part of."""
    is_layer = next(traced.modules[product.path].children(), None) is None
    return product.path.rpartition(".")[0] if is_layer else product.path


def _activation(traced: TracedModel, owner: str) -> str | None:
    seen = [
        run.kind
        for run in traced.trace.runs
        if is_within(run.path, owner)
        and type(traced.modules[run.path]).__module__.startswith(_ACTIVATION_HOMES)
    ]
    return seen[0] if seen else None


def _layer_scales(block: nn.Module) -> tuple[str, ...]:
    modules = [name for name, part in block.named_modules() if "LayerScale" in type(part).__name__]
    own = [name for name, _ in block.named_parameters(recurse=False) if name.startswith("gamma")]
    return tuple(name for name in modules if name) + tuple(own)


def _drop_path(blocks: list[nn.Module]) -> tuple[float, float] | None:
    rates = [_drop_rate(block) for block in blocks]
    return (min(rates), max(rates)) if max(rates) > 0 else None


def _drop_rate(block: nn.Module) -> float:
    """Return how often a block drops a branch; one that never does has no module for it."""
    parts = filter(_is_drop_path, block.modules())
    return max((float(getattr(part, "drop_prob", 0.0) or 0.0) for part in parts), default=0.0)


def _is_drop_path(part: nn.Module) -> bool:
    return type(part).__name__.startswith("DropPath")
