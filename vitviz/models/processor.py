"""What transformers' image processors do to pixels, as timm's configs say it; opens no files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from vitviz.errors import ModelError, first_line
from vitviz.models.plans import LARGEST_SIDE, Plan, sides

__all__ = ["PROCESSOR_FILE", "data_config"]


PROCESSOR_FILE = "preprocessor_config.json"
_ODD = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def data_config(processor: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Say in timm's words what an image processor makes of images.

    Args:
        processor: As in a preprocessor_config.json; empty where there is none.
        plan: Of the model.

    Raises:
        ModelError: It asks for what is no such thing.
    """
    try:
        size, crop_pct = _size(processor, plan)
        mean, std = _normalisation(processor, plan)
        resample = Image.Resampling(processor.get("resample", plan.default_filter))
        _require_sense(size, crop_pct, mean, std, plan)
    except _ODD as error:
        raise ModelError(
            f"{PROCESSOR_FILE} is none that vitviz can follow ({first_line(error)}); give the "
            "image size with --img-size and pixels with --mean and --std, and put the file aside"
        ) from error
    return {
        "input_size": (plan.arguments["in_chans"], *size),
        "mean": mean,
        "std": std,
        "interpolation": resample.name.lower(),
        "crop_pct": crop_pct,
    }


def _require_sense(
    size: tuple[int, int],
    crop_pct: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    plan: Plan,
) -> None:
    patch = plan.arguments["patch_size"]
    if not all(own <= side <= LARGEST_SIDE for side, own in zip(size, patch, strict=True)):
        raise ValueError(f"an image of {size[0]}×{size[1]} for patches of {patch[0]}×{patch[1]}")
    finite = all(map(math.isfinite, (*mean, *std)))
    if not (finite and len(mean) == len(std) in (1, 3) and min(std) > 0 and crop_pct > 0):
        raise ValueError(f"mean {mean}, deviation {std}, crop of {crop_pct:g}")


def _size(processor: Mapping[str, Any], plan: Plan) -> tuple[tuple[int, int], float]:
    """Return the (height, width) that the model gets, and the share of the side that is kept."""
    resized = processor.get("size") if processor.get("do_resize", True) else None
    if processor.get("do_center_crop") and processor.get("crop_size"):
        size = _sides(processor["crop_size"])
        shortest = min(size) if resized is None else min(_sides(resized))
        return size, min(size) / shortest if size[0] == size[1] else 1.0
    if resized is None or set(_named(resized)) != {"height", "width"}:
        return plan.image_size, 1.0
    return _sides(resized), 1.0


def _named(size: Any) -> Mapping[str, int]:
    """Name the sides of a size, which early versions wrote as one number or two."""
    if isinstance(size, Mapping):
        return size
    rows, cols = sides(size)
    return {"height": rows, "width": cols}


def _sides(size: Any) -> tuple[int, int]:
    named = _named(size)
    edge = named.get("shortest_edge")
    return sides(edge if edge else (named["height"], named["width"]))


def _normalisation(
    processor: Mapping[str, Any], plan: Plan
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation for pixels in [0, 1]."""
    mean, std = plan.assumed
    if processor.get("do_normalize", True):
        mean, std = processor.get("image_mean") or mean, processor.get("image_std") or std
    else:
        mean, std = (0.0,) * 3, (1.0,) * 3
    # They speak of pixels from 0 to 255 times a factor, if any.
    white = 255 * float(processor.get("rescale_factor", 1 / 255))
    if not processor.get("do_rescale", True):
        white = 255.0
    return tuple(float(each) / white for each in mean), tuple(float(each) / white for each in std)
