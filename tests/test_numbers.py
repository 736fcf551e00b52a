"""Numbers that are none, or say nothing, never become a picture in silence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import vitviz
from fixtures_io import CLASSES, picture, save_pictures, tiny_model, tiny_module
from vitviz.errors import ImageError, UnsupportedModelError, WeightsError
from vitviz.images.sources import find_sources
from vitviz.methods.method import Method
from vitviz.methods.rollout import GradRollout, Rollout
from vitviz.models.model import Model, load_model
from vitviz.options import OutputKind, PictureOptions
from vitviz.runs.job import Job
from vitviz.runs.pipeline import run
from vitviz.runs.records import Result

pytestmark = pytest.mark.usefixtures("one_thread")

GRADIENT = GradRollout()
METHODS = pytest.mark.parametrize("method", [Rollout(), GRADIENT], ids=["rollout", "grad-rollout"])
SILENT = 2  # the class whose logit does not depend on the image


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "p", ["0.png", "1.png", "2.png"])
    return tmp_path


def explained(model: Model, method: Method, **options: Any) -> tuple[list[Result], list[str]]:
    """Run over the pictures; return the results and what was said."""
    said: list[str] = []
    job = Job(method=method, workers=1, **options)
    return list(run(model, find_sources(["p"])[0], job, warn=said.append)), said


def without_a_say(*, classes: tuple[int, ...] = (SILENT,), **arguments: Any) -> Model:
    """Build a model some of whose logits are constants."""
    module: Any = tiny_module(**arguments)
    with torch.no_grad():
        module.head.weight[list(classes)] = 0
    return load_model(module, device="cpu")


def large(factor: float) -> nn.Module:
    """Build a model whose values grow by a factor in each block."""
    module: Any = tiny_module()
    with torch.no_grad():
        for block in module.blocks:
            block.mlp.fc2.weight *= factor
    return module


@contextmanager
def masked(module: nn.Module, row: int) -> Iterator[None]:
    """Mask one row of attention from everything."""
    mask = torch.ones(17, 17, dtype=torch.bool)
    mask[row] = False
    attend = F.scaled_dot_product_attention

    def hook(block: Any, inputs: object, keywords: dict[str, Any]) -> tuple[object, dict[str, Any]]:
        return inputs, {**keywords, "attn_mask": mask}

    handles = [
        block.register_forward_pre_hook(hook, with_kwargs=True)
        for block in module.blocks  # type: ignore[union-attr]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        assert F.scaled_dot_product_attention is attend


# Numbers that are none


@METHODS
def test_overflow_in_half_precision_fails_each_image_with_the_reason(
    here: Path, method: Method
) -> None:
    model = load_model(large(1e5), device="cpu", precision="fp16")
    results, _ = explained(model, method)
    assert [result.status for result in results] == ["failed"] * 3
    for result in results:
        assert "not finite" in str(result.error)
        assert "--precision" in str(result.error)
    assert not list(Path("vitviz-out").rglob("*.png"))


def test_weights_that_overflow_in_half_precision_are_refused_and_named() -> None:
    module: Any = tiny_module()
    with torch.no_grad():
        module.blocks[3].mlp.fc1.weight[0, 0] = 1e5
    assert load_model(module, device="cpu").dtype is torch.float32
    with pytest.raises(WeightsError, match=r"blocks\.3\.mlp\.fc1\.weight .* fp16.*--precision"):
        load_model(module, device="cpu", precision="fp16")


@pytest.mark.slow
def test_embedding_that_overflows_in_half_precision_is_not_called_an_unknown_readout() -> None:
    module: Any = tiny_module()
    with torch.no_grad():
        module.patch_embed.proj.weight *= 6e4 / module.patch_embed.proj.weight.abs().max()
        module.norm.weight.fill_(6e4)
    with pytest.raises(UnsupportedModelError, match="not finite as torch.float16.*--precision"):
        load_model(module, device="cpu", precision="fp16")


@METHODS
@pytest.mark.parametrize("row", [0, 5], ids=["class token", "patch token"])
def test_row_that_is_masked_throughout_fails_the_image(
    here: Path, method: Method, row: int
) -> None:
    model = tiny_model()
    with masked(model.module, row):
        results, _ = explained(model, method)
    for result in results:
        assert result.status == "failed"
        assert "not finite" in str(result.error)
        assert "masked" in str(result.error)


def test_numbers_that_are_not_finite_reach_python_as_an_error() -> None:
    model = tiny_model()
    with masked(model.module, 0), pytest.raises(ImageError, match="not finite"):
        vitviz.rollout(model, [picture(30, 40)])


# Numbers that say nothing


def test_class_without_a_say_is_told_of_once_and_shows_no_heat(here: Path) -> None:
    method = GradRollout(classes=(str(SILENT), "1"))
    pictures = PictureOptions(kinds=(OutputKind.NPY, OutputKind.HEATMAP))
    results, said = explained(without_a_say(), method, pictures=pictures, batch_size=2)
    assert [result.status for result in results] == ["written"] * 3
    (warning,) = said
    assert "no heat at all in 3 maps," in warning
    assert str(Path("p/0.png")) in warning
    for result in results:
        by_class = {output.class_index: [] for output in result.outputs}
        for output in result.outputs:
            by_class[output.class_index].append(output.path)
        flat, heatmap = by_class[SILENT]
        assert np.ptp(np.load(flat)) == 0
        assert np.ptp(np.asarray(Image.open(heatmap)), axis=(0, 1)).max() == 0
        assert np.ptp(np.load(by_class[1][0])) > 0


def test_average_of_tokens_without_a_say_is_told_of_too() -> None:
    model = without_a_say(global_pool="avg", class_token=False)
    with pytest.warns(UserWarning, match="no heat at all in 1 map,"):
        (explanation,) = vitviz.grad_rollout(model, [picture(30, 40)], classes=SILENT)
    assert explanation.relevance.min() > 0
    assert np.ptp(explanation.relevance) == 0


def test_uniform_attention_is_told_of_in_rollout(here: Path) -> None:
    module: Any = tiny_module()
    with torch.no_grad():
        for block in module.blocks:
            block.attn.qkv.weight[:128] = 0
            block.attn.qkv.bias[:128] = 0
    results, said = explained(load_model(module, device="cpu"), Rollout(discard=0.0))
    assert [result.status for result in results] == ["written"] * 3
    (warning,) = said
    assert "no heat at all in 3 maps," in warning
    assert "attention is the same everywhere" in warning


@METHODS
def test_maps_with_heat_are_not_spoken_of(here: Path, method: Method) -> None:
    _, said = explained(tiny_model(), method)
    assert not said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vitviz.grad_rollout(tiny_model(), [picture(30, 40)], classes=range(CLASSES))
