"""Evidence of models of several stages: exact against a reference, and only where it is proved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from timm.models import ConvNeXt, MetaFormer, SwinTransformer
from timm.models.metaformer import Pooling
from torch import Tensor, nn

import vitviz
from fixtures_io import Shell
from tests.stage_oracles import spread, stage_evidence
from vitviz.errors import CaptureError, UnsupportedModelError
from vitviz.models import stage_proofs
from vitviz.models.model import Model, load_model
from vitviz.models.stages import Stage, StageCapture, StageLayout, read_stages

SIDE = 128
CLASSES = 3


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=SIDE,
        window_size=4,
        embed_dim=24,
        depths=(2, 2, 2),
        num_heads=(2, 4, 4),
        num_classes=CLASSES,
    )


def convnext() -> nn.Module:
    return ConvNeXt(
        depths=(1, 1, 2, 1), dims=(20, 24, 28, 36), ls_init_value=0.5, num_classes=CLASSES
    )


def pooling_pyramid() -> nn.Module:
    return MetaFormer(
        depths=(1, 1, 2, 1),
        dims=(20, 24, 28, 36),
        token_mixers=Pooling,
        use_mlp_head=False,
        num_classes=CLASSES,
    )


FAMILIES = [swin, convnext, pooling_pyramid]
BLOCKS = {SwinTransformer: 6, ConvNeXt: 5, MetaFormer: 5}


def _trained(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with weights large enough for all parts to matter."""
    torch.manual_seed(0)
    model = build().eval()
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = True  # as while it is captured
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5 if "head" not in name else 20)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.pretrained_cfg = {"input_size": (3, SIDE, SIDE), "architecture": type(model).__name__}
    return model


@pytest.fixture(params=FAMILIES, ids=lambda build: build.__name__)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return _trained(request.param)


def _loaded(module: nn.Module) -> tuple[Model, StageLayout]:
    model = load_model(module, device="cpu")
    assert isinstance(model.layout, StageLayout)
    return model, model.layout


def _image(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def _pixels(model: Model) -> Tensor:
    """Bring the image to what the model expects."""
    pixels = torch.from_numpy(_image()).permute(2, 0, 1)[None].float() / 255
    mean, std = model.preprocessing.mean, model.preprocessing.std
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _expected(
    model: Model, layout: StageLayout, image: Tensor, class_index: int, blocks: slice = slice(0)
) -> Any:
    """Compute the map of each stage (stages, rows, cols), whose mean is the evidence."""
    names = [stage.module for stage in layout.stages]
    maps, _ = stage_evidence(model.module, image, class_index, names, balanced_blocks=blocks)
    return np.stack([spread(each, layout.grid) for each in maps])


def test_evidence_equals_the_reference_and_forgets_no_stage(module: nn.Module) -> None:
    model, layout = _loaded(module)
    assert len(layout.stages) == len(module.feature_info)
    (found,) = vitviz.evidence(model, [_image()], classes=1, residual="plain")
    maps = _expected(model, layout, _pixels(model), 1)
    expected = maps.mean(axis=0)
    assert found.relevance.shape == layout.grid == expected.shape
    error = np.abs(found.relevance - expected).max() / np.ptp(expected)
    assert error < 1e-5
    for index in range(len(layout.stages)):
        without = np.delete(maps, index, axis=0).mean(axis=0)
        assert np.abs(without - expected).max() / np.ptp(expected) > 1e-3


def test_residual_additions_of_all_stages_are_balanced_up_to_three_quarters(
    module: nn.Module,
) -> None:
    model, layout = _loaded(module)
    (found,) = vitviz.evidence(model, [_image()], classes=1)
    image, blocks = _pixels(model), BLOCKS[type(module)]
    first = 3 * blocks // 4
    expected = _expected(model, layout, image, 1, slice(first)).mean(axis=0)
    assert np.abs(found.relevance - expected).max() / np.ptp(expected) < 1e-5
    for wrong in (slice(0), slice(first - 1), slice(first + 1), slice(blocks)):
        mistaken = _expected(model, layout, image, 1, wrong).mean(axis=0)
        assert np.abs(mistaken - expected).max() / np.ptp(expected) > 1e-3


def test_forward_pass_is_bit_identical(module: nn.Module) -> None:
    model, layout = _loaded(module)
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = module(images)
        with StageCapture(module, layout) as capture:
            assert torch.equal(module(images), expected)
            tokens = capture.take_tokens()
        assert torch.equal(module(images), expected)
    assert [each.shape[1] for each in tokens] == [s.grid[0] * s.grid[1] for s in layout.stages]
    assert not any(part._forward_hooks for part in module.modules())


def test_evidence_without_biases_sums_to_the_logit(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    model, _ = _loaded(module)
    (found,) = vitviz.evidence(model, [_image()], classes=2)
    with torch.no_grad():
        logit = model.output(_pixels(model))[0, 2]
    assert found.relevance.sum() == pytest.approx(float(logit), rel=1e-3)


def test_batches_and_single_images_agree(module: nn.Module) -> None:
    model, _ = _loaded(module)
    images = [_image(seed) for seed in range(3)]
    together = vitviz.evidence(model, images)
    for image, found in zip(images, together, strict=True):
        (alone,) = vitviz.evidence(model, [image])
        assert np.allclose(alone.relevance, found.relevance, atol=1e-5)


class _Squared(nn.Module):
    """Multiplies two things that both come from the image: linear in neither alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        made = self.inner(x)
        return 10 * made * made


def test_model_whose_evidence_does_not_sum_to_the_logit_is_refused() -> None:
    module = _trained(convnext)
    module.stages[2].blocks[0].mlp = _Squared(module.stages[2].blocks[0].mlp)
    with pytest.raises(UnsupportedModelError, match=r"at stages\.0 it sums to .*expected 1\.00"):
        load_model(module, device="cpu")


class _Moved(nn.Module):
    """Runs a stage and moves its places."""

    def __init__(self, inner: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.move(self.inner(x))
        return moved


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.roll(1, dims=1),
        lambda x: x.roll(-1, dims=2),
        lambda x: x.transpose(1, 2),
        lambda x: x.flip(1),
    ],
    ids=["a row down", "a column left", "transposed", "upside down"],
)
def test_stage_whose_places_lie_elsewhere_is_refused(
    stage: int, move: Callable[[Tensor], Tensor]
) -> None:
    module = _trained(swin)
    module.layers[stage] = _Moved(module.layers[stage], move)
    with pytest.raises(UnsupportedModelError, match=rf"places of layers\.{stage} lie up to"):
        load_model(module, device="cpu")


class _Unrolled(nn.Module):
    """Runs the stages of a Swin on places in an order of their own, as Hiera does."""

    def __init__(self, inner: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            side = int(len(self.last) ** 0.5)
            x = x[:, self.last.argsort()].unflatten(1, (side, side))
        made = self.inner(x).flatten(1, 2)
        return made[:, self.order]

    last: Tensor


def test_order_of_places_is_found_and_undone() -> None:
    plain, module = _trained(swin), _trained(swin)
    last = torch.arange(0)
    for index, cells in enumerate((32 * 32, 16 * 16, 8 * 8)):
        order = torch.randperm(cells, generator=torch.Generator().manual_seed(index))
        module.layers[index] = _Unrolled(module.layers[index], order)
        module.layers[index].last, last = last, order
    side = module.norm
    module.norm = nn.Sequential(_Rolled(last), side)
    model, layout = _loaded(module)
    assert all(stage.order is not None for stage in layout.stages)
    (found,) = vitviz.evidence(model, [_image()], classes=0, residual="plain")
    same = load_model(plain, device="cpu")
    (expected,) = vitviz.evidence(same, [_image()], classes=0, residual="plain")
    assert np.allclose(found.relevance, expected.relevance, atol=1e-5)


class _Rolled(nn.Module):
    """Puts places in an order back on their grid."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        side = int(len(self.order) ** 0.5)
        rolled: Tensor = x[:, self.order.argsort()].unflatten(1, (side, side))
        return rolled


def test_methods_that_need_attention_are_refused_with_the_way_out() -> None:
    model, _ = _loaded(_trained(swin))
    for method in (vitviz.rollout, vitviz.grad_rollout, vitviz.relevance, vitviz.attention):
        with pytest.raises(UnsupportedModelError, match="no single sequence.*or use evidence"):
            method(model, [_image()])


def test_image_of_another_size_is_an_error_and_no_displaced_map() -> None:
    stage = Stage(module="stages.0", grid=(4, 4), axes=4, channels_first=True)
    with pytest.raises(CaptureError, match="expected 4 × 4 places"):
        stage.tokens(torch.zeros(1, 8, 4, 5))


def test_model_without_stages_is_refused_for_the_reason_of_rollout() -> None:
    with pytest.raises(UnsupportedModelError, match="^why$"):
        read_stages(nn.Linear(3, 3), (SIDE, SIDE), "why")


@pytest.mark.parametrize(("count", "cells"), [(7, 14), (14, 7), (9, 6), (27, 14)])
def test_evidence_spread_over_another_grid_keeps_its_sum_and_place(count: int, cells: int) -> None:
    values = torch.rand(2, count, count)
    stage = Stage(module="any", grid=(count, count), axes=4)
    layout = StageLayout(stages=(stage,), grid=(cells, cells), reason="")
    found = layout.average([values.flatten(1)]).view(2, cells, cells)
    assert torch.allclose(found.sum(dim=(1, 2)), values.sum(dim=(1, 2)))
    expected = spread(values[0].double().numpy(), (cells, cells))
    assert np.allclose(found[0], expected, atol=1e-5)


def test_gray_codes_are_read_back() -> None:
    numbers = torch.arange(50)
    bits = list(stage_proofs._bits(numbers ^ (numbers >> 1), 50))
    assert stage_proofs._decoded(bits).tolist() == numbers.tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("census")
def test_evidence_of_a_hierarchical_model_from_the_command_line(
    tmp_path: Path, shell: Shell
) -> None:
    torch.manual_seed(0)
    import timm

    module = timm.create_model("convnext_atto", num_classes=4)
    save_file(module.state_dict(), tmp_path / "own.safetensors")
    photo = Path(__file__).parents[1] / "sample_images/scenes/star-ring.png"
    model = ("-m", "convnext_atto", "--weights", str(tmp_path / "own.safetensors"))
    out = ("-o", str(tmp_path / "out"))
    done = shell("evidence", photo, *model, *out, "--class", "1", "--save", "npy")
    assert done.code == 0, done.err
    (path,) = done.out.decode().split()
    assert np.load(path).shape == (28, 28)
    refused = shell("rollout", photo, "-m", "convnext_atto", *out)
    assert refused.code == 2
    assert "or use evidence" in refused.err
    refused = shell("evidence", photo, *model, *out, "--rule", "shared")
    assert refused.code == 2
    assert "--rule value" in refused.err
