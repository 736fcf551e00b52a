"""Patch features: what the library itself gives, in colours that all images of a run share."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitviz
from comparison import loaded
from fixtures_io import (
    NAME,
    SIZE,
    Shell,
    picture,
    save_pictures,
    save_tiny,
    tiny_model,
    tiny_module,
)
from tiny import CASES, LARGE_CASES, TinyCase
from vitviz.errors import OptionError
from vitviz.explaining.batch import explain_batch
from vitviz.images.fitting import Region
from vitviz.methods.features import Features, Similarity
from vitviz.methods.method import Method
from vitviz.pictures import components
from vitviz.pictures.components import ColorSpace, patches_of, principal_components, spread
from vitviz.pictures.painting import paint

pytestmark = pytest.mark.usefixtures("one_thread")

Floats = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture
def tiny(tmp_path: Path, shell: Shell) -> list[str]:
    save_pictures(tmp_path / "photos", ["a.png", "b.png", "c.png"])
    weights = save_tiny(tmp_path / "tiny.safetensors")
    return ["-m", NAME, "--weights", str(weights), "--img-size", str(SIZE), "--device", "cpu"]


def by_timm(case: TinyCase, block: int) -> Floats:
    """Compute features (batch, channels, rows, cols) by the library's own function, in float64."""
    module, images = case.build().double(), case.images().double()
    with torch.no_grad():
        (found,) = module.forward_intermediates(  # type: ignore[operator]
            images, indices=[block], norm=True, output_fmt="NLC", intermediates_only=True
        )
    batch, _, channels = found.shape
    rows = found[:, found.shape[1] - case.grid[0] * case.grid[1] :].transpose(1, 2)
    return np.asarray(rows.reshape(batch, channels, *case.grid), np.float64)


def features(case: TinyCase, block: int | None, refine: int = 1) -> Floats:
    method = Features(block=block, refine=refine)
    maps = explain_batch(loaded(case), case.images(), method).relevance
    assert maps.shape[1] == 1
    return np.asarray(maps[:, 0], np.float64)


def split_by_hand(values: Floats) -> float:
    """Find Otsu's bound by trying all."""
    bounds = np.linspace(values.min(), values.max(), 2000)[1:-1]

    def within(bound: float) -> float:
        above = values > bound
        return sum(values[side].var() * side.mean() for side in (above, ~above) if side.any())

    return float(min(bounds, key=within))


@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
@pytest.mark.parametrize("block", [1, None])
def test_features_equal_those_of_the_library(case: TinyCase, block: int | None) -> None:
    expected = by_timm(case, case.blocks - 1 if block is None else block)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(features(case, block) / scale, expected / scale, atol=1e-5)


def test_refined_features_stay_what_they_are() -> None:
    coarse, fine = features(CASES[0], None), features(CASES[0], None, refine=2)
    assert fine.shape[-2:] == (8, 8)
    assert fine.std() > 0.5 * coarse.std()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_similarity_equals_the_cosine_by_hand(case: TinyCase) -> None:
    row, col = case.grid[0] - 1, 1
    method = Similarity(patch=(row, col), block=1)
    found = np.asarray(explain_batch(loaded(case), case.images(), method).relevance[:, 0])
    tokens = by_timm(case, 1)
    compared = tokens[:, :, row, col]
    products = np.einsum("bcrk,bc->brk", tokens, compared)
    lengths = np.linalg.norm(tokens, axis=1) * np.linalg.norm(compared, axis=1)[:, None, None]
    np.testing.assert_allclose(found, products / lengths, atol=1e-5)
    np.testing.assert_allclose(found[:, row, col], 1, atol=1e-5)


def test_components_equal_those_of_a_singular_value_decomposition() -> None:
    generator = np.random.default_rng(3)
    patches = (generator.normal(size=(500, 24)) * np.linspace(5, 1, 24) + 7).astype(np.float32)
    mean, found = principal_components(patches, 3)
    exact = patches.astype(np.float64)
    _, _, rows = np.linalg.svd(exact - exact.mean(axis=0), full_matrices=False)
    signs = np.sign(rows[np.arange(3), np.abs(rows[:3]).argmax(axis=1)])
    np.testing.assert_allclose(mean, exact.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found, rows[:3] * signs[:, None], atol=1e-5)


def test_components_beyond_the_channels_are_zero() -> None:
    _, found = principal_components(np.array([[1, 0], [0, 2], [3, 1]], np.float32), 3)
    assert found.shape == (3, 2)
    assert not found[2].any()


def scene(seed: int, *, sign: float = 1.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Draw features (channels, rows, cols) with an object in the middle of 10 × 12 patches."""
    generator = np.random.default_rng(seed)
    drawn = 0.3 * generator.normal(size=(16, 10, 12))
    drawn[0] -= 2 * sign
    drawn[0, 3:7, 4:9] += 4 * sign
    return drawn.astype(np.float32)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_foreground_is_what_keeps_from_the_edges(sign: float) -> None:
    scenes = [scene(seed, sign=sign) for seed in range(3)]
    space = ColorSpace.fit([patches_of(each, 3) for each in scenes], foreground=True)
    shown = space.colors(scenes[0])[..., 3]
    assert shown[3:7, 4:9].all()
    assert shown.sum() == 20
    assert not space.colors(scenes[0])[shown == 0].any()


def test_split_of_a_foreground_is_where_otsu_would_have_it() -> None:
    scenes = [scene(seed) for seed in range(3)]
    space = ColorSpace.fit([patches_of(each, 3) for each in scenes], foreground=True)
    assert space.split is not None
    direction, bound = space.split
    values = np.concatenate([each.reshape(16, -1).T @ direction for each in scenes])
    above = values > split_by_hand(values.astype(np.float64))
    np.testing.assert_array_equal(values > bound, above)


def test_colors_are_components_between_percentiles() -> None:
    scenes = [scene(seed) for seed in range(3)]
    space = ColorSpace.fit([patches_of(each, 3) for each in scenes], foreground=False)
    exact = np.concatenate([each.reshape(16, -1).T for each in scenes]).astype(np.float64)
    centred = exact - exact.mean(axis=0)
    _, _, rows = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(rows[np.arange(3), np.abs(rows[:3]).argmax(axis=1)])
    values = centred @ (rows[:3] * signs[:, None]).T
    low, high = np.percentile(values, (1, 99), axis=0)
    expected = ((values - low) / (high - low)).clip(0, 1).reshape(3, 10, 12, 3)
    for each, colors in zip(scenes, expected, strict=True):
        np.testing.assert_allclose(space.colors(each)[..., :3], colors, atol=1e-5)
        assert (space.colors(each)[..., 3] == 1).all()


def test_features_that_are_all_the_same_are_grey() -> None:
    flat = np.ones((5, 3, 3), np.float32)
    space = ColorSpace.fit([patches_of(flat, 1)], foreground=True)
    np.testing.assert_array_equal(space.colors(flat)[..., :3], 0.5)


def test_patches_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "_PATCHES", 30)
    taken = patches_of(scene(0), 3)
    assert taken.features.shape == (10, 16)
    assert len(spread(10_000)) == 64
    assert spread(10_000)[0] == 0
    assert spread(10_000)[-1] == 9_999
    assert spread(3) == [0, 1, 2]
    assert spread(0) == []


def test_paint_leaves_what_is_no_foreground() -> None:
    colors = np.zeros((2, 2, 4), np.float32)
    colors[0, 0] = 1
    photo = np.full((40, 40, 3), 90, np.uint8)
    painted = paint(colors, Region(right=0.5), photo, 0.5)
    assert (painted[:, 20:] == 90).all()
    assert (painted[30:] == 90).all()
    assert painted[0, 0].tolist() == [172, 172, 172]
    assert not paint(colors, Region(right=0.5), photo, 1)[:, 20:].any()


def test_images_of_a_call_share_their_colors() -> None:
    model, images = tiny_model(), [picture(40, 40, seed=1), picture(40, 60, seed=2)]
    both = vitviz.features(model, images, foreground="off")
    assert both[0].colors is both[1].colors
    assert both[0].relevance.shape == (64, 4, 4)
    assert both[0].heatmap().size == (40, 40)
    assert both[1].panel().width > 3 * 60
    again = vitviz.features(model, images, foreground="off")
    np.testing.assert_array_equal(both[1].overlay(), again[1].overlay())


def test_models_without_a_head_have_features() -> None:
    model = vitviz.load_model(tiny_module(classes=0), device="cpu")
    (found,) = vitviz.features(model, [picture(40, 40)], block=2)
    first, second = vitviz.similarity(model, picture(40, 40), (1, 2), [picture(30, 50)], block=2)
    assert not found.predictions
    assert first.relevance[1, 2] == pytest.approx(1)
    assert second.relevance.max() < 1


def test_similarity_is_with_the_patch_of_the_first_image() -> None:
    model, images = tiny_model(), [picture(40, 40, seed=1), picture(40, 60, seed=2)]
    one, other = (each.relevance for each in vitviz.features(model, images))
    found = vitviz.similarity(model, images[0], (3, 1), images[1:])
    compared = one[:, 3, 1].astype(np.float64)
    for tokens, each in zip((one, other), found, strict=True):
        lengths = np.linalg.norm(tokens, axis=0) * np.linalg.norm(compared)
        expected = np.einsum("crk,c->rk", tokens, compared) / lengths
        np.testing.assert_allclose(each.relevance, expected, atol=1e-5)
    assert found[0].method.extent == pytest.approx((found[0].relevance.min(), 1), abs=1e-5)


@pytest.mark.parametrize(
    ("patch", "message"),
    [((4, 0), "patch is 4,0, but this makes 4 × 4 patches"), ((1,), "patch is missing")],
)
def test_patch_that_is_not_there_is_refused(patch: tuple[int, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        vitviz.similarity(tiny_model(), picture(40, 40), patch)


def test_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match="block is 6, but .* has 6 blocks"):
        vitviz.features(tiny_model(), [picture(40, 40)], block=6)


def test_features_are_written_with_records(shell: Shell, tiny: list[str]) -> None:
    done = shell("features", "photos", "--save", "npy", "--save", "panel", "--json", *tiny)
    assert done.code == 0, done.err
    records = [json.loads(line) for line in done.out.splitlines()]
    assert {each["status"] for each in records} == {"written"}
    run = records[0]["run"]
    assert run["method"] == "features"
    assert run["options"]["foreground"] == "auto"
    assert len(run["options"]["fitted_on"]) == 64
    paths = [each["path"] for each in records[0]["outputs"]]
    assert [path.partition(".features")[2] for path in paths] == [".npy", ".panel.png"]
    assert np.load(paths[0]).shape == (64, 4, 4)


def test_features_are_skipped_only_where_their_colors_are_the_same(
    shell: Shell, tiny: list[str]
) -> None:
    again = ("features", "photos", "--skip-existing", *tiny)
    first = shell(*again)
    pictures = {path: Path(path).read_bytes() for path in first.out.decode().splitlines()}
    assert len(pictures) > 1
    assert f"0 written, {len(pictures)} skipped" in shell(*again).err
    assert all(Path(path).read_bytes() == content for path, content in pictures.items())
    picture(40, 40, seed=9).save("photos/one-more.png")
    assert f"{len(pictures) + 1} written, 0 skipped" in shell(*again).err


def test_commands_and_functions_draw_the_same(shell: Shell, tiny: list[str]) -> None:
    assert shell("features", "photos", *tiny).code == 0
    for found in vitviz.features(tiny_model(), "photos"):
        with Image.open(f"vitviz-out/{found.source}.features.heatmap.png") as written:
            drawn = np.asarray(written, np.int16) - np.asarray(found.heatmap(), np.int16)
        assert np.abs(drawn).max() <= 1


def test_colors_are_fitted_on_what_there_is_if_no_chosen_image_can_be_read(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "_IMAGES", 2)
    Path("photos/0.png").write_bytes(b"no picture")
    Path("photos/z.png").write_bytes(b"no picture")
    done = shell("features", "photos", *tiny)
    assert done.code == 1
    assert "3 written, 0 skipped, 2 failed" in done.err


def test_similarity_without_an_image_shows_its_usage(shell: Shell) -> None:
    assert "vitviz similarity [OPTIONS] IMAGE...; for example:" in shell("similarity").err


@pytest.mark.parametrize("method", [Features, partial(Similarity, patch=(0, 0))])
def test_outlier_tokens_are_those_of_the_block(method: Callable[..., Method]) -> None:
    def strengthen(block: object, inputs: object, tokens: torch.Tensor) -> torch.Tensor:
        factors = torch.ones(tokens.shape[1], 1)
        factors[7] = 100
        return tokens * factors

    model = vitviz.load_model(tiny_module(), device="cpu")
    model.module.blocks[3].register_forward_hook(strengthen)  # type: ignore[index, union-attr]
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    counts = [explain_batch(model, images, method(block=each)).outlier_tokens for each in (2, 3)]
    assert [each.sum(dim=(1, 2)).tolist() for each in counts] == [[0, 0], [1, 1]]


def test_outlier_tokens_are_told(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vitviz.explaining.batch.outlier_tokens",
        lambda tokens, prefix: torch.ones_like(tokens[:, prefix:, 0], dtype=torch.bool),
    )
    done = shell("features", "photos", "--block", "2", *tiny)
    assert "patch tokens of outlying norm in 3 maps, the first of photos/a.png" in done.err
    assert "attention" not in done.err


def test_image_that_cannot_be_read_spoils_no_other(shell: Shell, tiny: list[str]) -> None:
    Path("photos/broken.png").write_bytes(b"no picture")
    done = shell("features", "photos", *tiny)
    assert done.code == 1
    assert "1 failed" in done.err
    assert done.out.decode().count(".features.heatmap.png") > 1


def test_similarity_is_written_for_the_image_and_the_others(shell: Shell, tiny: list[str]) -> None:
    one, *others = sorted(map(str, Path("photos").iterdir()))
    done = shell("similarity", one, "--patch", "1,2", "--to", others[0], *others[1:], *tiny)
    assert done.code == 0, done.err
    found = done.out.decode().splitlines()
    assert found == [f"vitviz-out/{each}.similarity.png" for each in (one, *others)]
    arguments = ("similarity", one, "--patch", "1,2", "--to", "photos", "--skip-existing", *tiny)
    assert f"0 written, {len(found)} skipped" in shell(*arguments).err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{one}",), 2, "--patch is missing"),
        (("{one}", "--patch", "x"), 2, "--patch is 'x'; give its ROW,COL"),
        (("{one}", "--patch", "9,9"), 2, "--patch is 9,9, but this makes 4 × 4 patches"),
        (("{one}", "--patch", "1,1", "--block", "6"), 2, "--block is 6, but"),
        (("photos", "--patch", "1,1"), 2, "photos is not one image"),
        (("broken.png", "--patch", "1,1", "--to", "photos"), 1, "broken.png: "),
    ],
)
def test_similarity_refuses_mistakes_in_one_line(
    shell: Shell, tiny: list[str], arguments: tuple[str, ...], code: int, message: str
) -> None:
    Path("broken.png").write_bytes(b"no picture")
    one = str(sorted(Path("photos").iterdir())[0])
    done = shell("similarity", *(each.format(one=one) for each in arguments), *tiny)
    assert (done.code, done.out) == (code, b"")
    (line,) = [line for line in done.err.splitlines() if message in line]
    assert "Traceback" not in done.err
