"""What ``inspect`` says of a model's blocks, line by line."""

from __future__ import annotations

from collections.abc import Sequence

from vitviz.cli.words import UNKNOWN, layer_channels, layer_list, shape_text, short_count
from vitviz.inspection.parts import BlockAttention, BlockKind, Blocks, FeedForward, Layer

__all__ = ["block_title", "block_rows"]


_Row = tuple[str, str]
_MAX_KINDS = 6
_MAX_ATTENTIONS = 2


def block_title(blocks: Blocks) -> str:
    """Count a model's blocks and name their kinds."""
    if len(blocks.kinds) == 1:
        alike = ", all identical" if blocks.count > 1 else ""
        return f"{blocks.count} × {blocks.kinds[0].kind}{alike}"
    names = list(dict.fromkeys(kind.kind for kind in blocks.kinds))
    return f"{blocks.count} × {' and '.join(names)}, of {len(blocks.kinds)} different builds"


def block_rows(blocks: Blocks) -> list[_Row]:
    """Describe a model's blocks, each kind of them once."""
    first, *others = blocks.kinds
    rows = _kind_rows(first, alone=not others)
    for kind in others[:_MAX_KINDS]:
        rows.append((_block_label(kind), _difference(kind, first)))
    if len(others) > _MAX_KINDS:
        rows.append(("", f"and {len(others) - _MAX_KINDS} more kinds of block (all with --json)"))
    return rows


def _kind_rows(kind: BlockKind, *, alone: bool) -> list[_Row]:
    """Write how one kind of block is built, in labelled rows."""
    label = "one block" if alone else _block_label(kind)
    figures = _block_figures(kind) if alone else f"{_indices(kind)}{_block_figures(kind)}"
    rows = [(label, figures), ("runs", " → ".join(one.name for one in kind.order))]
    norms = [layer for layer in kind.order if "Norm" in layer.kind]
    rows.append(("norm", layer_list(norms) or "none seen"))
    for attention in kind.attentions[:_MAX_ATTENTIONS]:
        rows += [
            ("attention", _attention_words(attention)),
            ("probabilities", _probability_words(attention)),
        ]
    if len(kind.attentions) > _MAX_ATTENTIONS:
        rows.append(("", f"and {len(kind.attentions) - _MAX_ATTENTIONS} more attentions"))
    if not kind.attentions:
        rows.append(("attention", f"{UNKNOWN}: no softmax was seen in the block"))
    rows += [("MLP", _feed_forward_words(one)) for one in kind.feed_forwards[:_MAX_ATTENTIONS]]
    if not kind.feed_forwards:
        rows.append(("MLP", UNKNOWN))
    if kind.layer_scales:
        rows.append(("layer scale", ", ".join(kind.layer_scales)))
    if kind.drop_path:
        rows.append(("drop path", f"{kind.drop_path[0]:g} to {kind.drop_path[1]:g}, in training"))
    return rows


def _block_figures(kind: BlockKind) -> str:
    macs = UNKNOWN if kind.macs is None else short_count(kind.macs)
    shape = UNKNOWN if kind.output_shape is None else shape_text(kind.output_shape)
    return f"{short_count(kind.parameters)} parameters · {macs} MACs · output {shape}"


def _difference(kind: BlockKind, first: BlockKind) -> str:
    """Say what another kind of block is, and what of its modules differs."""
    words = [f"{_indices(kind)}{_block_figures(kind)}"]
    if kind.kind != first.kind:
        words.insert(0, kind.kind)
    order = [layer.name for layer in kind.order]
    if order != [layer.name for layer in first.order]:
        words.append(" → ".join(order))
    shapes = [attention.probabilities for attention in kind.attentions]
    if shapes and shapes != [attention.probabilities for attention in first.attentions]:
        words.append(f"probabilities {shape_text(shapes[0])}")
    return " · ".join(words)


def _attention_words(attention: BlockAttention) -> str:
    heads = f"{attention.heads} heads" if attention.heads else f"heads {UNKNOWN}"
    if attention.head_dim:
        heads += f" × {attention.head_dim} channels"
    words = [heads, *(layer_channels(layer) for layer in attention.projections)]
    if attention.norms:
        words.append(layer_list(attention.norms))
    return ", ".join([*words, "fused" if attention.fused else "not fused"])


def _probability_words(attention: BlockAttention) -> str:
    shape = shape_text(attention.probabilities)
    axes = " (heads, queries, keys)" if attention.over_tokens and attention.heads else ""
    drop = f"blocks[i].{attention.drop}" if attention.drop else None
    if attention.fused:
        where = "inside scaled_dot_product_attention"
        if drop:
            where += f"; when attention is not fused, at {drop}"
    else:
        where = f"at {drop}" if drop else f"after the softmax of {attention.name or 'the block'}"
    note = "" if attention.over_tokens is not False else "; not one row and column per token"
    return f"{shape}{axes} {where}{note}"


def _feed_forward_words(part: FeedForward) -> str:
    activation = part.activation or f"activation {UNKNOWN}"
    return f"{_widths(part.layers)}, {activation} ({part.name}: {part.kind})"


def _widths(layers: Sequence[Layer]) -> str:
    """Write 192 → 768 → 192 for a chain of layers; a gate halves what goes on."""
    first, last = layers[0], layers[-1]
    pairs = list(zip(layers, layers[1:], strict=False))
    if all(before.outputs == after.inputs for before, after in pairs):
        return " → ".join(str(width) for width in (first.inputs, *(one.outputs for one in layers)))
    outputs = {one.outputs for one in layers[:-1]}
    end = layer_channels(last, "")
    # SwiGLU: one layer that makes both halves, or one layer for each.
    if len(layers) == 2 and first.outputs == 2 * (last.inputs or 0):
        return f"{first.inputs} → {first.outputs}, one half gates the other → {end}"
    if len(layers) == 3 and outputs == {last.inputs} and first.inputs == layers[1].inputs:
        return f"{first.inputs} → 2 × {first.outputs}, one gates the other → {end}"
    return ", ".join(layer_channels(layer) for layer in layers)


def _block_label(kind: BlockKind) -> str:
    count = len(kind.indices)
    return f"block {kind.indices[0]}" if count == 1 else f"{count} blocks"


def _indices(kind: BlockKind) -> str:
    """Write "0–3, 5: " for the indices of several blocks."""
    if len(kind.indices) == 1:
        return ""
    runs: list[list[int]] = []
    for index in kind.indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    words = [f"{first}–{last}" if last > first else str(first) for first, last in runs]
    more = [f"… {words[-1]}"] if len(words) > _MAX_KINDS else []
    return ", ".join([*words[:_MAX_KINDS], *more]) + ": "
