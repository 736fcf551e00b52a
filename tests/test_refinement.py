"""Maps finer than patches: shifts, and the way back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vitviz
from comparison import GRADIENTS, LINEAR, ROLLOUTS, AnySetting, distance, loaded
from fixtures_io import picture, tiny_model
from fixtures_methods import make_method
from oracles import Array
from tiny import CASES, TinyCase
from vitviz.cli.app import main
from vitviz.errors import OptionError
from vitviz.explaining.batch import explain_batch
from vitviz.methods.evidence import Evidence
from vitviz.methods.method import Method
from vitviz.methods.refinement import Shift, place_back, shifted, shifts
from vitviz.methods.rollout import GradRollout
from vitviz.methods.table import METHODS
from vitviz.models.model import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


def patch_means(images: Tensor, patch: int) -> Tensor:
    """Explain an image by the mean of each patch's pixels (batch, rows, cols)."""
    return torch.nn.functional.avg_pool2d(images, patch)[:, 0]


def refined(images: Tensor, patch: int, refine: int) -> Tensor:
    made = shifts(refine, (patch, patch))
    return place_back([patch_means(shifted(images, each), patch) for each in made], made, refine)


@pytest.mark.slow
@pytest.mark.parametrize(("patch", "refine"), [(8, 2), (16, 3), (14, 3), (16, 4), (12, 2), (16, 8)])
@pytest.mark.parametrize("grid", [(3, 5), (4, 3)])
def test_hot_pixel_stays_where_it_is(patch: int, refine: int, grid: tuple[int, int]) -> None:
    """At the middle of every cell of the fine grid, those of all four borders among them.

    A cell at a border is in view of fewer shifts: its neighbour may be as hot, but never hotter.
    """
    rows, cols = (side * refine for side in grid)
    cells = list(np.ndindex(rows, cols))
    images = torch.zeros(len(cells), 1, grid[0] * patch, grid[1] * patch)
    for image, cell in zip(images, cells, strict=True):
        down, right = (int((place + 0.5) * patch / refine) for place in cell)
        image[0, down, right] = 1
    maps = refined(images, patch, refine)
    assert maps.shape == (len(cells), rows, cols)
    for fine, (row, col) in zip(maps, cells, strict=True):
        assert fine[row, col] >= (1 - 1e-6) * fine.max()
        if refine <= row < rows - refine and refine <= col < cols - refine:
            hottest = (fine > (1 - 1e-6) * fine.max()).nonzero().tolist()
            assert hottest == [[row, col]]


@pytest.mark.parametrize("refine", [2, 3, 4])
def test_smooth_image_keeps_its_slopes_at_all_borders(refine: int) -> None:
    """Where nothing is reflected a plane stays a plane, without an offset to any side."""
    height, width = 5 * 24, 6 * 24
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    plane = (0.5 + rows) / 24 + 3 * (0.5 + cols) / 24
    fine = refined(plane[None, None].float(), 24, refine)[0] * refine**2
    down, right = torch.meshgrid(
        *((torch.arange(side * refine) + 0.5) / refine for side in (5, 6)), indexing="ij"
    )
    inside = (slice(refine, -refine),) * 2
    torch.testing.assert_close(fine[inside], (down + 3 * right)[inside])


@pytest.mark.parametrize("pixels", [(0, 0), (3, 0), (0, -4), (-2, 5), (7, 7)])
def test_shift_is_what_it_says(pixels: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((1, 1, 9, 11), dtype=np.float32)
    moved = shifted(torch.from_numpy(image), Shift(cells=(0, 0), pixels=pixels))[0, 0].numpy()
    padded = np.pad(image[0, 0], 8, mode="symmetric")
    down, right = (8 - each for each in pixels)
    np.testing.assert_array_equal(moved, padded[down : down + 9, right : right + 11])


def test_first_shift_is_none_and_each_is_made_once() -> None:
    for refine in (1, 2, 3, 5):
        made = shifts(refine, (16, 14))
        assert made[0] == Shift(cells=(0, 0), pixels=(0, 0))
        residues = {tuple(cell % refine for cell in each.cells) for each in made}
        assert len(residues) == len(made) == refine**2
        assert max(abs(cell) for each in made for cell in each.cells) <= refine / 2


@pytest.mark.parametrize("refine", [2, 3, 4])
def test_map_that_is_the_same_everywhere_stays_so(refine: int) -> None:
    (fine,) = refined(torch.ones(1, 1, 3 * 24, 4 * 24), 24, refine)
    torch.testing.assert_close(fine, torch.full_like(fine, 1 / refine**2))


def test_sums_are_kept_away_from_the_edges() -> None:
    image = torch.zeros(1, 1, 64, 64)
    image[0, 0, 27, 35] = 1
    whole = float(patch_means(image, 16).sum())
    assert float(refined(image, 16, 4).sum()) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("method", [each for each in METHODS if each != "attention"])
@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
def test_refined_maps_are_the_shifted_maps_put_back(case: TinyCase, method: str) -> None:
    classes = ("top1",)
    options = make_method(method, classes=classes, refine=2)
    whole = explain_batch(loaded(case), case.images(), options)
    made = shifts(2, loaded(case).preprocessing.patch)
    once = make_method(method, classes=classes)
    maps = [
        explain_batch(
            loaded(case), shifted(case.images(), each), once, class_indices=whole.class_indices
        ).relevance
        for each in made
    ]
    torch.testing.assert_close(whole.relevance, place_back(maps, made, 2), rtol=1e-4, atol=1e-7)


def mirrored(place: int, length: int) -> int:
    """Look up what a place beyond an edge shows: what lies as far on this side of it."""
    inside = place if place >= 0 else -place - 1
    return inside if inside < length else length - 1 - (inside - length)


def slowly_shifted(image: Array, down: int, right: int) -> Array:
    """Move the content of (channels, height, width), pixel by pixel."""
    moved = np.empty_like(image)
    height, width = image.shape[1:]
    for row, col in np.ndindex(height, width):
        moved[:, row, col] = image[:, mirrored(row - down, height), mirrored(col - right, width)]
    return moved


def slowly_placed_back(maps: list[Array], made: list[Shift], refine: int) -> Array:
    """Average, cell by cell, the patches in which a cell was seen, as often as it was."""
    rows, cols = (side * refine for side in maps[0].shape)
    seen: dict[tuple[int, int], list[float]] = {place: [] for place in np.ndindex(rows, cols)}
    for relevance, shift in zip(maps, made, strict=True):
        for row, col in np.ndindex(rows, cols):
            home = mirrored(row - shift.cells[0], rows), mirrored(col - shift.cells[1], cols)
            seen[home].append(relevance[row // refine, col // refine])
    fine = np.zeros((rows, cols))
    for place, values in seen.items():
        fine[place] = np.mean(values) / refine**2
    return fine


@pytest.mark.parametrize("patch", [(8, 8), (14, 14), (8, 14)], ids=str)
@pytest.mark.parametrize("refine", [1, 2, 3, 4])
def test_shift_and_way_back_are_those_of_slow_loops(refine: int, patch: tuple[int, int]) -> None:
    made = shifts(refine, patch)
    images = torch.randn(3, 2 * patch[0], 3 * patch[1], generator=torch.Generator().manual_seed(1))
    for each in made:
        expected = slowly_shifted(images.numpy(), *each.pixels)
        np.testing.assert_array_equal(shifted(images, each), expected)
    generator = torch.Generator().manual_seed(2)
    maps = [torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in made]
    fine = place_back(maps, made, refine)
    for image, index in np.ndindex(2, 3):
        one = [each[image, index].numpy() for each in maps]
        expected = slowly_placed_back(one, made, refine)
        np.testing.assert_allclose(fine[image, index], expected, rtol=1e-12)


LITERAL = (ROLLOUTS[0], GRADIENTS[0], *LINEAR)


def refining(setting: AnySetting, refine: int, *classes: str) -> Method:
    return replace(setting.options(classes), refine=refine)


@pytest.mark.slow
@pytest.mark.parametrize("refine", [2, 3])
@pytest.mark.parametrize("setting", LITERAL, ids=str)
def test_refined_maps_equal_images_shifted_one_by_one(setting: AnySetting, refine: int) -> None:
    case = CASES[-1]
    images, classes = case.images(), (*map(str, case.classes), "top1")
    whole = explain_batch(loaded(case), images, refining(setting, 1, *classes))
    made = shifts(refine, (8, 8))
    expected = []
    for index, image in enumerate(images):
        chosen = None if whole.class_indices is None else whole.class_indices[[index]]
        maps = []
        for each in made:
            moved = torch.from_numpy(slowly_shifted(image.numpy(), *each.pixels))[None]
            options = refining(setting, 1, *classes)
            one = explain_batch(loaded(case), moved, options, class_indices=chosen)
            maps.append(one.relevance[0].double().numpy())
        alone = [[each[place] for each in maps] for place in range(len(maps[0]))]
        expected.append([slowly_placed_back(each, made, refine) for each in alone])
    found = explain_batch(loaded(case), images, refining(setting, refine, *classes), at_once=5)
    assert distance(np.asarray(found.relevance, np.float64), np.array(expected)).max() <= 1e-5


@pytest.mark.parametrize("setting", LITERAL, ids=str)
def test_lanes_and_batches_do_not_matter(setting: AnySetting) -> None:
    case = CASES[-1]
    options = refining(setting, 2, "2", "top1")
    one = np.asarray(explain_batch(loaded(case), case.images(), options, at_once=12).relevance)
    torch.set_num_threads(3)
    try:
        lanes = explain_batch(loaded(case), case.images(), options, at_once=12).relevance
    finally:
        torch.set_num_threads(1)
    assert distance(np.asarray(lanes), one).max() <= 1e-5
    for index in range(3):
        alone = explain_batch(loaded(case), case.images()[[index]], options).relevance
        assert distance(np.asarray(alone), one[[index]]).max() <= 1e-5


@pytest.mark.parametrize("refine", [3, 4])
def test_patches_that_cells_do_not_divide_are_refined(refine: int) -> None:
    torch.manual_seed(0)
    module = VisionTransformer(
        img_size=(28, 42), patch_size=14, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )
    images = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))
    options = Evidence(refine=refine)
    maps = explain_batch(load_model(module.eval(), device="cpu"), images, options).relevance
    assert maps.shape == (2, 1, 2 * refine, 3 * refine)
    assert maps.isfinite().all()


@pytest.mark.parametrize("at_once", [1, 4, 7, 100])
def test_how_many_run_at_once_does_not_matter(at_once: int) -> None:
    case = CASES[0]
    options = Evidence(classes=("2",), refine=3)
    one = explain_batch(loaded(case), case.images(), options).relevance
    other = explain_batch(loaded(case), case.images(), options, at_once=at_once).relevance
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_refining_once_is_the_identity() -> None:
    images = [picture(64, 64)]
    (plain,), (same,), (fine,) = (
        vitviz.rollout(tiny_model(), images, **options)
        for options in ({}, {"refine": 1}, {"refine": 2})
    )
    assert np.array_equal(plain.relevance, same.relevance)
    assert fine.relevance.shape == tuple(2 * side for side in plain.relevance.shape)


def test_ranks_are_those_of_the_image_where_it_is() -> None:
    case = CASES[0]
    options = GradRollout(classes=("top1",))
    plain = explain_batch(loaded(case), case.images(), options)
    moved = shifted(case.images(), shifts(2, (8, 8))[-1])
    elsewhere = explain_batch(loaded(case), moved, options)
    assert plain.class_indices is not None
    assert elsewhere.class_indices is not None
    assert not torch.equal(plain.class_indices, elsewhere.class_indices)  # or this shows nothing
    fine = explain_batch(
        loaded(case),
        case.images(),
        GradRollout(classes=("top1",), refine=2),
    )
    assert fine.class_indices is not None
    assert torch.equal(fine.class_indices, plain.class_indices)


@pytest.mark.parametrize("refine", [0, -1, 17])
def test_what_cannot_be_refined_is_refused(refine: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="refine is"):
        vitviz.rollout(tiny_model(), [picture(64, 64)], refine=refine)
    with pytest.raises(SystemExit) as left:
        main(["rollout", "sample_images", "-m", "demo", f"--refine={refine}"])
    assert left.value.code == 2
    assert "--refine is" in capsys.readouterr().err
