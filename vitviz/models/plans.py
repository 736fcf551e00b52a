"""How to build a model of transformers of timm's parts, and what all its families share."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers import LayerNorm
from torch import nn

from vitviz.errors import ModelError

__all__ = [
    "LARGEST_SIDE",
    "Plan",
    "parts",
    "plain",
    "ratio",
    "require_gelu",
    "require_kinds",
    "sides",
]


Config = Mapping[str, Any]

_ACTIVATIONS: dict[str, Callable[..., nn.Module] | str] = {
    "gelu": nn.GELU,
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": "quick_gelu",
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}
LARGEST_SIDE = 1 << 14
"""Of an image, in pixels."""
_LARGEST = {"num_hidden_layers": 1000, "image_size": LARGEST_SIDE, "layer_norm_eps": 1}
_LARGE = 10**6  # no number of a config that anybody has is larger
_MAY_BE_0 = ("num_register_tokens", "layer_scale_init_value", "layer_norm_eps")
_PAIRS = ("image_size", "patch_size")  # one side of a square, or height and width


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to build a model, and where its names and numbers are other than timm's.

    Attributes:
        kind: The class, of timm or based on it.
        arguments: What it is called with, the image size apart.
        image_size: (height, width) that the config speaks of.
        renames: Patterns and replacements for names, after those that all families share.
        unused: Pattern of timm's names that it has no use for.
        without_bias: Pattern of biases that the model has none of, so that they are 0.
        antialias: Whether position embeddings are smoothed when they are made smaller.
        assumed: Mean and deviation of pixels where no file says them.
        default_filter: Pillow's number of the filter where no file says it.
    """

    kind: Callable[..., nn.Module]
    arguments: dict[str, Any]
    image_size: tuple[int, int]
    renames: tuple[tuple[str, str], ...] = ()
    unused: str = ""
    without_bias: str = ""
    antialias: bool = False
    assumed: tuple[tuple[float, ...], tuple[float, ...]] = ((0.5,) * 3, (0.5,) * 3)
    default_filter: int = 3

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the patches of an image of its size."""
        rows, cols = self.arguments["patch_size"]
        return self.image_size[0] // rows, self.image_size[1] // cols

    def build(self, img_size: tuple[int, int] | None = None, **arguments: Any) -> nn.Module:
        """Build it, for the image size of the config or another one."""
        return self.kind(**self.arguments, img_size=img_size or self.image_size, **arguments)


def sides(size: Any) -> tuple[int, int]:
    """Return the (height, width) of what may be one side of a square."""
    rows, cols = (size, size) if isinstance(size, int) else size
    return int(rows), int(cols)


def require_kinds(config: Config, defaults: Config) -> None:
    """Make sure that values are of the kinds of their defaults, and within reason.

    Raises:
        ModelError: One is not.
    """
    for name, default in defaults.items():
        given, largest = config[name], _LARGEST.get(name, _LARGE)
        if isinstance(default, bool):
            fits, expected = isinstance(given, bool), "true or false"
        elif isinstance(default, str):
            fits, expected = isinstance(given, str), "a word"
        elif isinstance(default, int):
            lowest, pair = int(name not in _MAY_BE_0), name in _PAIRS and isinstance(given, list)
            numbers = given if pair and len(given) == 2 else [given]
            fits = all(type(each) is int and lowest <= each <= largest for each in numbers)
            expected = f"a whole number from {lowest} to {largest:,}"
        else:
            positive = type(given) in (int, float) and 0 < given <= largest
            fits = positive or (given == 0 and name in _MAY_BE_0)
            expected = f"a number from 0 to {largest:,}"
        if not fits:
            raise ModelError(f"{name} is {reprlib.repr(given)}; expected {expected}")


def parts(config: Config) -> dict[str, Any]:
    """Return the arguments that all of timm's classes share."""
    return {
        "patch_size": sides(config["patch_size"]),
        "in_chans": config["num_channels"],
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": ratio(config["intermediate_size"], config),
        "norm_layer": partial(LayerNorm, eps=float(config["layer_norm_eps"])),
    }


def plain(config: Config) -> dict[str, Any]:
    """Return the arguments that its plain vision transformer shares with others."""
    return {**parts(config), "qkv_bias": config["qkv_bias"], "act_layer": _activation(config)}


def ratio(hidden: int, config: Config) -> float:
    """Return the factor that timm multiplies with the width, and rounds down."""
    return (hidden + 0.5) / int(config["hidden_size"])


def _activation(config: Config) -> Callable[..., nn.Module] | str:
    name = str(config["hidden_act"])
    if name not in _ACTIVATIONS:
        raise ModelError(f"hidden_act is {name!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def require_gelu(config: Config) -> None:
    """Make sure of the activation of timm's modules that know no other.

    Raises:
        ModelError: It is another one.
    """
    if config["hidden_act"] != "gelu":
        raise ModelError(
            f"hidden_act is {config['hidden_act']!r}, and timm's module for "
            f"{config['model_type']} has gelu alone"
        )
