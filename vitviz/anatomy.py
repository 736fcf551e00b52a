"""The parts of a model, measured on the meta device: tokens and positions, blocks, head.

Pure measuring, from one traced run: nothing here prints, needs weights, or knows models by name.
What cannot be told from the trace is None, which means "not determined", and is never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from vitviz.layout import block_names
from vitviz.models import preprocessing_of
from vitviz.support import Support, support_of
from vitviz.trace import Attention, Encounter, ModuleRun, Product, Trace, trace_model

__all__ = [
    "Anatomy",
    "BlockAttention",
    "BlockKind",
    "Blocks",
    "Cost",
    "ExtraTokens",
    "FeedForward",
    "Head",
    "Layer",
    "PatchEmbedding",
    "PositionEmbedding",
    "Tokenization",
    "describe",
]

Shape = tuple[int, ...]

_ACTIVATION_HOMES = ("torch.nn.modules.activation", "timm.layers.activations")
_ALL_BUT_WHOLE = 0.8


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a part holds, does and hands on.

    Attributes:
        parameters: Number of parameters.
        share: The same as a share of the model's, in [0, 1].
        macs: Multiply–accumulates for one image; None when not determined.
        output_shape: Shape of what it hands on.
    """

    parameters: int
    share: float
    macs: int | None
    output_shape: Shape | None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a part: its name in the model, its class, and its channels if it has them."""

    name: str
    kind: str
    inputs: int | None = None
    outputs: int | None = None
    cost: Cost | None = None


@dataclass(frozen=True, kw_only=True)
class PatchEmbedding:
    """How pixels become patch tokens.

    Attributes:
        name: The module that does it.
        kind: Its class.
        operation: Class of the first layer with weights, which sees the pixels.
        kernel: (height, width) of that layer; empty for a linear layer on cut-out patches.
        stride: Its steps.
        in_channels: Of that layer.
        out_channels: Of that layer.
        convolutions: Number of convolutions; above 1 it is a convolutional stem, and a token sees
            more of the image than its own patch.
        grid: (rows, cols) of the patch tokens.
        patch_tokens: Their number.
    """

    name: str
    kind: str
    operation: str
    kernel: Shape
    stride: Shape
    in_channels: int
    out_channels: int
    convolutions: int
    grid: tuple[int, int] | None
    patch_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class ExtraTokens:
    """Tokens that are no patches.

    Attributes:
        kind: "class", "distillation", "register", or the parameter's own name.
        parameter: The parameter that holds them.
        count: How many.
        joins: Where they join the patch tokens: "before the blocks", "inside the blocks",
            "after the blocks"; None when not determined.
    """

    kind: str
    parameter: str
    count: int
    joins: str | None


@dataclass(frozen=True, kw_only=True)
class PositionEmbedding:
    """One way in which the model knows where a token lies.

    Attributes:
        kind: "absolute", "rotary", "relative bias", "attention bias" (a table without the form of
            relative positions), "attention mask" (the same, not learned) or "not determined".
        parameters: The parameters and buffers that it is made of, block numbers as ``i``; empty
            when it is computed from nothing.
        learned: Whether a parameter is among them.
        sine: Whether a sine or cosine was seen on the way.
        shape: Shape of what meets the tokens (or queries and keys, or attention scores).
        place: Where and how it meets them, in words.
        times: How often it was seen: once, or once a block.
    """

    kind: str
    parameters: tuple[str, ...]
    learned: bool
    sine: bool
    shape: Shape
    place: str
    times: int


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """From pixels to the token sequence that enters the first block.

    Attributes:
        cost: Of this part; None when the model does not divide into parts.
        patches: The patch embedding.
        extra_tokens: Class, distillation, register and other tokens, in order.
        positions: Position embeddings, in the order of their use; empty means that none is there.
        norms: Norms between the patch embedding and the first block.
        later_convolutions: Number of convolutions wider than one token after the patch embedding;
            by their zero padding they, too, can tell where a token lies.
        tokens: Length of the sequence.
        width: Channels of a token.
    """

    cost: Cost | None
    patches: PatchEmbedding | None
    extra_tokens: tuple[ExtraTokens, ...]
    positions: tuple[PositionEmbedding, ...]
    norms: tuple[Layer, ...]
    later_convolutions: int
    tokens: int | None
    width: int | None


@dataclass(frozen=True, kw_only=True)
class BlockAttention:
    """One attention of a block.

    Attributes:
        name: Its module within the block; empty when the block itself does it.
        kind: The class of that module.
        heads: Number of heads.
        head_dim: Channels of one head.
        projections: Linear layers before the probabilities (qkv, or q, k and v).
        norms: Norms within (of queries and keys, say).
        fused: Whether the probabilities stay inside ``scaled_dot_product_attention``.
        probabilities: Their shape without the batch: (heads, queries, keys).
        over_tokens: Whether they have one row and one column for each token that enters the block;
            if not, they are within windows, over pooled tokens or over channels. None when the
            block takes no plain sequence of tokens.
        drop: The dropout module to hook for them when attention is not fused.
    """

    name: str
    kind: str
    heads: int | None
    head_dim: int | None
    projections: tuple[Layer, ...]
    norms: tuple[Layer, ...]
    fused: bool
    probabilities: Shape
    over_tokens: bool | None
    drop: str | None


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """The part of a block that treats each token alone.

    Attributes:
        name: Its module within the block.
        kind: The class of that module.
        layers: Its linear layers or convolutions, in order.
        activation: Class of its activation; None when not determined.
    """

    name: str
    kind: str
    layers: tuple[Layer, ...]
    activation: str | None


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """Blocks that are built alike and do alike.

    Attributes:
        indices: Which blocks, counted from 0.
        kind: Their class.
        parameters: Of one block.
        macs: Of one block.
        output_shape: Of one block.
        order: What runs in the block, in order, without what does nothing.
        attentions: Attention computations that were seen.
        feed_forwards: MLPs.
        layer_scales: Names of layer scales.
        drop_path: Lowest and highest drop probability of stochastic depth; None when inactive.
    """

    indices: tuple[int, ...]
    kind: str
    parameters: int
    macs: int | None
    output_shape: Shape | None
    order: tuple[Layer, ...]
    attentions: tuple[BlockAttention, ...]
    feed_forwards: tuple[FeedForward, ...]
    layer_scales: tuple[str, ...]
    drop_path: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The sequence of transformer blocks.

    Attributes:
        cost: Of all blocks.
        count: How many.
        kinds: The different ones; a single kind means that all are identical.
    """

    cost: Cost
    count: int
    kinds: tuple[BlockKind, ...]


@dataclass(frozen=True, kw_only=True)
class Head:
    """From the last block's tokens to the logits.

    Attributes:
        cost: Of this part; None when the model does not divide into parts.
        order: What runs after the last block, in order, without what does nothing.
        norms: Final norms.
        norm_after_pooling: Whether the first of them sees one vector, not all tokens.
        pooling: Which tokens the logit reads, in words; None when not determined.
        linears: The classifier's linear layers.
        classes: Number of logits; 0 for a model without a classifier.
    """

    cost: Cost | None
    order: tuple[Layer, ...]
    norms: tuple[Layer, ...]
    norm_after_pooling: bool | None
    pooling: str | None
    linears: tuple[Layer, ...]
    classes: int


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model and its parts.

    Attributes:
        name: As asked for.
        architecture: The class of the model.
        input_shape: (channels, height, width) of the image that was measured.
        parameters: Number of parameters.
        macs: Multiply–accumulates for one image: matrix products and convolutions, QKᵀ and AV
            included, half of the floating-point operations; None when it could not be run.
        output_shape: Shape of the model's output.
        tokenization: The first part.
        blocks: The second; None when the model has no single sequence of blocks.
        head: The third.
        outline: The model's own modules in the order in which they run.
        unused_parameters: Parameters that a forward pass does not touch.
        support: What vitviz will do with it.
        error: Why it could not be run to its end.
    """

    name: str
    architecture: str
    input_shape: tuple[int, int, int]
    parameters: int
    macs: int | None
    output_shape: Shape | None
    tokenization: Tokenization
    blocks: Blocks | None
    head: Head
    outline: tuple[Layer, ...]
    unused_parameters: int
    support: Support
    error: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the same facts as plain JSON types."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def describe(module: nn.Module, name: str, *, input_size: tuple[int, int] | None = None) -> Anatomy:
    """Measure a model and its parts on the meta device.

    Args:
        module: The model, with or without weights (``building.build_skeleton``); left as it was.
        name: What to call it.
        input_size: (height, width) of the image, if not the one it was built for.

    Returns:
        Its anatomy. A model of any kind gets one, with what can be told about it.
    """
    channels, height, width = _input_shape(module, input_size)
    trace = trace_model(module, (channels, height, width))
    subject = _Subject(module, trace)
    support = support_of(module, (height, width))
    blocks = _measure_blocks(subject)
    whole = trace.run_of("")
    return Anatomy(
        name=name,
        architecture=type(module).__name__,
        input_shape=(channels, height, width),
        parameters=subject.parameters,
        macs=None if trace.error else trace.macs,
        output_shape=whole.output_shape if whole else None,
        tokenization=_measure_tokenization(subject, support),
        blocks=blocks,
        head=_measure_head(subject, support),
        outline=_outline(subject),
        unused_parameters=sum(
            size for name, size in subject.sizes.items() if subject.part_of(name) is None
        )
        if not trace.error
        else 0,
        support=support,
        error=trace.error,
    )


class _Subject:
    """A traced model, with the questions that all parts ask of it."""

    def __init__(self, module: nn.Module, trace: Trace) -> None:
        self.module = module
        self.trace = trace
        self.modules = dict(module.named_modules())
        self.sizes = {name: tensor.numel() for name, tensor in module.named_parameters()}
        self.tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.parameters = sum(self.sizes.values())
        self.block_runs = self._find_block_runs()
        self.homes = [self._home(attention) for attention in trace.attentions]

    @property
    def first(self) -> float:
        """Step at which the first block begins; never, in a model without blocks."""
        return self.block_runs[0].enter if self.block_runs else math.inf

    @property
    def last(self) -> float:
        """Step at which the last block ends."""
        return max((run.leave or math.inf for run in self.block_runs), default=math.inf)

    def part_of(self, parameter: str) -> int | None:
        """Return which part first uses a parameter: 0 tokens, 1 blocks, 2 head; None if none."""
        if any(_within(parameter, run.path) for run in self.block_runs):
            return 1
        step = self.trace.first_use.get(parameter)
        return None if step is None else self.stage(step)

    def stage(self, step: int) -> int:
        """Return which part a step belongs to."""
        return int(step > self.first) + int(step > self.last)

    def cost(self, names: Iterable[str], macs: int | None, output_shape: Shape | None) -> Cost:
        """Sum the parameters of these names into a cost."""
        parameters = sum(self.sizes[name] for name in names)
        share = parameters / self.parameters if self.parameters else 0.0
        return Cost(parameters=parameters, share=share, macs=macs, output_shape=output_shape)

    def part_cost(self, part: int) -> Cost | None:
        """Measure one of the three parts."""
        if not self.block_runs:
            return None
        begin, end = self.block_runs[0], self.block_runs[-1]
        whole = self.trace.run_of("")
        macs = (
            begin.macs_before,
            end.macs_after - begin.macs_before,
            self.trace.macs - end.macs_after,
        )
        shapes = (begin.input_shape, end.output_shape, whole.output_shape if whole else None)
        names = [name for name in self.sizes if self.part_of(name) == part]
        return self.cost(names, macs[part], shapes[part])

    def layer(self, run: ModuleRun, within: str = "") -> Layer:
        """Name a module that ran."""
        return Layer(name=_relative(run.path, within), kind=run.kind)

    def does_something(self, run: ModuleRun) -> bool:
        """Tell whether a module that ran changes its input in evaluation mode."""
        return not isinstance(self.modules[run.path], nn.Identity) and not run.kind.startswith(
            ("Dropout", "DropPath", "PatchDropout")
        )

    def is_norm(self, run: ModuleRun) -> bool:
        """Tell whether a module that ran is a norm, not something larger that contains one."""
        parts = self.modules[run.path].children()
        leaf = not any(next(part.parameters(), None) is not None for part in parts)
        return "Norm" in run.kind and leaf and self.does_something(run)

    def _find_block_runs(self) -> list[ModuleRun]:
        """List the runs of ``blocks``, if they are one sequence of blocks that each ran once."""
        paths = block_names(self.module)
        # Containers among them are the stages of a pyramid (EfficientNet, Twins), not blocks.
        stages = (nn.Sequential, nn.ModuleList)
        if self.trace.error or any(isinstance(self.modules[path], stages) for path in paths):
            return []
        runs = [run for run in self.trace.runs if run.path in set(paths)]
        return runs if [run.path for run in runs] == paths else []

    def _home(self, attention: Attention) -> str:
        """Return the module that computes an attention, not the softmax that it has for it."""
        if isinstance(self.modules[attention.path], nn.Softmax):
            return attention.path.rpartition(".")[0]
        return attention.path


def _measure_tokenization(subject: _Subject, support: Support) -> Tokenization:
    trace = subject.trace
    cost = subject.part_cost(0)
    shape = cost.output_shape if cost else None
    joined = [meeting for meeting in trace.encounters if _adds_tokens(subject, meeting)]
    extra = tuple(_extra_tokens(subject, meeting) for meeting in joined)
    tokens = _token_count(shape)
    # Of a model with two sequences (CrossViT), the blocks' first is meant: its tokens are as wide.
    front = sum(
        meeting.constant_shape[-2]
        for meeting in joined
        if shape and meeting.step < subject.first and meeting.constant_shape[-1] == shape[-1]
    )
    patches = _patch_embedding(subject, None if tokens is None else tokens - front)
    if patches and patches.grid is None and support.grid:
        patches = replace(patches, grid=support.grid)
    home = patches.name if patches else None
    norms = [
        subject.layer(run)
        for run in _norm_runs(subject, 0)
        if cost and home and not run.path.startswith(home)
    ]
    return Tokenization(
        cost=cost,
        patches=patches,
        extra_tokens=extra,
        positions=_positions(subject),
        norms=tuple(norms),
        later_convolutions=sum(
            math.prod(product.kernel) > 1 and not (home and _within(product.path, home))
            for product in trace.products
        ),
        tokens=tokens,
        width=shape[-1] if shape and tokens is not None else None,
    )


def _token_count(shape: Shape | None) -> int | None:
    """Count the tokens of (1, …, channels); more than one in front means something else."""
    plain = shape is not None and len(shape) >= 3 and shape[0] == 1
    return math.prod(shape[1:-1]) if shape and plain else None


def _adds_tokens(subject: _Subject, meeting: Encounter) -> bool:
    """Tell whether a concatenation puts parameters among the tokens (not among the keys, say)."""
    inside = any(home and _within(meeting.path, home) for home in subject.homes)
    return meeting.meaning == "concatenate" and meeting.axis == -2 and not inside


def _extra_tokens(subject: _Subject, meeting: Encounter) -> ExtraTokens:
    # A token that comes with its own position is made of two parameters.
    names = [name for name in meeting.names if "pos" not in name] or list(meeting.names)
    parameter = names[0] if names else "computed"
    words = {"cls": "class", "dist": "distillation", "reg": "register"}
    leaf = parameter.rpartition(".")[2]
    kinds = [word for start, word in words.items() if leaf.startswith(start)]
    joins = ("before the blocks", "inside the blocks", "after the blocks")
    return ExtraTokens(
        kind=kinds[0] if kinds else leaf,
        parameter=parameter,
        count=meeting.constant_shape[-2],
        joins=joins[subject.stage(meeting.step)] if subject.block_runs else None,
    )


def _patch_embedding(subject: _Subject, patch_tokens: int | None) -> PatchEmbedding | None:
    seen = [
        product
        for product in subject.trace.products
        if product.from_image and subject.stage(product.step) == 0
    ]
    if not seen:
        return None
    first = seen[0]
    name = first.path.partition(".")[0]
    convolutions = [product for product in seen if product.convolution]
    if not subject.block_runs:
        convolutions = [product for product in convolutions if _within(product.path, name)]
    grids = [product.output_shape[-2:] for product in reversed(convolutions)]
    fitting = [grid for grid in grids if len(grid) == 2 and math.prod(grid) == patch_tokens]
    return PatchEmbedding(
        name=name,
        kind=type(subject.modules[name]).__name__,
        operation=type(subject.modules[first.path]).__name__,
        kernel=first.kernel,
        stride=first.stride,
        in_channels=first.inputs,
        out_channels=first.outputs,
        convolutions=len(convolutions),
        grid=(fitting[0][0], fitting[0][1]) if fitting else None,
        patch_tokens=patch_tokens,
    )


def _positions(subject: _Subject) -> tuple[PositionEmbedding, ...]:
    """Find every constant that tells tokens apart, equal ones of several blocks as one."""
    trace = subject.trace
    met = [*trace.encounters, *(one.bias for one in trace.attentions if one.bias is not None)]
    merged: dict[tuple[Any, ...], PositionEmbedding] = {}
    paths: dict[tuple[Any, ...], set[str]] = {}
    for meeting in sorted(met, key=lambda meeting: meeting.step):
        position = _position(subject, meeting)
        if position is not None:
            key = (position.kind, position.parameters, position.place)
            merged.setdefault(key, position)
            # By module: a rotation multiplies several times, by a sine and by a cosine.
            paths.setdefault(key, set()).add(meeting.path)
    return tuple(replace(one, times=len(paths[key])) for key, one in merged.items())


def _position(subject: _Subject, meeting: Encounter) -> PositionEmbedding | None:
    if meeting.meaning == "concatenate":
        return None
    if meeting.function == "scaled_dot_product_attention":
        return _attention_bias(subject, meeting, "attention scores")
    attention = _attention_around(subject, meeting)
    if attention is not None:
        return _position_in_attention(subject, meeting, attention)
    in_head = subject.stage(meeting.step) == 2
    if in_head and meeting.meaning != "add":
        return None  # what a head pools with
    if in_head:
        return _position_of(
            subject, meeting, "absolute", f"added in the head {meeting.path}".strip()
        )
    if meeting.meaning == "add":
        return _position_of(subject, meeting, "absolute", _absolute_place(subject, meeting))
    where = f"{meeting.function} in {_blocks_as_i(meeting.path) or 'the model itself'}"
    return _position_of(subject, meeting, "not determined", where)


def _attention_around(subject: _Subject, meeting: Encounter) -> Attention | None:
    """Return the attention in whose module a constant is met; the next one, if there are more."""
    near = [
        attention
        for attention, home in zip(subject.trace.attentions, subject.homes, strict=True)
        if home and _within(meeting.path, home)
    ]
    return next((one for one in near if one.step > meeting.step), near[-1] if near else None)


def _position_in_attention(
    subject: _Subject, meeting: Encounter, attention: Attention
) -> PositionEmbedding | None:
    before = meeting.step < attention.step
    if meeting.meaning == "add" and meeting.constant_shape[-2:] == attention.shape[-2:]:
        target = "attention scores" if before else "attention probabilities, after softmax"
        return _attention_bias(subject, meeting, target)
    rotary = meeting.sine or any("rope" in name or "rot" in name for name in meeting.names)
    if meeting.meaning == "multiply" and before and rotary:
        return _position_of(subject, meeting, "rotary", _rotary_place(subject, meeting, attention))
    if before and meeting.names and all("rel" in name.rpartition(".")[2] for name in meeting.names):
        # Decomposed relative positions: the bias is a product of the queries and a small table.
        place = "multiplied with the queries, then added to the attention scores"
        return _position_of(subject, meeting, "relative bias", place)
    place = f"{meeting.function} inside {_blocks_as_i(meeting.path)}"
    return _position_of(subject, meeting, "not determined", place)


def _attention_bias(subject: _Subject, meeting: Encounter, target: str) -> PositionEmbedding:
    """Tell a relative bias, shared by all pairs at one distance, from any other bias."""
    stored = sum(subject.sizes.get(name, 0) for name in meeting.names)
    relative = stored > 0 and stored != math.prod(meeting.constant_shape)
    kind = "relative bias" if relative else "attention bias" if stored else "attention mask"
    return _position_of(subject, meeting, kind, f"added to the {target}")


def _rotary_place(subject: _Subject, meeting: Encounter, attention: Attention) -> str:
    queries = attention.shape[-2]
    joined = [other for other in subject.trace.encounters if _adds_tokens(subject, other)]
    front = sum(other.constant_shape[-2] for other in joined if other.step < subject.first)
    which = ""
    if queries in meeting.tokens_shape[1:-1]:
        which = " (all tokens)"
    elif queries - front in meeting.tokens_shape[1:-1]:
        which = " (patch tokens only)"
    return f"rotates queries and keys inside attention{which}"


def _absolute_place(subject: _Subject, meeting: Encounter) -> str:
    """Say when a position is added: before or after which tokens joined, and which norm."""
    plain = subject.block_runs and _token_count(subject.block_runs[0].input_shape) is not None
    if not plain:
        return f"added in {meeting.path}" if meeting.path else "added to the tokens"
    if subject.stage(meeting.step) == 1:
        return "added inside the blocks"
    joined = [other for other in subject.trace.encounters if _adds_tokens(subject, other)]
    front = [other for other in joined if other.step < subject.first]
    earlier = [_extra_tokens(subject, other).kind for other in front if other.step < meeting.step]
    later = [_extra_tokens(subject, other).kind for other in front if other.step > meeting.step]
    words = []
    if earlier:
        words.append(f"after the {_listed(earlier)} {_are(earlier)} prepended")
    if later:
        words.append(f"to the patch tokens, before the {_listed(later)} {_are(later)} prepended")
    patches = _patch_embedding(subject, None)
    for run in _norm_runs(subject, 0):
        if run.enter < meeting.step and patches and not run.path.startswith(patches.name):
            words.append(f"after {run.path}")
    return ", ".join(
        [
            "added " + (words[0] if words else "to the patch tokens"),
            *words[1:],
            "before the first block",
        ]
    )


def _position_of(subject: _Subject, meeting: Encounter, kind: str, place: str) -> PositionEmbedding:
    named = sorted({_blocks_as_i(name) for name in meeting.names})
    # An index table only says where in the learned table to look.
    learned = [name for name in meeting.names if name in subject.sizes]
    shown = sorted({_blocks_as_i(name) for name in learned}) or named
    return PositionEmbedding(
        kind=kind,
        parameters=tuple(shown),
        learned=any(subject.tensors[name].requires_grad for name in learned),
        sine=meeting.sine,
        shape=meeting.constant_shape,
        place=place,
        times=1,
    )


def _measure_blocks(subject: _Subject) -> Blocks | None:
    cost = subject.part_cost(1)
    if cost is None:
        return None
    groups: dict[Any, list[ModuleRun]] = {}
    for run in subject.block_runs:
        groups.setdefault(_signature(subject, run), []).append(run)
    kinds = tuple(_block_kind(subject, runs) for runs in groups.values())
    return Blocks(cost=cost, count=len(subject.block_runs), kinds=kinds)


def _signature(subject: _Subject, run: ModuleRun) -> Any:
    """Return what two identical blocks have in common: how they are built and what they do.

    Drop probabilities are left out, since stochastic depth grows from block to block.
    """
    block = subject.modules[run.path]
    built = [
        (name, type(part).__name__, part.extra_repr())
        for name, part in block.named_modules()
        if not _is_drop_path(part) and not isinstance(part, nn.Identity)
    ]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in block.named_parameters()]
    calls = [
        (_relative(one.path, run.path), one.shape, one.fused)
        for one in subject.trace.attentions
        if _within(one.path, run.path)
    ]
    return repr((built, shapes, calls, run.macs, run.input_shape, run.output_shape))


def _block_kind(subject: _Subject, runs: list[ModuleRun]) -> BlockKind:
    run = runs[0]
    block = subject.modules[run.path]
    return BlockKind(
        indices=tuple(int(one.path.rpartition(".")[2]) for one in runs),
        kind=run.kind,
        parameters=sum(parameter.numel() for parameter in block.parameters()),
        macs=run.macs,
        output_shape=run.output_shape,
        order=tuple(_outermost(subject, run.path, run.enter)),
        attentions=_block_attentions(subject, run),
        feed_forwards=_feed_forwards(subject, run),
        layer_scales=_layer_scales(block),
        drop_path=_drop_path([subject.modules[one.path] for one in runs]),
    )


def _outermost(subject: _Subject, within: str, after: float = 0) -> list[Layer]:
    """List the outermost modules that ran in another and did something."""
    layers: list[Layer] = []
    for run in subject.trace.runs:
        inside = run.path != within and _within(run.path, within)
        if inside and run.enter > after:
            after = run.leave or run.enter
            if subject.does_something(run):
                layers.append(subject.layer(run, within))
    return layers


def _block_attentions(subject: _Subject, block: ModuleRun) -> tuple[BlockAttention, ...]:
    pairs = zip(subject.trace.attentions, subject.homes, strict=True)
    return tuple(
        _block_attention(subject, block, attention, home)
        for attention, home in pairs
        if _within(home, block.path)
    )


def _block_attention(
    subject: _Subject, block: ModuleRun, attention: Attention, home: str
) -> BlockAttention:
    projections = [
        product
        for product in subject.trace.products
        if _within(product.path, home)
        and block.enter < product.step < attention.step
        and product.from_image
    ]
    norms = [
        subject.layer(run, home)
        for run in subject.trace.runs
        if run.path.startswith(f"{home}.") and subject.is_norm(run)
    ]
    drop = getattr(subject.modules[home], "attn_drop", None)
    ran = subject.trace.run_of(f"{home}.attn_drop")
    fits = attention.fused or (ran is not None and ran.input_shape == attention.shape)
    inner = _relative(home, block.path)
    tokens = _token_count(block.input_shape)
    # Without the plain four axes (windows, say) it is not certain which axis holds the heads.
    heads = attention.shape[1] if len(attention.shape) == 4 else None
    return BlockAttention(
        name=inner,
        kind=type(subject.modules[home]).__name__,
        heads=heads,
        head_dim=attention.head_dim or getattr(subject.modules[home], "head_dim", None),
        projections=tuple(_product_layer(subject, product, home) for product in projections),
        norms=tuple(norms) if inner else (),
        fused=attention.fused,
        probabilities=attention.shape[1:] if attention.shape[0] == 1 else attention.shape,
        over_tokens=None if tokens is None else attention.shape[-2:] == (tokens, tokens),
        drop=f"{inner}.attn_drop".lstrip(".") if isinstance(drop, nn.Module) and fits else None,
    )


def _feed_forwards(subject: _Subject, block: ModuleRun) -> tuple[FeedForward, ...]:
    """Find the modules of a block that hold several layers in a row and no attention."""
    groups: dict[str, list[Product]] = {}
    for product in subject.trace.products:
        outside = not any(_within(product.path, home) for home in subject.homes)
        if product.from_image and outside and _within(product.path, block.path):
            groups.setdefault(_owner(subject, product), []).append(product)
    return tuple(
        FeedForward(
            name=_relative(owner, block.path),
            kind=type(subject.modules[owner]).__name__,
            layers=tuple(_product_layer(subject, product, owner) for product in products),
            activation=_activation(subject, owner),
        )
        for owner, products in groups.items()
        if len(products) > 1
    )


def _owner(subject: _Subject, product: Product) -> str:
    """Return the module that a layer is part of."""
    is_layer = next(subject.modules[product.path].children(), None) is None
    return product.path.rpartition(".")[0] if is_layer else product.path


def _activation(subject: _Subject, owner: str) -> str | None:
    seen = [
        run.kind
        for run in subject.trace.runs
        if _within(run.path, owner)
        and type(subject.modules[run.path]).__module__.startswith(_ACTIVATION_HOMES)
    ]
    return seen[0] if seen else None


def _product_layer(subject: _Subject, product: Product, within: str) -> Layer:
    # A weight may be used without running its module (BEiT adds its bias by itself).
    path = product.weight.rpartition(".")[0] if product.weight else product.path
    path = path if path in subject.modules else product.path
    return Layer(
        name=_relative(path, within) or path.rpartition(".")[2],
        kind=type(subject.modules[path]).__name__,
        inputs=product.inputs,
        outputs=product.outputs,
    )


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


def _measure_head(subject: _Subject, support: Support) -> Head:
    cost = subject.part_cost(2)
    norms = _norm_runs(subject, 2) if cost else []
    shape = norms[0].input_shape if norms else None
    return Head(
        cost=cost,
        order=tuple(_outermost(subject, "", subject.last)) if cost else (),
        norms=tuple(subject.layer(run) for run in norms),
        norm_after_pooling=None if shape is None else len(shape) == 2,
        pooling=_pooling(subject, support),
        linears=_classifier(subject),
        classes=int(getattr(subject.module, "num_classes", 0) or 0),
    )


def _norm_runs(subject: _Subject, part: int) -> list[ModuleRun]:
    """List the norms that run in a part, but not inside an attention's own module."""
    return [
        run
        for run in subject.trace.runs
        if subject.stage(run.enter) == part
        and subject.is_norm(run)
        and run.path.count(".") <= 1
        and not any(home and _within(run.path, home) for home in subject.homes)
    ]


def _pooling(subject: _Subject, support: Support) -> str | None:
    if support.readout:
        return support.readout
    late = [
        home
        for attention, home in zip(subject.trace.attentions, subject.homes, strict=True)
        if subject.block_runs and subject.stage(attention.step) == 2 and home
    ]
    if late:
        kind = type(subject.modules[late[0]]).__name__
        return f"attention in {late[0]} ({kind})"
    pooling = getattr(subject.module, "global_pool", None)
    if isinstance(pooling, nn.Module):
        pooling = getattr(pooling, "pool_type", None)
    words = {"avg": "average", "token": "first token", "max": "maximum"}
    return words.get(pooling) if isinstance(pooling, str) else None


def _classifier(subject: _Subject) -> tuple[Layer, ...]:
    """List the linear layers of timm's classifier that ran."""
    getter = getattr(subject.module, "get_classifier", None)
    classifier = getter() if callable(getter) else None
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    paths = [path for path, part in subject.modules.items() if any(part is one for one in parts)]
    return tuple(
        _product_layer(subject, product, "")
        for product in subject.trace.products
        if any(_within(product.path, path) for path in paths)
    )


def _outline(subject: _Subject) -> tuple[Layer, ...]:
    """List the model's outermost modules in the order in which they ran, with their costs."""
    layers: dict[str, Layer] = {}
    end = 0
    for run in subject.trace.runs:
        if not run.path or run.enter < end or run.leave is None:
            continue
        names = [name for name in subject.sizes if name.startswith(f"{run.path}.")]
        cost = subject.cost(names, run.macs, run.output_shape)
        has_parts = next(subject.modules[run.path].children(), None) is not None
        if has_parts and cost.share > _ALL_BUT_WHOLE:
            continue  # the parts of a module that is nearly the whole model tell more
        end = run.leave
        if run.path not in layers and subject.does_something(run):
            layers[run.path] = replace(subject.layer(run), cost=cost)
    return tuple(layers.values())


def _input_shape(module: nn.Module, input_size: tuple[int, int] | None) -> tuple[int, int, int]:
    config = getattr(module, "pretrained_cfg", None) or {}
    channels = int((config.get("input_size") or (3,))[0])
    built = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(built, (tuple, list)) and len(built) == 2:
        input_size = input_size or (int(built[0]), int(built[1]))
    height, width = input_size or preprocessing_of(module).size
    return channels, height, width


def _within(path: str, home: str) -> bool:
    return not home or path == home or path.startswith(f"{home}.")


def _relative(path: str, home: str) -> str:
    return path[len(home) :].lstrip(".") if _within(path, home) else path


def _blocks_as_i(path: str) -> str:
    """Write the numbers in a path as ``i``, so that the same place in all blocks reads alike."""
    return re.sub(r"\.\d+(?=\.|$)", ".i", path)


def _listed(kinds: list[str]) -> str:
    unique = list(dict.fromkeys(kinds))
    words = [f"{kind} tokens" if kind == "register" else f"{kind} token" for kind in unique]
    return " and ".join(words)


def _are(kinds: list[str]) -> str:
    return "is" if set(kinds) != {"register"} and len(set(kinds)) == 1 else "are"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
