"""Photographs to measure with: crops of the sample photographs, each a little different."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tests.bench.figures import Setting

__all__ = ["large_photographs", "many_photographs", "photographs"]

_SAMPLES = Path(__file__).parents[2] / "sample_images" / "photos"
_SHAPES = ((4, 3), (3, 2), (1, 1), (3, 4), (16, 9), (2, 3))  # width : height
_SMALL = 640  # longest side, about
_LARGE = 4000, 3000  # 12 megapixels
_QUALITY = 90


def photographs(setting: Setting) -> Path:
    """Return a folder of photographs of about 640 pixels; make them if they are not there."""
    count = setting.pick(400, 64)
    return _folder(setting.folder / "photographs", count, _small)


def large_photographs(setting: Setting) -> Path:
    """Return a folder of photographs of 12 megapixels; make them if they are not there."""
    return _folder(setting.folder / "large", setting.pick(100, 16), _large)


def many_photographs(setting: Setting) -> Path:
    """Return a folder of many photographs: the small ones by many names, each a hard link."""
    originals = sorted(photographs(setting).iterdir())
    folder = setting.folder / "many"
    if not folder.is_dir():
        folder.mkdir()
        for number in range(setting.pick(2000, 256)):
            _link(originals[number % len(originals)], folder / f"{number:04}.jpg")
    return folder


def _folder(folder: Path, count: int, make: Callable[[int], Image.Image]) -> Path:
    if not folder.is_dir():
        folder.mkdir()
        for number in range(count):
            make(number).save(folder / f"{number:04}.jpg", quality=_QUALITY)
    return folder


def _small(number: int) -> Image.Image:
    rng = np.random.default_rng([1, number])
    width, height = _SHAPES[number % len(_SHAPES)]
    scale = _SMALL * rng.uniform(0.95, 1.05) / max(width, height)
    return _photograph(rng, (round(width * scale), round(height * scale)), noise=3)


def _large(number: int) -> Image.Image:
    # What a crop of few pixels lacks in detail, noise makes up for in the bytes of the JPEG.
    return _photograph(np.random.default_rng([2, number]), _LARGE, noise=5)


def _photograph(rng: np.random.Generator, size: tuple[int, int], noise: float) -> Image.Image:
    """Make a photograph of a (width, height): a crop, maybe mirrored, in other light."""
    samples = sorted(_SAMPLES.glob("*.jpg"))
    with Image.open(samples[rng.integers(len(samples))]) as sample:
        image = sample.convert("RGB")
    share = rng.uniform(0.5, 1) * min(image.width / size[0], image.height / size[1])
    width, height = share * size[0], share * size[1]
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    light = 255 * (np.arange(256) / 255) ** rng.uniform(0.8, 1.25)
    return Image.fromarray(_noisy(rng, light.astype(np.float32)[np.asarray(image)], noise))


def _noisy(
    rng: np.random.Generator, pixels: NDArray[np.float32], noise: float
) -> NDArray[np.uint8]:
    """Add the same grain to all channels (height, width, channels)."""
    grain = rng.standard_normal((*pixels.shape[:2], 1), dtype=np.float32)
    return np.clip(pixels + noise * grain, 0, 255).astype(np.uint8)


def _link(original: Path, name: Path) -> None:
    try:
        os.link(original, name)
    except OSError:  # not every file system has hard links
        shutil.copyfile(original, name)
