"""What a model expects of its images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import timm.data
from PIL import Image
from torch import nn

from vitviz.errors import ModelError, OptionError
from vitviz.models.structure import input_channels, patch_embedding, patch_size

__all__ = ["Normalisation", "Preprocessing", "normalised_by", "preprocessing_of"]


Normalisation = float | str | Iterable[float]
"""One number for all channels, or one each; as text with commas between them."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a model expects of its images.

    Attributes:
        size: (height, width) in pixels.
        mean: Subtracted from RGB in [0, 1].
        std: Divided by, after that.
        interpolation: Pillow's filter, by timm's name.
        crop_pct: Share of the resized image that the centre crop keeps.
        patch: (height, width) of a patch; sides of native images are multiples of it.
        dynamic: Whether the model was built to take other sizes.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    patch: tuple[int, int]
    dynamic: bool = False

    def __post_init__(self) -> None:
        """Check what came from a config.

        Raises:
            ModelError: Pixels cannot be brought to that.
        """
        channels = len(self.mean) == len(self.std) == 3
        finite = all(map(math.isfinite, (*self.mean, *self.std, self.crop_pct)))
        known = self.interpolation.upper() in Image.Resampling.__members__
        if not (channels and finite and known and all(self.std) and self.crop_pct > 0):
            raise ModelError(
                f"the model's config has mean {self.mean}, std {self.std}, crop_pct "
                f"{self.crop_pct:g}, interpolation {self.interpolation!r}; expected numbers for "
                "three channels, std not 0, and one of Pillow's filters"
            )


def preprocessing_of(module: nn.Module, img_size: tuple[int, int] | None = None) -> Preprocessing:
    """Read what a model expects of its images from its pretrained config."""
    config = timm.data.resolve_model_data_config(module)
    embed = patch_embedding(module)
    # What the model was built for has the last word: a config may speak of its ancestor.
    size = img_size or getattr(embed, "img_size", None) or tuple(config["input_size"][1:])
    try:
        mean, std = (_of_colors(config[key], input_channels(module)) for key in ("mean", "std"))
        crop_pct = float(config["crop_pct"])
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"the model's config has no numbers where some are due: {error}"
        ) from error
    return Preprocessing(
        size=(int(size[0]), int(size[1])),
        mean=mean,
        std=std,
        interpolation=str(config["interpolation"]),
        crop_pct=crop_pct,
        patch=patch_size(module),
        dynamic=bool(getattr(module, "dynamic_img_size", False)),
    )


def normalised_by(
    preprocessing: Preprocessing,
    mean: Normalisation | None,
    std: Normalisation | None,
) -> Preprocessing:
    """Return it with a user's own normalisation, where one is given.

    Args:
        preprocessing: Of the model.
        mean: One number a channel, or one for all; None: the model's own.
        std: The same.

    Raises:
        OptionError: These are no such numbers.
    """
    means = preprocessing.mean if mean is None else _channels("--mean", mean, preprocessing, 0)
    stds = preprocessing.std if std is None else _channels("--std", std, preprocessing, 1e-12)
    return replace(preprocessing, mean=means, std=stds)


def _channels(
    option: str, given: Normalisation, preprocessing: Preprocessing, low: float
) -> tuple[float, ...]:
    channels = len(preprocessing.mean)
    words = given.split(",") if isinstance(given, str) else given
    try:
        values = [float(each) for each in (words if isinstance(words, Iterable) else [words])]
    except (TypeError, ValueError):
        values = []
    if len(values) not in (1, channels) or not all(low <= each <= 1 for each in values):
        raise OptionError(
            f"{option} is {given!r}; give one number, or {channels} with commas between them, for "
            f"pixels in [0, 1]: {'above 0' if low else 'from 0'} to 1 (divide those for 0 … 255 "
            "by 255)"
        )
    return tuple(values * channels if len(values) == 1 else values)


def _of_colors(numbers: Iterable[float], channels: int) -> tuple[float, ...]:
    """Give red, green and blue a number each, the same one where a model sees them as grey."""
    given = tuple(map(float, numbers))
    if len(given) == 1 or (channels == 1 and len(given) == 3):
        return (math.fsum(given) / len(given),) * 3
    return given
