"""What happens while a model runs once on the meta device: modules, products, tokens, positions.

Shapes only: no weights are needed, no memory and hardly any time. Each tensor is followed from
where it comes: the image, or parameters and constants alone. Where the second kind meets the
first, something was added, multiplied or prepended to the tokens. What that means is for the rest
of the package to say; nothing here knows any model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vitviz.errors import first_line
from vitviz.inspection.events import AttentionUse, ConstantUse, ModuleRun, Product, Shape, Trace
from vitviz.models.hooks import hooked
from vitviz.models.structure import on_meta

__all__ = ["trace_model"]

# The only ways in which a constant joins the image's tokens that have a meaning below.
_MEANINGS = {
    "add": "add",
    "sub": "add",
    "mul": "multiply",
    "cat": "concatenate",
    "concat": "concatenate",
}
# A parameter in these is a layer's weight, not a position; views and comparisons mix nothing.
_LAYERS = {
    *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "bilinear", "lstm", "gru"),
    *("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "prelu"),
    *("expand_as", "view_as", "type_as", "to", "set", "_assert", "copy"),
}


def trace_model(module: nn.Module, shape: Shape) -> Trace:
    """Run a model once on the meta device and write down what happens.

    Args:
        module: The model, with or without weights; it is left as it was.
        shape: Shape of the image: (channels, height, width).

    Returns:
        What was seen; when the model does not run, what was seen until then, and why it ended.
    """
    state, image = on_meta(module, shape)
    clock = _Clock()
    with ExitStack() as stack:
        counter = stack.enter_context(FlopCounterMode(display=False))
        for part in [part for part in module.modules() if part.training]:
            part.training = False
            stack.callback(setattr, part, "training", True)
        stack.enter_context(hooked(_watch_modules(module, clock, counter)))
        stack.enter_context(torch.no_grad())  # FlopCounterMode of older torch sees no more
        stack.enter_context(_TensorTracker(clock, state, image))
        try:
            torch.func.functional_call(module, state, (image,))
        except Exception as error:  # noqa: BLE001 - foreign code: its reason is the result
            clock.trace.error = first_line(error)
    clock.trace.macs = counter.get_total_flops() // 2
    return clock.trace


@dataclass
class _Clock:
    """The trace so far, the time, and the modules that are running."""

    trace: Trace = field(default_factory=Trace)
    now: int = 0
    running: list[ModuleRun] = field(default_factory=list)

    def tick(self) -> int:
        self.now += 1
        return self.now

    @property
    def path(self) -> str:
        return self.running[-1].path if self.running else ""


def _watch_modules(
    module: nn.Module, clock: _Clock, counter: FlopCounterMode
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def enter(path: str, part: nn.Module, args: tuple[Any, ...]) -> None:
        run = ModuleRun(path=path, kind=type(part).__name__, enter=clock.tick())
        run.input_shape = _shape_of(args)
        # The counter takes a multiplication and an addition for two operations.
        run.macs_before = counter.get_total_flops() // 2
        clock.trace.runs.append(run)
        clock.running.append(run)

    def leave(output: object) -> None:
        run = clock.running.pop()
        run.leave = clock.tick()
        run.output_shape = _shape_of(output)
        run.macs_after = counter.get_total_flops() // 2

    # A module may stand under two names; it runs under the first, as parameters are named.
    for path, part in module.named_modules():
        yield part.register_forward_pre_hook(lambda part, args, path=path: enter(path, part, args))
        yield part.register_forward_hook(lambda part, args, output: leave(output))


@dataclass(frozen=True)
class _Origin:
    """Where a tensor comes from."""

    image: bool = False
    names: frozenset[str] = frozenset()
    sine: bool = False


_NOWHERE = _Origin()


class _TensorTracker(TorchFunctionMode):
    """Follows every tensor through every torch function."""

    def __init__(self, clock: _Clock, state: Mapping[str, Tensor], image: Tensor) -> None:
        super().__init__()
        self._clock = clock
        # Tensors are known by their id, so each is kept alive: meta tensors hold no memory.
        self._kept: list[Tensor] = [*state.values(), image]
        self._origins = {
            id(tensor): _Origin(names=frozenset([name])) for name, tensor in state.items()
        }
        self._origins[id(image)] = _Origin(image=True)
        self._names = {id(tensor): name for name, tensor in state.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = _plain_name(func)
        if name != "get":  # reading .shape and the like
            inputs = list(_tensors((args, kwargs)))
            self._see(name, inputs, args, kwargs, output)
            self._follow(name, inputs, args, output)
        return output

    def _see(
        self,
        name: str,
        inputs: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        step = self._clock.tick()
        for tensor in inputs:
            if id(tensor) in self._names:
                self._clock.trace.first_use.setdefault(self._names[id(tensor)], step)
        if name == "scaled_dot_product_attention":
            self._see_fused(step, args, kwargs)
        elif name in ("linear", "conv1d", "conv2d", "conv3d"):
            self._see_product(step, name, args, kwargs, output)
        # A softmax over fewer axes is a classifier's, one over parameters alone mixes no tokens.
        elif name == "softmax" and self._origin(inputs[0]).image and inputs[0].dim() >= 3:
            self._clock.trace.attentions.append(
                AttentionUse(
                    step=step, path=self._clock.path, fused=False, shape=tuple(inputs[0].shape)
                )
            )
        elif name not in _LAYERS:
            self._see_constant_uses(step, name, inputs, args, kwargs)

    def _see_fused(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, key, mask = given["query"], given["key"], given.get("attn_mask")
        bias = None
        if mask is not None and not self._origin(mask).image:
            bias = self._constant_use(step, "add", "scaled_dot_product_attention", query, mask)
        self._clock.trace.attentions.append(
            AttentionUse(
                step=step,
                path=self._clock.path,
                fused=True,
                shape=(*query.shape[:-1], key.shape[-2]),
                head_dim=int(query.shape[-1]),
                bias=bias,
            )
        )

    def _see_product(
        self, step: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(order, args, strict=False)) | kwargs
        weight = given["weight"]
        convolution = name != "linear"
        kernel = tuple(weight.shape[2:])
        stride = given.get("stride", 1)
        strides = (stride,) * len(kernel) if isinstance(stride, int) else tuple(stride)
        self._clock.trace.products.append(
            Product(
                step=step,
                path=self._clock.path,
                convolution=convolution,
                weight=next(iter(self._origin(weight).names), None),
                inputs=int(given["input"].shape[1 if convolution else -1]),
                outputs=int(weight.shape[0]),
                kernel=kernel,
                stride=strides if convolution else (),
                output_shape=tuple(output.shape),
                from_image=self._origin(given["input"]).image,
            )
        )

    def _see_constant_uses(
        self,
        step: int,
        name: str,
        inputs: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        meaning = _MEANINGS.get(name, "other")
        tokens = [tensor for tensor in inputs if self._origin(tensor).image]
        constants = [tensor for tensor in inputs if not self._origin(tensor).image]
        axis = None
        if meaning == "concatenate" and tokens:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            axis = axis - tokens[0].dim() if axis >= 0 else axis
        elif meaning != "concatenate":
            # One value a channel or a head is a scale or a bias; a position has more axes.
            constants = [tensor for tensor in constants if _extent(tensor) > 1]
        for constant in constants if tokens else ():
            constant_use = self._constant_use(step, meaning, name, tokens[0], constant, axis)
            self._clock.trace.constant_uses.append(constant_use)

    def _constant_use(
        self,
        step: int,
        meaning: str,
        function: str,
        tokens: Tensor,
        constant: Tensor,
        axis: int | None = None,
    ) -> ConstantUse:
        origin = self._origin(constant)
        return ConstantUse(
            step=step,
            path=self._clock.path,
            meaning=meaning,
            function=function,
            tokens_shape=tuple(tokens.shape),
            constant_shape=tuple(constant.shape),
            names=tuple(sorted(origin.names)),
            sine=origin.sine,
            axis=axis,
        )

    def _origin(self, tensor: Tensor) -> _Origin:
        return self._origins.get(id(tensor), _NOWHERE)

    def _follow(self, name: str, inputs: list[Tensor], args: tuple[Any, ...], output: Any) -> None:
        """Give the output the origins of the inputs."""
        origins = [self._origin(tensor) for tensor in inputs]
        image = any(origin.image for origin in origins)
        # Once the image is in it, a tensor is tokens: which parameters went in does not matter.
        names = frozenset() if image else frozenset().union(*(origin.names for origin in origins))
        sine = name in ("sin", "cos", "polar") or any(origin.sine for origin in origins)
        changed = args[0] if name == "setitem" else output
        for tensor in _tensors(changed):
            self._kept.append(tensor)
            self._origins[id(tensor)] = _Origin(image=image, names=names, sine=sine and not image)


def _plain_name(func: Callable[..., Any]) -> str:
    """Name a torch function without the marks of its operator and in-place forms."""
    name = getattr(func, "__name__", str(func))
    if func is F.scaled_dot_product_attention or name.startswith("_assert"):
        return name
    plain = name.strip("_")
    if name.startswith("__") and plain[:1] in "ir" and plain[1:] in _MEANINGS:
        return plain[1:]
    return plain


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _shape_of(value: Any) -> Shape | None:
    tensor = next(_tensors(value), None)
    return None if tensor is None else tuple(tensor.shape)


def _extent(tensor: Tensor) -> int:
    """Count the axes along which a tensor has more than one value."""
    return sum(size > 1 for size in tensor.shape)
