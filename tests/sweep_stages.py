"""A small member of every family of timm that is no plain ViT: evidence proved, or a reason.

It takes minutes, so it is not collected by itself: ``make zoo``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import timm
import torch
from timm.models import _registry
from torch import nn

import vitviz
from vitviz.errors import UnsupportedModelError
from vitviz.models.building import build_skeleton
from vitviz.models.model import load_model
from vitviz.models.preprocessing import preprocessing_of
from vitviz.models.stages import StageLayout
from vitviz.models.structure import has_classifier
from vitviz.models.tokens import read_layout

FAMILIES = sorted({_registry._model_to_module[name] for name in timm.list_models()})
EXPECTED = {"1.0.31": 54}
"""Families of a version of timm whose small member is proved."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What became of each family."""
    return {}


def _small_members(family: str) -> Iterator[str]:
    """Name a family's models with a head that are no plain ViTs, the smallest first."""
    sizes = {}
    for name in timm.list_models(module=family):
        module = build_skeleton(name)
        try:
            read_layout(module, preprocessing_of(module).size)
        except UnsupportedModelError:
            if has_classifier(module):
                size = preprocessing_of(module).size
                sizes[name] = (max(size), sum(each.numel() for each in module.parameters()))
    yield from sorted(sizes, key=sizes.__getitem__)


def _telling(name: str) -> nn.Module:
    """Build a model whose every part matters, though its weights are drawn."""
    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.abs().max() < 1e-3:  # zeros, and scales of layers that begin small
                parameter.uniform_(0.2, 0.6) if parameter.dim() < 2 else parameter.normal_(std=0.1)
            elif parameter.dim() == 1 and parameter.min() == parameter.max() == 0:
                parameter.normal_(std=0.1)
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_proved_or_refused(family: str, found: dict[str, str]) -> None:
    name = next(_small_members(family), None)
    if name is None:
        found[family] = "plain"
        return
    try:
        model = load_model(_telling(name), device="cpu")
    except UnsupportedModelError as error:
        assert "\n" not in str(error)
        found[family] = f"refused ({name}): {str(error).rpartition('. ')[2]}"
        return
    assert isinstance(model.layout, StageLayout)
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    (made,) = vitviz.evidence(model, [image])
    assert made.relevance.shape == model.layout.grid
    assert np.isfinite(made.relevance).all()
    assert np.ptp(made.relevance) > 0
    rows, cols = model.layout.grid
    found[family] = f"proved ({name}): {model.layout.blocks} stages, {rows} × {cols}"


def test_families_are_as_known(found: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{Counter(text.partition(' ')[0] for text in found.values())}")
        print("\n".join(f"{family}: {text}" for family, text in found.items()))
    if len(found) < len(FAMILIES):
        pytest.skip("only some of the families were asked for")
    proved = sum(text.startswith("proved") for text in found.values())
    assert proved == EXPECTED.get(timm.__version__, proved)
