"""The model that is measured with, and the plain passes through it that all is compared with.

Its weights are random: what is measured takes as long with them as with trained ones.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.bench.figures import Setting

__all__ = ["NAME", "backward", "build", "forward", "images_for", "weights"]

NAME = "deit_tiny_patch16_224"


def build(name: str = NAME, *, img_size: int = 224, device: str = "cpu") -> nn.Module:
    """Build a model with weights that are random, and always the same."""
    torch.manual_seed(0)
    module: nn.Module = timm.create_model(name, pretrained=False, img_size=img_size)
    return module.eval().to(device)


def images_for(batch: int, *, img_size: int = 224, device: str = "cpu") -> Tensor:
    """Return a batch (batch, 3, img_size, img_size) of noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, img_size, img_size, generator=generator).to(device)


def forward(module: nn.Module, images: Tensor) -> None:
    """Run the plain model, attention fused."""
    with torch.inference_mode():
        module(images)


def backward(module: nn.Module, images: Tensor) -> None:
    """Run the plain model and take the gradient of the best logits with respect to the images.

    The parameters are to be frozen, so that they cost nothing.
    """
    images = images.clone().requires_grad_()
    best = module(images).amax(dim=1).sum()
    torch.autograd.grad(best, images)


def weights(setting: Setting) -> Path:
    """Return a checkpoint of the model; make it if it is not there."""
    path = setting.folder / "weights.safetensors"
    if not path.exists():
        save_file(build().state_dict(), path)
    return path
