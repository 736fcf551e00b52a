"""The head that reads the class token beside the average of the patches, and what is taken for it.

Its maps are compared with the formulas where those of all other layouts are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitviz.errors import UnsupportedModelError
from vitviz.models.model import load_model
from vitviz.models.tokens import Readout
from vitviz.models.twofold import TwofoldVisionTransformer

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "reg_tokens": 2,
    "num_classes": 7,
}


class ReadsRegisters(TwofoldVisionTransformer):
    """Averages its registers, too."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1)


class Uneven(TwofoldVisionTransformer):
    """Reads the first patches more than the last."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        patches = x[:, self.num_prefix_tokens :]
        weights = torch.linspace(2, 1, patches.shape[1], device=x.device)
        return torch.cat([x[:, 0], (weights[:, None] * patches).mean(dim=1)], dim=1)


class Forgets(TwofoldVisionTransformer):
    """Has no use for the class token."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        patches = x[:, self.num_prefix_tokens :].mean(dim=1)
        return torch.cat([patches, patches], dim=1)


def test_half_of_the_weight_is_the_class_tokens() -> None:
    torch.manual_seed(0)
    layout = load_model(TwofoldVisionTransformer(**SIZES).eval(), device="cpu").layout
    assert layout.readout is Readout.CLASS_BESIDE_AVERAGE
    assert layout.readout_weights(19).tolist() == [0.5, 0, 0, *[0.5 / 16] * 16]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ReadsRegisters, r"\(17 of 19 tokens\), but its output depends on 19 of 19"),
        (Forgets, r"\(17 of 19 tokens\), but its output depends on 16 of 19"),
        (Uneven, "changes with the order of its tokens"),
    ],
)
def test_head_that_reads_otherwise_is_refused(
    kind: type[TwofoldVisionTransformer], reason: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_model(kind(**SIZES).eval(), device="cpu")
