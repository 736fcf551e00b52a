"""The parts of a model as plain data: tokens and positions, blocks, head.

None means "not determined", which is never guessed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vitviz.inspection.events import Shape
from vitviz.models.catalogue import Support

__all__ = [
    "ModelSummary",
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
]


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
        grid: (rows, cols) of the patch tokens, or of what the module hands on where the model
            has no single sequence of tokens.
        patch_tokens: Number of patch tokens; None when not determined.
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
class ModelSummary:
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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
