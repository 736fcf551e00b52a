"""Tiny seeded timm models, one for each kind of token layout, whose attention tells blocks apart.

Layout, grid and readout of each are written down by hand: they are what the package must find.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

import oracles
from vitviz.models.twofold import TwofoldVisionTransformer

_SIZE: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 7}


@dataclass(frozen=True, kw_only=True)
class TinyCase:
    """A tiny model and what is true of it.

    Attributes:
        name: OutputKind of token layout.
        architecture: Makes the model, with weights yet to be drawn.
        readout: w (N) for a number of tokens N.
        prefix_tokens: Tokens before the patch tokens.
        grid: (rows, cols) of the patch tokens.
        blocks: Number of transformer blocks.
        seed: Of the weights and the images.
        classes: Two class indices to explain.
        missing: What the timm at hand lacks to build it; tests of it are skipped then.
    """

    name: str
    architecture: Callable[[], nn.Module]
    readout: Callable[[int], oracles.Array]
    prefix_tokens: int
    grid: tuple[int, int] = (4, 4)
    blocks: int = 4
    seed: int
    classes: tuple[int, int] = (2, 5)
    missing: str | None = None

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + math.prod(self.grid)

    def build(self) -> nn.Module:
        """Build the model in evaluation mode; the same weights each time, attention fused."""
        if self.missing:
            pytest.skip(f"timm {timm.__version__} has no {self.missing}")
        model = self.architecture()
        _spread(model, self.seed)
        for block in model.blocks:
            block.attn.fused_attn = True  # whatever TIMM_FUSED_ATTN says
        return model.eval()

    def images(self, count: int = 3) -> Tensor:
        """Draw (count, 3, height, width) different images, each of another strength.

        The first ones do not depend on count.
        """
        generator = torch.Generator().manual_seed(1000 + self.seed)
        rows, cols = self.grid
        images = [
            (0.7 + 0.4 * index) * torch.randn(3, 8 * rows, 8 * cols, generator=generator)
            for index in range(count)
        ]
        return torch.stack(images)

    def __str__(self) -> str:
        return self.name


def _spread(model: nn.Module, seed: int) -> None:
    """Draw weights under which attention is far from uniform and blocks are far from equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            leaf = name.rpartition(".")[2]
            if leaf.startswith("gamma") or (leaf == "weight" and parameter.dim() == 1):
                drawn = 1 + 0.4 * noise
            elif leaf == "relative_position_bias_table":
                drawn = 1.5 * noise
            elif leaf.endswith("token") or leaf == "pos_embed":
                drawn = noise
            elif parameter.dim() == 1:
                drawn = 0.4 * noise
            elif any(part in name for part in ("qkv", "q_proj", "k_proj")):
                drawn = 0.2 * noise
            else:
                drawn = noise / math.sqrt(parameter[0].numel())
            if name.startswith("head"):
                # Strong gradients: fused attention has to matter beside the identity.
                drawn = 8 * drawn
            parameter.copy_(drawn)


CASES = (
    TinyCase(
        name="class-token",
        seed=4,
        architecture=partial(VisionTransformer, img_size=32, depth=4, **_SIZE),
        readout=oracles.class_token,
        prefix_tokens=1,
    ),
    TinyCase(
        name="distilled",
        seed=13,
        architecture=partial(VisionTransformerDistilled, img_size=32, depth=4, **_SIZE),
        readout=oracles.class_and_distillation,
        prefix_tokens=2,
    ),
    TinyCase(
        name="registers",
        seed=29,
        architecture=partial(VisionTransformer, img_size=32, depth=4, reg_tokens=4, **_SIZE),
        readout=oracles.class_token,
        prefix_tokens=5,
    ),
    TinyCase(
        name="average-without-prefix",
        seed=33,
        architecture=partial(
            VisionTransformer,
            img_size=40,
            depth=3,
            class_token=False,
            global_pool="avg",
            **_SIZE,
        ),
        readout=oracles.all_tokens,
        prefix_tokens=0,
        grid=(5, 5),
        blocks=3,
    ),
    TinyCase(
        name="average-beside-class-token",
        seed=40,
        architecture=partial(VisionTransformer, img_size=32, depth=4, global_pool="avg", **_SIZE),
        readout=oracles.patches_after(1),
        prefix_tokens=1,
    ),
    TinyCase(
        name="average-beside-registers",
        seed=51,
        architecture=partial(
            VisionTransformer,
            img_size=32,
            depth=4,
            class_token=False,
            reg_tokens=4,
            global_pool="avg",
            **_SIZE,
        ),
        readout=oracles.patches_after(4),
        prefix_tokens=4,
    ),
    TinyCase(
        name="average-with-class-token",
        seed=61,
        architecture=partial(
            VisionTransformer,
            img_size=32,
            depth=3,
            global_pool="avg",
            pool_include_prefix=True,
            **_SIZE,
        ),
        readout=oracles.all_tokens,
        prefix_tokens=1,
        blocks=3,
    ),
    TinyCase(
        name="relative-position",
        seed=70,
        architecture=partial(
            VisionTransformerRelPos, img_size=32, depth=4, rel_pos_type="bias", **_SIZE
        ),
        readout=oracles.all_tokens,
        prefix_tokens=0,
    ),
    TinyCase(
        name="beit",
        seed=82,
        architecture=partial(
            Beit,
            img_size=32,
            depth=4,
            use_abs_pos_emb=False,
            use_rel_pos_bias=True,
            init_values=0.1,
            **_SIZE,
        ),
        readout=oracles.patches_after(1),
        prefix_tokens=1,
    ),
    TinyCase(
        name="rope",
        seed=90,
        architecture=partial(
            Eva, img_size=32, depth=4, use_rot_pos_emb=True, global_pool="token", **_SIZE
        ),
        readout=oracles.class_token,
        prefix_tokens=1,
    ),
    TinyCase(
        name="grouped-query",
        seed=100,
        architecture=partial(
            Eva,
            img_size=(32, 24),
            depth=3,
            use_rot_pos_emb=True,
            num_reg_tokens=2,
            global_pool="avg",
            attn_type="rope",
            qkv_fused=False,
            num_kv_heads=1,
            **_SIZE,
        ),
        readout=oracles.patches_after(3),
        prefix_tokens=3,
        grid=(4, 3),
        blocks=3,
        missing=None if "num_kv_heads" in signature(Eva).parameters else "Eva with grouped queries",
    ),
    TinyCase(
        name="rectangular",
        seed=181,
        architecture=partial(VisionTransformer, img_size=(32, 48), depth=4, **_SIZE),
        readout=oracles.class_token,
        prefix_tokens=1,
        grid=(4, 6),
    ),
    TinyCase(
        name="class-beside-average",
        seed=200,
        architecture=partial(TwofoldVisionTransformer, img_size=32, depth=4, reg_tokens=2, **_SIZE),
        readout=oracles.class_beside_patches_after(3),
        prefix_tokens=3,
    ),
)

# Too many tokens to hold all heads of all images, or all rows of one image, at once.
LARGE_CASES = (
    TinyCase(
        name="many-images",
        seed=256,
        architecture=partial(VisionTransformer, img_size=(160, 152), depth=2, **_SIZE),
        readout=oracles.class_token,
        prefix_tokens=1,
        grid=(20, 19),
        blocks=2,
    ),
    TinyCase(
        name="many-rows",
        seed=220,
        architecture=partial(
            VisionTransformer, img_size=(192, 208), depth=2, global_pool="avg", **_SIZE
        ),
        readout=oracles.patches_after(1),
        prefix_tokens=1,
        grid=(24, 26),
        blocks=2,
    ),
)
