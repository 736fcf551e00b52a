"""Models of one channel see images in grey; other counts than one and three are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vitviz
from tiny import CASES
from vitviz.errors import UnsupportedModelError
from vitviz.inspection.describe import describe
from vitviz.models.model import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = next(case for case in CASES if case.name == "class-token")


def _model(channels: int) -> nn.Module:
    model = PLAIN.build()
    torch.manual_seed(5)
    model.patch_embed.proj = nn.Conv2d(channels, 48, 8, stride=8)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 32, 32)}
    return model


def _image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_one_channel_is_inspected() -> None:
    summary = describe(_model(1), "grey")
    assert summary.error is None
    assert summary.input_shape[0] == 1


@pytest.mark.parametrize("method", [vitviz.rollout, vitviz.grad_rollout, vitviz.relevance])
def test_one_channel_sees_the_image_in_grey(method: object) -> None:
    grey = _model(1)
    colored = PLAIN.build()
    colored.load_state_dict(
        {**grey.state_dict(), "patch_embed.proj.weight": torch.zeros(48, 3, 8, 8)}
    )
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    colored.patch_embed.proj.weight.data = grey.patch_embed.proj.weight.data * luma
    colored.pretrained_cfg = grey.pretrained_cfg
    found, expected = (
        method(load_model(module, device="cpu"), [_image()])[0] for module in (grey, colored)
    )
    np.testing.assert_allclose(found.relevance, expected.relevance, rtol=1e-3, atol=1e-6)
    assert found.predictions[0].score == pytest.approx(expected.predictions[0].score, abs=1e-4)
    assert found.overlay().mode == "RGB"
    assert np.abs(np.asarray(found.overlay()).astype(int) - expected.overlay()).max() <= 2


def test_one_channel_is_measured_and_refined() -> None:
    model = load_model(_model(1), device="cpu")
    assert vitviz.rollout(model, [_image()], refine=2)[0].relevance.shape == (8, 8)
    measured = vitviz.evaluate(model, [_image()] * 2, methods=["rollout"], resamples=10)
    assert not measured.failed


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_other_counts_are_refused(channels: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{channels} channels.*expected 3.*or 1"):
        load_model(_model(channels), device="cpu")
