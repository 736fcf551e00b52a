"""What a traced run saw: module runs, products, attention, constants that meet the tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["AttentionUse", "ConstantUse", "ModuleRun", "Product", "Shape", "Trace"]


Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ConstantUse:
    """A constant (made of parameters or of nothing) that meets the image's tokens.

    Attributes:
        step: When, on the clock of the trace.
        path: The innermost module that was running.
        meaning: "add", "multiply", "concatenate" or "other".
        function: The torch function.
        tokens_shape: Shape of the tensor that comes from the image.
        constant_shape: Shape of the constant.
        names: The parameters and buffers that it is made of, sorted; empty when computed.
        sine: Whether a sine or cosine was taken on its way.
        axis: Axis of a concatenation, counted from the end.
    """

    step: int
    path: str
    meaning: str
    function: str
    tokens_shape: Shape
    constant_shape: Shape
    names: tuple[str, ...]
    sine: bool
    axis: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionUse:
    """One computation of attention probabilities.

    Attributes:
        step: When.
        path: The innermost module that was running.
        fused: Whether it happened inside ``scaled_dot_product_attention``.
        shape: Shape of the probabilities: (batch, heads, queries, keys).
        head_dim: Channels of one head; None when not fused, where it is not seen.
        bias: A constant added to the scores, when fused.
    """

    step: int
    path: str
    fused: bool
    shape: Shape
    head_dim: int | None = None
    bias: ConstantUse | None = None


@dataclass(frozen=True, kw_only=True)
class Product:
    """A linear layer or a convolution, wherever it is called.

    Attributes:
        step: When.
        path: The innermost module that was running.
        convolution: Whether it is a convolution.
        weight: Name of its weight; None when it is none of the model's parameters as they stand.
        inputs: Number of input channels.
        outputs: Number of output channels.
        kernel: Sizes of a convolution's kernel, empty for a linear layer.
        stride: Its strides, empty for a linear layer.
        output_shape: Shape of its output.
        from_image: Whether the input depends on the image.
    """

    step: int
    path: str
    convolution: bool
    weight: str | None
    inputs: int
    outputs: int
    kernel: Shape
    stride: Shape
    output_shape: Shape
    from_image: bool


@dataclass(kw_only=True)
class ModuleRun:
    """One run of one module.

    Attributes:
        path: Its name in the model, "" for the model itself.
        kind: Its class.
        enter: Step at which it began.
        leave: Step at which it ended; None while it runs, or if it failed.
        input_shape: Of its first tensor argument.
        output_shape: Of its first output tensor.
        macs_before: Multiply–accumulates counted when it began.
        macs_after: The same when it ended.
    """

    path: str
    kind: str
    enter: int
    leave: int | None = None
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    macs_before: int = 0
    macs_after: int = 0

    @property
    def macs(self) -> int:
        """Multiply–accumulates of this run."""
        return self.macs_after - self.macs_before


@dataclass(kw_only=True)
class Trace:
    """Everything that was seen, in the order in which it happened.

    Attributes:
        runs: Runs of modules, by the time they began.
        products: Linear layers and convolutions.
        attentions: Attention computations.
        constant_uses: Constants that met the image's tokens.
        first_use: Step at which each parameter or buffer was first used.
        macs: Multiply–accumulates in all (half of ``FlopCounterMode``'s operations).
        error: Why the run ended early; None when it did not.
    """

    runs: list[ModuleRun] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    attentions: list[AttentionUse] = field(default_factory=list)
    constant_uses: list[ConstantUse] = field(default_factory=list)
    first_use: dict[str, int] = field(default_factory=dict)
    macs: int = 0
    error: str | None = None

    def run_of(self, path: str) -> ModuleRun | None:
        """Return the first complete run of a module."""
        return next((run for run in self.runs if run.path == path and run.leave is not None), None)
