"""Relevance equals the float64 reference in oracles.py, on every kind of token layout."""

from __future__ import annotations

import itertools
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import linear_oracles
import oracles
from comparison import (
    CLASSIC,
    EVIDENCE,
    GRADIENTS,
    LINEAR,
    LINEAR_STARTED,
    RELEVANCE,
    ROLLOUTS,
    SETTINGS,
    TOLERANCE,
    AnySetting,
    LinearSetting,
    Setting,
    class_gradients,
    distance,
    found,
    linear_by_hand,
    loaded,
    reference,
    requested,
    traced,
)
from tiny import CASES, LARGE_CASES, TinyCase
from vitviz.cli.app import app
from vitviz.explaining.batch import explain_batch
from vitviz.models.model import Model, load_model

SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
PHOTO = SHARED / "photos" / "cat_tabby.jpg"

pytestmark = pytest.mark.usefixtures("one_thread")

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_method = pytest.mark.parametrize("setting", [ROLLOUTS[3], GRADIENTS[1], *LINEAR], ids=str)
each_setting = pytest.mark.parametrize("setting", [*SETTINGS, *LINEAR, *LINEAR_STARTED], ids=str)


def _correlation(left: oracles.Array, right: oracles.Array) -> float:
    return float(np.corrcoef(left.ravel(), right.ravel())[0, 1])


@each_case
def test_tiny_model_tells_heads_blocks_and_images_apart(case: TinyCase) -> None:
    attention = np.stack(traced(case).attention)  # (blocks, batch, heads, queries, keys)
    blocks, batch, heads, tokens, _ = attention.shape
    assert (blocks, heads, tokens) == (case.blocks, 3, case.tokens)
    # Uniform attention, under which most mistakes are invisible, would have 1 here.
    assert (attention.max(axis=-1).mean(axis=(1, 2, 3)) * tokens > 3).all()
    for block in range(blocks):
        assert abs(_correlation(attention[block], attention[block].swapaxes(-1, -2))) < 0.3
        for one, other in itertools.combinations(range(heads), 2):
            assert _correlation(attention[block, :, one], attention[block, :, other]) < 0.6
        for one, other in itertools.combinations(range(batch), 2):
            assert _correlation(attention[block, one], attention[block, other]) < 0.6
    for one, other in itertools.combinations(range(blocks), 2):
        assert _correlation(attention[one], attention[other]) < 0.6
        for gradients in class_gradients(case):
            assert _correlation(gradients[one], gradients[other]) < 0.6


def test_images_of_a_batch_differ_in_their_best_class() -> None:
    assert sum(len(set(traced(case).top_class())) > 1 for case in CASES) >= 3


@each_case
def test_seed_leaves_no_doubt_about_what_is_discarded(case: TinyCase) -> None:
    trace = traced(case)
    for block, attention in enumerate(trace.attention):
        for image in range(len(trace.logits)):
            fused = [oracles.fuse_heads(attention[image], name) for name in ("mean", "max", "min")]
            fused += [
                oracles.fuse_gradient(attention[image], gradients[block][image])
                for gradients in class_gradients(case)
            ]
            assert min(oracles.threshold_gap(one, 0.9) for one in fused) > 2e-5


@each_case
def test_layout_is_what_was_written_down_by_hand(case: TinyCase) -> None:
    layout = loaded(case).layout
    assert layout.prefix_tokens == case.prefix_tokens
    assert layout.blocks == case.blocks
    assert layout.tokens == case.tokens
    assert tuple(layout.grid) == case.grid
    assert loaded(case).num_classes == 7


@each_setting
@each_case
def test_relevance_equals_reference(case: TinyCase, setting: AnySetting) -> None:
    error = distance(found(case, setting), reference(case, setting))
    assert error.shape == (3, 3 if setting.is_gradient else 1)
    assert error.max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("setting", [*ROLLOUTS[2:4], GRADIENTS[0], RELEVANCE, CLASSIC], ids=str)
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_relevance_of_many_tokens_equals_reference(case: TinyCase, setting: AnySetting) -> None:
    assert distance(found(case, setting), reference(case, setting)).max() <= TOLERANCE


@cache
def _doubled(case: TinyCase) -> Model:
    return load_model(case.build().double(), device="cpu")


@pytest.mark.parametrize("setting", [*LINEAR, *LINEAR_STARTED], ids=str)
@each_case
def test_double_precision_equals_reference_closely(case: TinyCase, setting: AnySetting) -> None:
    images, options = case.images().double(), setting.options(requested(case))
    maps = np.asarray(explain_batch(_doubled(case), images, options).relevance, np.float64)
    assert distance(maps, reference(case, setting)).max() <= 1e-6


@each_case
def test_best_class_has_relevance(case: TinyCase) -> None:
    """Without it, and where no token speaks for a class, the map is nothing, and equal to all."""
    assert linear_by_hand(case, RELEVANCE)[:, -1].any(axis=(1, 2)).all()


@each_case
def test_logits_equal_reference(case: TinyCase) -> None:
    for setting in (ROLLOUTS[0], GRADIENTS[0], RELEVANCE, EVIDENCE):
        logits = explain_batch(loaded(case), case.images(), setting.options()).logits
        expected = traced(case).logits
        assert np.abs(np.asarray(logits) - expected).max() < 1e-5 * np.abs(expected).max()


@each_setting
@each_case
def test_batch_equals_single_images(case: TinyCase, setting: AnySetting) -> None:
    whole = found(case, setting)
    images = case.images()
    options = setting.options(requested(case))
    for chosen in ([0], [1], [2], [2, 0], [1, 1, 0]):
        maps = np.asarray(explain_batch(loaded(case), images[chosen], options).relevance)
        assert distance(maps, whole[chosen]).max() <= 1e-5


@each_method
def test_number_of_threads_does_not_matter(setting: AnySetting) -> None:
    for case in CASES[::4]:
        torch.set_num_threads(2)
        options = setting.options(requested(case))
        maps = explain_batch(loaded(case), case.images(), options).relevance
        torch.set_num_threads(1)
        assert distance(np.asarray(maps), found(case, setting)).max() <= 1e-5


@each_case
def test_same_batch_twice_gives_the_same_bits(case: TinyCase) -> None:
    for setting in (ROLLOUTS[3], GRADIENTS[1], *LINEAR):
        again = explain_batch(loaded(case), case.images(), setting.options(requested(case)))
        np.testing.assert_array_equal(np.asarray(again.relevance, np.float64), found(case, setting))


@pytest.mark.parametrize("setting", [GRADIENTS[1], *LINEAR], ids=str)
@each_case
def test_each_class_gets_the_map_it_gets_alone(case: TinyCase, setting: AnySetting) -> None:
    together = found(case, setting)
    for position, request in enumerate(requested(case)):
        options = setting.options((request,))
        alone = np.asarray(explain_batch(loaded(case), case.images(), options).relevance)
        assert distance(alone, together[:, [position]]).max() <= 1e-5


def test_classes_give_different_maps() -> None:
    for case in CASES:
        first, second = (found(case, GRADIENTS[0])[:, [position]] for position in (0, 1))
        assert distance(first, second).max() > 0.1


def test_relevance_is_float32_of_images_maps_rows_and_cols() -> None:
    case = next(case for case in CASES if case.name == "rectangular")
    maps = explain_batch(loaded(case), case.images(2), GRADIENTS[0].options()).relevance
    relevance = np.asarray(maps)
    assert relevance.shape == (2, 1, 4, 6)
    assert relevance.dtype == np.float32


@pytest.mark.parametrize("discard", [0, 0.9])
def test_uniform_attention_gives_every_patch_the_same_relevance(discard: float) -> None:
    for case in CASES[:6]:
        model = case.build()
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight.zero_()
                block.attn.qkv.bias.zero_()
        options = Setting(fusion="mean", discard=discard).options()
        maps = explain_batch(load_model(model, device="cpu"), case.images(2), options).relevance
        relevance = np.asarray(maps)
        np.testing.assert_allclose(relevance, relevance.mean(), rtol=1e-5)


def _squashed(path: Path) -> Tensor:
    """Prepare a photograph as this model's authors did: squashed, in [-1, 1]."""
    with Image.open(path) as image:
        pixels = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    scaled = np.asarray(pixels, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(scaled).permute(2, 0, 1).unsqueeze(0)


@cache
def _real_model() -> nn.Module:
    for path in (WEIGHTS, PHOTO):
        if not path.is_file():
            pytest.skip(
                f"{path} is absent: these weights and photographs are no part of the repository"
            )
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False)
    model.load_state_dict(load_file(WEIGHTS), strict=True)
    return model.eval()


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("setting", [ROLLOUTS[3], ROLLOUTS[0], GRADIENTS[1], *LINEAR], ids=str)
def test_batch_of_photographs_equals_single_ones(setting: AnySetting) -> None:
    model = load_model(_real_model(), device="cpu")
    images = torch.cat([_squashed(path) for path in sorted(PHOTO.parent.glob("*.jpg"))[:3]])
    whole = np.asarray(explain_batch(model, images, setting.options()).relevance)
    for chosen in ([0], [2, 1]):
        maps = np.asarray(explain_batch(model, images[chosen], setting.options()).relevance)
        assert distance(maps, whole[chosen]).max() <= 1e-5


@cache
def _real_trace() -> oracles.Trace:
    return oracles.trace(_real_model(), _squashed(PHOTO), blocks=12)


def _real_reference(
    trace: oracles.Trace, setting: AnySetting, class_index: int | None
) -> oracles.Array:
    """Compute the photograph's map (rows, cols) from the formulas; no class for rollout."""
    gradients = None if class_index is None else trace.gradients([class_index])
    tokens = oracles.token_relevance(
        [block[0] for block in trace.attention],
        None if gradients is None else [block[0] for block in gradients],
        readout=oracles.class_token(197),
        fusion=setting.fusion,
        discard=setting.discard,
    )
    return oracles.on_grid(tokens, prefix_tokens=1, grid=(14, 14))


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "setting",
    [
        Setting(fusion="max", discard=0.9),
        Setting(fusion="mean", discard=0),
        Setting(fusion="gradient", discard=0.9),
        Setting(fusion="gradient", discard=0),
    ],
    ids=str,
)
def test_relevance_equals_reference_on_real_weights(setting: AnySetting) -> None:
    trace = _real_trace()
    assert trace.top_class() == [281]
    options = setting.options(("282", "top1"))
    model = load_model(_real_model(), device="cpu")
    maps = np.asarray(explain_batch(model, _squashed(PHOTO), options).relevance, np.float64)
    classes: list[int | None] = [282, 281] if setting.is_gradient else [None]
    expected = [_real_reference(trace, setting, index) for index in classes]
    assert distance(maps, np.stack(expected)[None]).max() <= TOLERANCE


@lru_cache(maxsize=1)  # a second one would double the memory of a worker
def _real_linear_trace(rules: linear_oracles.Rules) -> linear_oracles.LinearTrace:
    return linear_oracles.linear_trace(_real_model(), _squashed(PHOTO), rules)


def _real_linear_reference(setting: LinearSetting, class_index: int) -> oracles.Array:
    if setting is CLASSIC:
        tokens = linear_oracles.classic_relevance(
            [block[0] for block in _real_trace().attention],
            [block[0] for block in _real_trace().gradients([class_index])],
            readout=oracles.class_token(197),
        )
        return oracles.on_grid(tokens, prefix_tokens=1, grid=(14, 14))
    (image,) = _real_linear_trace(setting.rules).about([class_index])
    method = linear_oracles.token_evidence
    tokens = linear_oracles.token_relevance(image) if setting is RELEVANCE else method(image)
    return oracles.on_grid(tokens, prefix_tokens=1, grid=(14, 14))


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("setting", LINEAR, ids=str)
def test_linearised_relevance_equals_reference_on_real_weights(setting: LinearSetting) -> None:
    model = load_model(_real_model(), device="cpu")
    options = setting.options(("282", "top1"))
    maps = np.asarray(explain_batch(model, _squashed(PHOTO), options).relevance, np.float64)
    expected = [_real_linear_reference(setting, index) for index in (282, 281)]
    assert distance(maps, np.stack(expected)[None]).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("arguments", "setting", "maps"),
    [
        (
            ["rollout", "--head-fusion", "max", "--discard", "0.9"],
            Setting(fusion="max", discard=0.9),
            {"rollout": None},
        ),
        (
            ["grad-rollout", "--class", "282", "--class", "top1"],
            Setting(fusion="gradient", discard=0.9),
            {"grad-rollout.c282": 282, "grad-rollout.top1": 281},
        ),
    ],
    ids=["rollout", "grad-rollout"],
)
def test_saved_relevance_equals_reference_on_real_weights(
    arguments: list[str],
    setting: Setting,
    maps: dict[str, int | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = _real_trace()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.jpg").write_bytes(PHOTO.read_bytes())
    model = ["--model", "vit_tiny_patch16_224", "--weights", str(WEIGHTS), "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "cat.jpg", *model, "--save", "npy", "-o", "out"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").glob("*")} == {
        f"cat.jpg.{name}.npy" for name in maps
    }
    for name, index in maps.items():
        saved = np.load(tmp_path / "out" / f"cat.jpg.{name}.npy")
        assert saved.dtype == np.float32
        expected = _real_reference(trace, setting, index)
        assert distance(saved[None, None], expected[None, None]).max() <= TOLERANCE
