"""What ``inspect`` shows of a model, with Rich; measures nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitviz.cli.block_view import block_rows, block_title
from vitviz.cli.rows import INDENT, LABEL_WIDTH, show_rows
from vitviz.cli.words import (
    UNKNOWN,
    layer_channels,
    layer_list,
    percentage,
    shape_text,
    short_count,
    size_text,
)
from vitviz.errors import printable
from vitviz.inspection.parts import (
    Cost,
    ExtraTokens,
    Head,
    Layer,
    ModelSummary,
    PositionEmbedding,
    Tokenization,
)

__all__ = ["show_model"]


_Row = tuple[str, str]
_MAX_OUTLINE = 12
_MAX_POSITIONS = 4


def show_model(summary: ModelSummary, console: Console) -> None:
    """Print a model's three parts with their figures, and what vitviz will do with it.

    Args:
        summary: What was measured.
        console: Where to.
    """
    _show_title(summary, console)
    blocks = summary.blocks
    _show_part(console, "1", _first_title(summary), summary.tokenization.cost)
    show_rows(console, _tokenization_rows(summary.tokenization))
    title = f"Transformer blocks: {block_title(blocks)}" if blocks else "Transformer blocks"
    _show_part(console, "2", title, blocks.cost if blocks else None)
    if blocks:
        show_rows(console, block_rows(blocks))
    else:
        _show_outline(console, summary)
    _show_part(console, "3", "Head", summary.head.cost)
    show_rows(console, _head_rows(summary.head))
    console.print()
    verdict = [("vitviz", summary.support.describe())]
    show_rows(console, verdict, indent=0, width=8, style="bold cyan")


def _show_title(summary: ModelSummary, console: Console) -> None:
    channels, height, width = summary.input_shape
    macs = f"{short_count(summary.macs)} MACs" if summary.macs is not None else f"MACs {UNKNOWN}"
    title = Text.assemble((printable(summary.name), "bold"), (f"  {summary.architecture}", "dim"))
    console.print(title, soft_wrap=True)
    facts = f"{short_count(summary.parameters)} parameters · {macs} · "
    console.print(Text(facts + f"image ({channels}, {height}, {width}) → {_output(summary)}"))
    if summary.error:
        error = printable(summary.error)
        console.print(Text(f"The model does not run to its end: {error}", style="yellow"))
    note = "MACs: multiply–accumulates for one image, the products QKᵀ and AV included."
    if summary.unused_parameters:
        unused = short_count(summary.unused_parameters)
        note += f" {unused} parameters take no part in a forward pass."
    console.print(Text(note, style="dim"))


def _first_title(summary: ModelSummary) -> str:
    """Promise a positional embedding only where one was seen, and tokens where there are some."""
    if summary.tokenization.positions:
        return "Tokenization + positional embedding"
    return "Tokenization" if summary.blocks else "Stem"


def _output(summary: ModelSummary) -> str:
    if summary.output_shape is None:
        return f"output {UNKNOWN}"
    kind = "logits" if summary.head.classes else "features"
    return f"{kind} {shape_text(summary.output_shape[1:])}"


def _show_part(console: Console, number: str, title: str, cost: Cost | None) -> None:
    console.print()
    console.print(Text.assemble((f"{number}  ", "bold cyan"), (title, "bold")))
    if cost is not None:
        console.print(Text(" " * INDENT + _figures(cost), style="dim"))


def _figures(cost: Cost) -> str:
    macs = f"MACs {UNKNOWN}" if cost.macs is None else f"{short_count(cost.macs)} MACs"
    share = f"{short_count(cost.parameters)} parameters ({percentage(cost.share)})"
    shape = UNKNOWN if cost.output_shape is None else shape_text(cost.output_shape)
    return f"{share} · {macs} · output {shape}"


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
        rows.append(("norm", f"{layer_list(part.norms)}, before the first block"))
    if part.tokens is not None:
        rows.append(("sequence", f"{part.tokens} tokens × {part.width} channels"))
    return rows


def _token_label(token: ExtraTokens) -> str:
    words = (f"{token.kind} token{'s' * (token.count > 1)}", token.kind, "extra tokens")
    return next(word for word in words if len(word) < LABEL_WIDTH)


def _token_words(token: ExtraTokens) -> str:
    joins = f", joins {token.joins}" if token.joins else ""
    return f"{token.count} learned ({token.parameter}){joins}"


def _patch_words(part: Tokenization) -> str:
    patches = part.patches
    if patches is None:
        return UNKNOWN
    channels = f"{patches.in_channels} → {patches.out_channels} channels"
    layer = f"{patches.operation}, {channels}"
    if patches.kernel:
        layer += f", kernel {size_text(patches.kernel)}, stride {size_text(patches.stride)}"
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
    if patches is None or (patches.grid is None and patches.patch_tokens is None):
        return UNKNOWN
    if patches.grid is None:
        return f"{patches.patch_tokens} patch tokens, rows and columns {UNKNOWN}"
    rows, cols = patches.grid
    if patches.patch_tokens is None:
        return f"{rows} rows × {cols} columns after {patches.name}"
    return f"{rows} rows × {cols} columns = {patches.patch_tokens} patch tokens"


def _position_words(position: PositionEmbedding) -> str:
    made_of = _parameter_words(position.parameters)
    kinds = {
        "absolute": "absolute",
        "rotary": "rotary (RoPE)",
        "relative bias": "relative-position bias",
        "attention bias": "position bias",
        "attention mask": "mask or bias",
        "not determined": f"constant, its role {UNKNOWN},",
    }
    origin = "learned" if position.learned else "fixed"
    if position.sine:
        origin += " sine and cosine"
    often = ""
    if position.times > 1:
        own = any(".i." in name for name in position.parameters)
        often = f" in {position.times} places, {'each its own' if own else 'the same in all'}"
    return (
        f"{origin} {kinds[position.kind]} {shape_text(position.shape)} ({made_of}), "
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


def _show_outline(console: Console, summary: ModelSummary) -> None:
    words = f"{UNKNOWN}: no single sequence of blocks. The modules as they run:"
    console.print(Text(" " * INDENT + words))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    titles = ("module", "class", "parameters", "MACs", "output")
    table.add_row(
        *(
            Text(" " * INDENT * (not index) + title, style="dim")
            for index, title in enumerate(titles)
        )
    )
    layers = _joined(summary.outline)
    for name, kind, cost in layers[:_MAX_OUTLINE]:
        macs = UNKNOWN if cost.macs is None else short_count(cost.macs)
        shape = UNKNOWN if cost.output_shape is None else shape_text(cost.output_shape)
        label = Text(" " * INDENT + name, style="cyan")
        parameters = short_count(cost.parameters)
        table.add_row(label, Text(kind), Text(parameters), Text(macs), Text(shape))
    console.print(table)
    if len(layers) > _MAX_OUTLINE:
        more = len(layers) - _MAX_OUTLINE
        console.print(Text(" " * INDENT + f"and {more} more (all with --json)", style="dim"))


def _joined(layers: Iterable[Layer]) -> list[tuple[str, str, Cost]]:
    """Join neighbours that are alike (blocks.0, blocks.1, …) into one line: name, class, sum."""
    lines = []
    for (kind, cost, _), alike in groupby(
        layers, key=lambda layer: (layer.kind, layer.cost, layer.name.rpartition(".")[0])
    ):
        names = [layer.name for layer in alike]
        assert cost is not None  # an outline measures every layer
        count = len(names)
        if count > 1:
            names[1:] = [names[-1].rpartition(".")[2]]
            kind = f"{count} × {kind}"
            macs = None if cost.macs is None else count * cost.macs
            cost = replace(cost, parameters=count * cost.parameters, macs=macs)
        lines.append(("–".join(names), kind, cost))
    return lines


def _head_rows(head: Head) -> list[_Row]:
    norm = layer_list(head.norms) or ("none seen" if head.cost or head.order else UNKNOWN)
    if head.norm_after_pooling is not None:
        norm += ", after pooling" if head.norm_after_pooling else ", before pooling"
    runs = " → ".join(layer.name for layer in head.order[:_MAX_OUTLINE])
    rows = [("runs", runs)] if runs else []
    rows += [("norm", norm), ("pooling", head.pooling or UNKNOWN)]
    if not head.classes:
        return [*rows, ("linear", "none: the output is the pooled features, no classes")]
    linear = ", ".join(layer_channels(layer) for layer in head.linears) or UNKNOWN
    return [*rows, ("linear", linear), ("classes", str(head.classes))]
