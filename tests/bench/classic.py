"""Attention rollout as people have done it since 2020: hooks, whole maps, one image at a time.

Written anew, and right where the script that everybody copies is not: rows are divided by their
own sums, and fused attention is off so that the hooks see something. It knows nothing of vitviz.
As a program, it explains one image: ``python classic.py IMAGE WEIGHTS OUTPUT``.
"""

from __future__ import annotations

import sys

import cv2
import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

__all__ = ["ClassicRollout", "explain_file"]

_MODEL = "deit_tiny_patch16_224"
_SIDE = 224
_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


class ClassicRollout:
    """Rollout with max fusion from hooks on every block's attention dropout."""

    def __init__(self, module: nn.Module, *, discard: float = 0.9) -> None:
        """Put the hooks on a model, which stay there.

        Args:
            module: A square timm ViT with one class token; its fused attention is switched off.
            discard: Share of the lowest fused attention set to zero.
        """
        self._module = module
        self._discard = discard
        self._attentions: list[Tensor] = []
        for name, child in module.named_modules():
            if hasattr(child, "fused_attn"):
                child.fused_attn = False
            if name.endswith("attn_drop"):
                child.register_forward_hook(self._keep)

    def __call__(self, image: Tensor) -> NDArray[np.float32]:
        """Return the mask (rows, cols), at most 1, of one image (1, 3, height, width)."""
        self._attentions.clear()
        with torch.no_grad():
            self._module(image)
            return self._mask()

    def _keep(self, module: nn.Module, inputs: object, attention: Tensor) -> None:
        self._attentions.append(attention.cpu())

    def _mask(self) -> NDArray[np.float32]:
        tokens = self._attentions[0].shape[-1]
        result = identity = torch.eye(tokens)
        for attention in self._attentions:
            fused = attention.max(dim=1).values
            flat = fused.view(1, -1)
            lowest = flat.topk(int(flat.shape[-1] * self._discard), dim=-1, largest=False).indices
            flat[0, lowest[lowest != 0]] = 0  # what the class token gives itself stays
            mixed = (fused + identity) / 2
            result = mixed / mixed.sum(dim=-1, keepdim=True) @ result
        side = int((tokens - 1) ** 0.5)
        mask = result[0, 0, 1:].reshape(side, side).numpy()
        return np.asarray(mask / mask.max(), dtype=np.float32)


def explain_file(image: str, weights: str, output: str) -> None:
    """Write one image's overlay.

    Args:
        image: A photograph.
        weights: A checkpoint of deit_tiny.
        output: Where the PNG goes.
    """
    module = timm.create_model(_MODEL, pretrained=False, checkpoint_path=weights).eval()
    resized = np.asarray(Image.open(image).convert("RGB").resize((_SIDE, _SIDE)), dtype=np.float32)
    rgb = resized / np.float32(255)
    tensor = torch.from_numpy((rgb - _MEAN) / _STD).permute(2, 0, 1).unsqueeze(0)
    mask = ClassicRollout(module)(tensor)
    cv2.imwrite(output, _overlay(rgb[:, :, ::-1], mask))


def _overlay(bgr: NDArray[np.float32], mask: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Add the heat to an image (height, width, 3) in [0, 1], divided by its own maximum."""
    large = cv2.resize(mask, (bgr.shape[1], bgr.shape[0]))
    heat = cv2.applyColorMap(np.uint8(255 * large), cv2.COLORMAP_JET).astype(np.float32) / 255
    both = heat + bgr
    return np.asarray(255 * both / both.max(), dtype=np.uint8)


if __name__ == "__main__":
    explain_file(*sys.argv[1:])
