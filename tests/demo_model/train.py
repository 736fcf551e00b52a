"""Training of the demo model, from nothing to the weights file, on two cores in half an hour.

Run it with `python -m tests.demo_model.train --output FILE --seed N`. On one machine the same seed
gives the same file.
"""

import argparse
import math
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vitviz
from tests.demo_model import CLASSES
from tests.demo_model.evaluate import measure
from tests.demo_model.muon import Muon
from tests.demo_model.scenes import SceneStyle, as_input, paint_scene
from vitviz.models.model import load_model

__all__ = ["CURRICULUM", "Examples", "Round", "as_tensor", "batches", "paint", "painters", "train"]

_HOME = Path(vitviz.__file__).parent / "demo"
_BATCH = 32
_PEAK_RATES = (4e-3, 1e-3)  # of Muon and of AdamW
_WARMUP = 150  # steps
_EMA_DECAY = 0.998
_REPORTED = 60  # held-out scenes behind the figures after each round
_TOKEN_WEIGHT = 0.5  # of the token labels beside the classes (Jiang et al. 2021, LV-ViT)
_PATCH = 8
_OVERSIZE = 2  # scenes are painted larger and resized, as pictures from a file are


@dataclass(frozen=True, kw_only=True)
class Round:
    """One stretch of training on scenes painted for it.

    Attributes:
        size: Side of the input in pixels.
        scenes: Number of scenes.
        passes: How often each scene is seen, mirrored and coloured differently every time.
        style: What the scenes contain.
        rates: Learning rate at the start and the end of the round, as shares of the peak.
    """

    size: int
    scenes: int
    passes: int
    style: SceneStyle
    rates: tuple[float, float] = (1.0, 1.0)

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.passes * (self.scenes // _BATCH)


def _pairs(clutter: float) -> SceneStyle:
    """Return a style for 64 pixels, where an object is as many pixels wide as later at 96."""
    return SceneStyle(max_objects=2, radius=(0.235, 0.35), clutter=clutter)


CURRICULUM = (
    Round(size=64, scenes=8_000, passes=5, style=_pairs(clutter=0.6)),
    Round(size=64, scenes=8_000, passes=4, style=_pairs(clutter=1.0)),
    Round(size=96, scenes=6_000, passes=4, style=SceneStyle(), rates=(1.0, 0.0)),
)
"""Small simple scenes first: there a step costs a third, and shapes are found sooner."""


class Examples(NamedTuple):
    """Scenes to learn from.

    Attributes:
        images: RGB pixels (batch, size, size, 3), uint8.
        labels: Multi-hot classes (batch, classes).
        cells: Class index + 1 that each patch shows, or 0, (batch, rows, cols).
    """

    images: Tensor
    labels: Tensor
    cells: Tensor


def train(seed: int, curriculum: tuple[Round, ...] = CURRICULUM) -> VisionTransformer:
    """Train the demo model.

    Args:
        seed: Seed of everything random; scenes come from the stream `seed + 1`.
        curriculum: The rounds, in order.

    Returns:
        The averaged model of the last steps, in evaluation mode.
    """
    torch.manual_seed(seed)
    learner = _Learner()
    with _progress() as progress, painters() as pool:
        task = progress.add_task("Training", total=sum(s.steps for s in curriculum), loss=math.nan)
        first = 0
        for stage in curriculum:
            progress.update(task, description="Painting")
            scenes = paint(pool, stage, stream=seed + 1, first=first)
            first += stage.scenes
            progress.update(task, description="Training")
            for step, batch in enumerate(batches(scenes, stage.passes)):
                start, end = stage.rates
                rate = start + (end - start) * step / stage.steps
                progress.update(task, advance=1, loss=learner.learn(batch, rate))
            progress.console.print(_report(learner.averaged()))
    return learner.averaged()


class _Learner:
    """A model in training, its optimisers, and the running average of its weights."""

    def __init__(self) -> None:
        model = timm.create_model(f"local-dir:{_HOME}", dynamic_img_size=True, weight_init="jax")
        assert isinstance(model, VisionTransformer)
        _start_positions(model)
        self._model = model
        ema = get_ema_multi_avg_fn(_EMA_DECAY)  # type: ignore[no-untyped-call]  # torch's gap
        self._average = AveragedModel(model, multi_avg_fn=ema)
        self._token_head = nn.Linear(model.num_features, len(CLASSES) + 1)
        self._optimizers = _optimizers(model, self._token_head)
        self._steps = 0

    def learn(self, batch: Examples, rate: float) -> float:
        """Take one step.

        Args:
            batch: What to learn from.
            rate: Learning rate as a share of the peak, in [0, 1]. The token labels fade with it,
                so that the last steps answer for the class token alone.

        Returns:
            The mean binary cross-entropy of the classes, before the step.
        """
        tokens = _tokens(self._model, as_tensor(batch.images))
        class_loss = binary_cross_entropy_with_logits(
            self._model.forward_head(tokens), batch.labels
        )
        token_logits = self._token_head(tokens[:, 1:])
        token_loss = cross_entropy(token_logits.flatten(0, 1), batch.cells.flatten())
        loss = class_loss + _TOKEN_WEIGHT * rate * token_loss
        self._model.zero_grad()
        self._token_head.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._steps += 1
        for optimizer, peak in zip(self._optimizers, _PEAK_RATES, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate * min(1, self._steps / _WARMUP)
            optimizer.step()
        self._average.update_parameters(self._model)
        return class_loss.item()

    def averaged(self) -> VisionTransformer:
        """Return the averaged model, in evaluation mode."""
        model = self._average.module
        assert isinstance(model, VisionTransformer)
        return model.eval()


def as_tensor(images: Tensor) -> Tensor:
    """Turn uint8 RGB images (batch, height, width, 3) into model input, channels first."""
    return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def _start_positions(model: VisionTransformer) -> None:
    """Start the learned position embedding from waves, so that it knows near from far."""
    waves = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), dim=model.num_features)
    assert model.pos_embed is not None
    model.pos_embed.data[0, 1:] = waves


def _tokens(model: VisionTransformer, pixels: Tensor) -> Tensor:
    """Run the blocks on images of any size, each a random window of the full position grid.

    A resampled grid would not do: it changes how far apart two neighbours are.
    """
    assert model.pos_embed is not None
    assert model.cls_token is not None
    patches = model.patch_embed(pixels)
    rows, cols = patches.shape[1:3]
    grid = model.pos_embed[0, 1:].view(*model.patch_embed.grid_size, -1)
    top = int(torch.randint(grid.shape[0] - rows + 1, ()))
    left = int(torch.randint(grid.shape[1] - cols + 1, ()))
    placed = (patches + grid[top : top + rows, left : left + cols]).flatten(1, 2)
    start = (model.cls_token + model.pos_embed[:, :1]).expand(len(pixels), -1, -1)
    tokens: Tensor = model.norm(model.blocks(model.norm_pre(torch.cat([start, placed], dim=1))))
    return tokens


def _optimizers(model: VisionTransformer, token_head: nn.Linear) -> tuple[Optimizer, Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for all else; `learn` sets their rates."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    chosen = {id(matrix) for matrix in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    others += token_head.parameters()
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0)
    return Muon(matrices), adam


def painters() -> ProcessPoolExecutor:
    """Return processes that paint scenes side by side."""
    # Spawned, not forked: a fork of a process whose torch threads run may hang.
    return ProcessPoolExecutor(mp_context=get_context("spawn"))


def paint(pool: Executor, stage: Round, *, stream: int, first: int) -> Examples:
    """Paint a round's scenes."""
    seeds = range(first, first + stage.scenes)
    one = partial(_example, size=stage.size, style=stage.style, stream=stream)
    columns = zip(*pool.map(one, seeds, chunksize=64), strict=True)
    return Examples(*(torch.from_numpy(np.stack(column)) for column in columns))


def _example(
    seed: int, *, size: int, style: SceneStyle, stream: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    scene = paint_scene(seed, size=_OVERSIZE * size, style=style, stream=stream)
    return as_input(scene.image, size), scene.labels, _cells(scene.mask, size // _PATCH)


def _cells(mask: NDArray[np.uint8], side: int) -> NDArray[np.int64]:
    """Return each cell's class index + 1 (side, side), 0 if no object fills a fifth of it."""
    pieces = mask.reshape(side, len(mask) // side, side, -1)
    shares = np.stack([(pieces == index + 1).mean(axis=(1, 3)) for index in range(len(CLASSES))])
    return np.where(shares.max(axis=0) >= 0.2, shares.argmax(axis=0) + 1, 0)


def batches(scenes: Examples, passes: int) -> Iterator[Examples]:
    """Yield scenes in random order, varied anew each time, as often as there are passes."""
    for _ in range(passes):
        order = torch.randperm(len(scenes.images))
        for chosen in order[: len(order) // _BATCH * _BATCH].reshape(-1, _BATCH):
            yield _varied(Examples(*(column[chosen] for column in scenes)))


def _varied(batch: Examples) -> Examples:
    """Mirror and swap the colours of each image at random."""
    count = len(batch.images)
    mirrored = torch.rand(count, 1, 1) < 0.5
    images = torch.where(mirrored[..., None], batch.images.flip(2), batch.images)
    cells = torch.where(mirrored, batch.cells.flip(2), batch.cells)
    channels = torch.rand(count, 3).argsort(dim=1)
    images = images.gather(3, channels[:, None, None].expand_as(images))
    return Examples(images, batch.labels, cells)


def _progress() -> Progress:
    columns = ("{task.description}", BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    loss = TextColumn("loss {task.fields[loss]:.3f}")
    return Progress(*columns, loss, console=Console(stderr=True))


def _report(model: VisionTransformer) -> str:
    """Return the figures so far, on a few held-out scenes."""
    figures = measure(
        replace(load_model(model), multi_label=True),
        [paint_scene(seed) for seed in range(_REPORTED)],
    )
    return f"exact {figures.exact:.0%}, asked {figures.asked:.0%}, other {figures.other:.0%}"


def main() -> None:
    """Train and write the weights in half precision."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = train(options.seed)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, options.output)


if __name__ == "__main__":
    main()
