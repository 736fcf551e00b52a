"""What is shown to people, with Rich; measures nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitviz.anatomy import (
    Anatomy,
    BlockAttention,
    BlockKind,
    Blocks,
    Cost,
    ExtraTokens,
    FeedForward,
    Head,
    Layer,
    PositionEmbedding,
    Tokenization,
)
from vitviz.errors import printable

__all__ = ["show_anatomy", "show_rows"]

_UNKNOWN = "not determined"
_INDENT = 3
_LABEL_WIDTH = 15
_MAX_KINDS = 6
_MAX_ATTENTIONS = 2
_MAX_OUTLINE = 12
_MAX_POSITIONS = 4

_Row = tuple[str, str]


def show_anatomy(anatomy: Anatomy, console: Console) -> None:
    """Print a model's three parts with their figures, and what vitviz will do with it.

    Args:
        anatomy: What was measured.
        console: Where to.
    """
    _show_title(anatomy, console)
    blocks = anatomy.blocks
    _show_part(console, "1", "Tokenization + positional embedding", anatomy.tokenization.cost)
    show_rows(console, _tokenization_rows(anatomy.tokenization))
    title = f"Transformer blocks: {_block_counts(blocks)}" if blocks else "Transformer blocks"
    _show_part(console, "2", title, blocks.cost if blocks else None)
    if blocks:
        show_rows(console, _blocks_rows(blocks))
    else:
        _show_outline(console, anatomy)
    _show_part(console, "3", "Head", anatomy.head.cost)
    show_rows(console, _head_rows(anatomy.head))
    console.print()
    verdict = [("vitviz", anatomy.support.describe())]
    show_rows(console, verdict, indent=0, width=8, style="bold cyan")


def _show_title(anatomy: Anatomy, console: Console) -> None:
    channels, height, width = anatomy.input_shape
    macs = f"{_short(anatomy.macs)} MACs" if anatomy.macs is not None else f"MACs {_UNKNOWN}"
    title = Text.assemble((printable(anatomy.name), "bold"), (f"  {anatomy.architecture}", "dim"))
    console.print(title, soft_wrap=True)
    facts = f"{_short(anatomy.parameters)} parameters · {macs} · "
    console.print(Text(facts + f"image ({channels}, {height}, {width}) → {_output(anatomy)}"))
    if anatomy.error:
        error = printable(anatomy.error)
        console.print(Text(f"The model does not run to its end: {error}", style="yellow"))
    note = "MACs: multiply–accumulates for one image, the products QKᵀ and AV included."
    if anatomy.unused_parameters:
        note += f" {_short(anatomy.unused_parameters)} parameters take no part in a forward pass."
    console.print(Text(note, style="dim"))


def _output(anatomy: Anatomy) -> str:
    if anatomy.output_shape is None:
        return f"output {_UNKNOWN}"
    kind = "logits" if anatomy.head.classes else "features"
    return f"{kind} {_tuple(anatomy.output_shape[1:])}"


def _show_part(console: Console, number: str, title: str, cost: Cost | None) -> None:
    console.print()
    console.print(Text.assemble((f"{number}  ", "bold cyan"), (title, "bold")))
    if cost is not None:
        console.print(Text(" " * _INDENT + _figures(cost), style="dim"))


def _figures(cost: Cost) -> str:
    macs = f"MACs {_UNKNOWN}" if cost.macs is None else f"{_short(cost.macs)} MACs"
    share = f"{_short(cost.parameters)} parameters ({_percent(cost.share)})"
    shape = _UNKNOWN if cost.output_shape is None else _tuple(cost.output_shape)
    return f"{share} · {macs} · output {shape}"


def show_rows(
    console: Console,
    rows: Iterable[_Row],
    *,
    indent: int = _INDENT,
    width: int = _LABEL_WIDTH,
    style: str = "cyan",
) -> None:
    """Print labels and values in two columns; the values wrap between words.

    Args:
        console: Where to.
        rows: Labels, each with its value.
        indent: Of the labels.
        width: Of the labels' column.
        style: Of the labels.
    """
    column = indent + width
    for label, value in rows:
        # Wrapped here, not in a table, which pads every line with blanks to its full width.
        for number, line in enumerate(Text(value).wrap(console, max(console.width - column, 20))):
            line.rstrip()
            start = " " * indent + (label if number == 0 else "")
            console.print(Text.assemble((start.ljust(column), style), line), soft_wrap=True)


def _tokenization_rows(part: Tokenization) -> list[_Row]:
    label = "patches" if part.cost else "first layer"
    rows = [(label, _patch_words(part)), ("grid", _grid_words(part))]
    for token in part.extra_tokens:
        rows.append((_token_label(token), _token_words(token)))
    if not part.extra_tokens:
        rows.append(("other tokens", "none: no class token, no registers"))
    label = "positions"
    for position in part.positions[:_MAX_POSITIONS]:
        rows.append((label, _position_words(position)))
        label = ""
    if len(part.positions) > _MAX_POSITIONS:
        rows.append(("", f"and {len(part.positions) - _MAX_POSITIONS} more (all with --json)"))
    if not part.positions:
        rows.append((label, _no_position_words(part)))
    if part.norms:
        rows.append(("norm", f"{_layers(part.norms)}, before the first block"))
    if part.tokens is not None:
        rows.append(("sequence", f"{part.tokens:,} tokens × {part.width:,} channels"))
    return rows


def _token_label(token: ExtraTokens) -> str:
    words = (f"{token.kind} token{'s' * (token.count > 1)}", token.kind, "extra tokens")
    return next(word for word in words if len(word) < _LABEL_WIDTH)


def _token_words(token: ExtraTokens) -> str:
    joins = f", joins {token.joins}" if token.joins else ""
    return f"{token.count} learned ({token.parameter}){joins}"


def _patch_words(part: Tokenization) -> str:
    patches = part.patches
    if patches is None:
        return _UNKNOWN
    channels = f"{patches.in_channels} → {patches.out_channels} channels"
    layer = f"{patches.operation}, {channels}"
    if patches.kernel:
        layer += f", kernel {_times(patches.kernel)}, stride {_times(patches.stride)}"
    else:
        layer += ", on patches cut out of the image"
    if patches.convolutions <= 1:
        return layer
    return (
        f"convolutional stem {patches.name} ({patches.kind}): {patches.convolutions} convolutions, "
        f"first {layer}; a token sees beyond its own patch"
    )


def _grid_words(part: Tokenization) -> str:
    patches = part.patches
    if patches is None or patches.patch_tokens is None:
        return _UNKNOWN
    if patches.grid is None:
        return f"{patches.patch_tokens:,} patch tokens, rows and columns {_UNKNOWN}"
    rows, cols = patches.grid
    return f"{rows} rows × {cols} columns = {patches.patch_tokens:,} patch tokens"


def _position_words(position: PositionEmbedding) -> str:
    made_of = _parameter_words(position.parameters)
    kinds = {
        "absolute": "absolute",
        "rotary": "rotary (RoPE)",
        "relative bias": "relative-position bias",
        "attention bias": "position bias",
        "attention mask": "mask or bias",
        "not determined": f"{_UNKNOWN}: something meets the tokens here,",
    }
    origin = "learned" if position.learned else "fixed"
    if position.sine:
        origin += " sine and cosine"
    often = ""
    if position.times > 1:
        own = any(".i." in name for name in position.parameters)
        often = f" in {position.times} places, {'each its own' if own else 'the same in all'}"
    return (
        f"{origin} {kinds[position.kind]} {_tuple(position.shape)} ({made_of}), "
        f"{position.place}{often}"
    )


def _parameter_words(names: Sequence[str]) -> str:
    if len(names) <= 1:
        return names[0] if names else "computed, no parameters"
    shared = os.path.commonprefix([name.split(".") for name in names])
    return f"{'.'.join(shared) or names[0] + ' …'}, {len(names)} tensors"


def _no_position_words(part: Tokenization) -> str:
    if not part.later_convolutions:
        return "none: nothing tells one token from another"
    return (
        f"no embedding; {part.later_convolutions} convolutions see neighbours, and the border by "
        "their padding"
    )


def _block_counts(blocks: Blocks) -> str:
    if len(blocks.kinds) == 1:
        alike = ", all identical" if blocks.count > 1 else ""
        return f"{blocks.count} × {blocks.kinds[0].kind}{alike}"
    names = list(dict.fromkeys(kind.kind for kind in blocks.kinds))
    return f"{blocks.count} × {' and '.join(names)}, of {len(blocks.kinds)} different builds"


def _blocks_rows(blocks: Blocks) -> list[_Row]:
    first, *others = blocks.kinds
    rows = _block_rows(first, alone=not others)
    for kind in others[:_MAX_KINDS]:
        rows.append((_block_label(kind), _difference(kind, first)))
    if len(others) > _MAX_KINDS:
        rows.append(("", f"and {len(others) - _MAX_KINDS} more kinds of block (all with --json)"))
    return rows


def _block_rows(kind: BlockKind, *, alone: bool) -> list[_Row]:
    label = "one block" if alone else _block_label(kind)
    figures = _block_figures(kind) if alone else f"{_indices(kind)}{_block_figures(kind)}"
    rows = [(label, figures), ("runs", " → ".join(one.name for one in kind.order))]
    norms = [layer for layer in kind.order if "Norm" in layer.kind]
    rows.append(("norm", _layers(norms) or "none seen"))
    for attention in kind.attentions[:_MAX_ATTENTIONS]:
        rows += [
            ("attention", _attention_words(attention)),
            ("probabilities", _probability_words(attention)),
        ]
    if len(kind.attentions) > _MAX_ATTENTIONS:
        rows.append(("", f"and {len(kind.attentions) - _MAX_ATTENTIONS} more attentions"))
    if not kind.attentions:
        rows.append(("attention", f"{_UNKNOWN}: no softmax was seen in the block"))
    rows += [("MLP", _feed_forward_words(one)) for one in kind.feed_forwards[:_MAX_ATTENTIONS]]
    if not kind.feed_forwards:
        rows.append(("MLP", _UNKNOWN))
    if kind.layer_scales:
        rows.append(("layer scale", ", ".join(kind.layer_scales)))
    if kind.drop_path:
        rows.append(("drop path", f"{kind.drop_path[0]:g} to {kind.drop_path[1]:g}, in training"))
    return rows


def _block_figures(kind: BlockKind) -> str:
    macs = _UNKNOWN if kind.macs is None else _short(kind.macs)
    shape = _UNKNOWN if kind.output_shape is None else _tuple(kind.output_shape)
    return f"{_short(kind.parameters)} parameters · {macs} MACs · output {shape}"


def _difference(kind: BlockKind, first: BlockKind) -> str:
    """Say what another kind of block is, and what of its modules differs."""
    words = [f"{_indices(kind)}{_block_figures(kind)}"]
    if kind.kind != first.kind:
        words.insert(0, kind.kind)
    order = [layer.name for layer in kind.order]
    if order != [layer.name for layer in first.order]:
        words.append(" → ".join(order))
    if kind.attentions and _seen(kind.attentions) != _seen(first.attentions):
        attention = kind.attentions[0]
        words.append(f"probabilities {_tuple(attention.probabilities)}")
    return " · ".join(words)


def _seen(attentions: Sequence[BlockAttention]) -> list[tuple[int, ...]]:
    return [attention.probabilities for attention in attentions]


def _attention_words(attention: BlockAttention) -> str:
    heads = f"{attention.heads} heads" if attention.heads else f"heads {_UNKNOWN}"
    if attention.head_dim:
        heads += f" × {attention.head_dim} channels"
    words = [heads, *(_channels(layer) for layer in attention.projections)]
    if attention.norms:
        words.append(_layers(attention.norms))
    return ", ".join([*words, "fused" if attention.fused else "not fused"])


def _probability_words(attention: BlockAttention) -> str:
    shape = _tuple(attention.probabilities)
    axes = " (heads, queries, keys)" if attention.over_tokens and attention.heads else ""
    drop = f"blocks[i].{attention.drop}" if attention.drop else None
    if attention.fused:
        where = "inside scaled_dot_product_attention"
        if drop:
            where += f"; when attention is not fused, at {drop}"
    else:
        where = f"at {drop}" if drop else f"after the softmax of {attention.name or 'the block'}"
    note = "" if attention.over_tokens is not False else "; not one row and column a token"
    return f"{shape}{axes} {where}{note}"


def _feed_forward_words(part: FeedForward) -> str:
    activation = part.activation or f"activation {_UNKNOWN}"
    return f"{_widths(part.layers)}, {activation} ({part.name}: {part.kind})"


def _widths(layers: Sequence[Layer]) -> str:
    """Write 192 → 768 → 192 for a chain of layers; a gate halves what goes on."""
    first, last = layers[0], layers[-1]
    pairs = list(zip(layers, layers[1:], strict=False))
    if all(before.outputs == after.inputs for before, after in pairs):
        return " → ".join(str(width) for width in (first.inputs, *(one.outputs for one in layers)))
    outputs = {one.outputs for one in layers[:-1]}
    if len(layers) == 2 and first.outputs == 2 * (last.inputs or 0):
        return f"{first.inputs} → {first.outputs}, one half gates the other → {_channels(last, '')}"
    if len(layers) == 3 and outputs == {last.inputs} and first.inputs == layers[1].inputs:
        return f"{first.inputs} → 2 × {first.outputs}, one gates the other → {_channels(last, '')}"
    return ", ".join(_channels(layer) for layer in layers)


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


def _show_outline(console: Console, anatomy: Anatomy) -> None:
    words = f"{_UNKNOWN}: no single sequence of blocks. The modules as they run:"
    console.print(Text(" " * _INDENT + words))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    titles = ("module", "class", "parameters", "MACs", "output")
    table.add_row(
        *(
            Text(" " * _INDENT * (not index) + title, style="dim")
            for index, title in enumerate(titles)
        )
    )
    layers = _joined(anatomy.outline)
    for name, kind, cost in layers[:_MAX_OUTLINE]:
        macs = _UNKNOWN if cost.macs is None else _short(cost.macs)
        shape = _UNKNOWN if cost.output_shape is None else _tuple(cost.output_shape)
        label = Text(" " * _INDENT + name, style="cyan")
        table.add_row(label, Text(kind), Text(_short(cost.parameters)), Text(macs), Text(shape))
    console.print(table)
    if len(layers) > _MAX_OUTLINE:
        more = len(layers) - _MAX_OUTLINE
        console.print(Text(" " * _INDENT + f"and {more} more (all with --json)", style="dim"))


def _joined(layers: Iterable[Layer]) -> list[tuple[str, str, Cost]]:
    """Join neighbours that are alike (blocks.0, blocks.1, …) into one line: name, class, sum."""
    lines = []
    for (kind, cost, _), alike in groupby(
        layers, key=lambda layer: (layer.kind, layer.cost, layer.name.rpartition(".")[0])
    ):
        names = [layer.name for layer in alike]
        assert cost is not None
        count = len(names)
        if count > 1:
            names[1:] = [names[-1].rpartition(".")[2]]
            kind = f"{count} × {kind}"
            macs = None if cost.macs is None else count * cost.macs
            cost = replace(cost, parameters=count * cost.parameters, macs=macs)
        lines.append(("–".join(names), kind, cost))
    return lines


def _head_rows(head: Head) -> list[_Row]:
    norm = _layers(head.norms) or ("none seen" if head.cost else _UNKNOWN)
    if head.norm_after_pooling is not None:
        norm += ", after pooling" if head.norm_after_pooling else ", before pooling"
    runs = " → ".join(layer.name for layer in head.order[:_MAX_OUTLINE])
    rows = [("runs", runs)] if runs else []
    rows += [("norm", norm), ("pooling", head.pooling or _UNKNOWN)]
    if not head.classes:
        return [*rows, ("linear", "none: the output is the pooled features, no classes")]
    linear = ", ".join(_channels(layer) for layer in head.linears) or _UNKNOWN
    return [*rows, ("linear", linear), ("classes", f"{head.classes:,}")]


def _layers(layers: Sequence[Layer]) -> str:
    """Write "LayerNorm (norm1, norm2)" for layers of one class or several."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer.name)
    return ", ".join(f"{kind} ({', '.join(names)})" for kind, names in kinds.items())


def _channels(layer: Layer, name: str | None = None) -> str:
    return f"{layer.name if name is None else name} {layer.inputs} → {layer.outputs}".strip()


def _short(count: int) -> str:
    """Write a count with three figures: 950, 12.3 k, 5.72 M, 1.14 G."""
    value = float(count)
    for unit in ("", " k", " M", " G", " T"):
        if value < 999.5 or unit == " T":
            break
        value /= 1000
    digits = 0 if not unit else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{unit}"


def _percent(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _tuple(sizes: Sequence[int]) -> str:
    return f"({', '.join(map(str, sizes))})"


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))
