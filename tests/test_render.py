"""Heat on pictures: normalisation, colours, geometry."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fixtures_io import picture
from vitviz.explaining.explanation import Explanation
from vitviz.images.fitting import InputTransform, Region
from vitviz.images.samples import ImageSample, sample_of
from vitviz.images.sources import Source
from vitviz.methods.evidence import Evidence
from vitviz.methods.method import Method
from vitviz.methods.relevance import Relevance
from vitviz.methods.rollout import GradRollout, Rollout
from vitviz.options import Colormap, Fit, PictureOptions
from vitviz.pictures.colors import color_heat
from vitviz.pictures.heat import normalize, place_heat
from vitviz.pictures.interpolation import interpolate
from vitviz.pictures.sheets import overlay
from vitviz.pictures.tables import Cell, picture_table

WHOLE = Region()


OF_OPENCV = [colormap for colormap in Colormap if colormap is not Colormap.REDBLUE]


def colors(colormap: Colormap) -> np.ndarray:
    ramp = np.arange(256, dtype=np.uint8)[None]
    table = cv2.applyColorMap(ramp, getattr(cv2, f"COLORMAP_{colormap.value.upper()}"))
    return table[0, :, ::-1]


def spot(rows: int, cols: int, row: int, col: int) -> np.ndarray:
    grid = np.zeros((rows, cols), np.float32)
    grid[row, col] = 1
    return grid


# Normalisation


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0, 1e30, 1e-30])
def test_constant_map_gives_zeros(value: float) -> None:
    assert (normalize(np.full((3, 4), value, np.float32)) == 0).all()


def test_normalization_spans_zero_to_one() -> None:
    values = np.random.default_rng(0).normal(size=(50, 7, 9)).astype(np.float32)
    for relevance in values:
        heat = normalize(relevance)
        assert heat.dtype == np.float32
        assert heat.min() == 0
        assert heat.max() == pytest.approx(1, abs=1e-6)
        assert heat.argmax() == relevance.argmax()


def test_normalization_ignores_scale_and_shift() -> None:
    relevance = np.random.default_rng(0).random((4, 5)).astype(np.float32)
    assert np.allclose(normalize(relevance * 1e-8), normalize(relevance), atol=1e-6)
    assert np.allclose(normalize(relevance - 0.5), normalize(relevance), atol=1e-6)


@pytest.mark.parametrize(("spread", "flat"), [(0.5e-5, True), (2e-5, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_range_of_a_hundred_thousandth_counts_as_constant(
    spread: float, flat: bool, sign: int
) -> None:
    relevance = sign * np.array([[1.0, 1.0 - spread]], np.float32)
    assert (normalize(relevance).max() == 0) == flat


def test_small_values_are_not_constant_for_being_small() -> None:
    assert normalize(np.array([[1e-12, 2e-12]], np.float32)).tolist() == [[0, 1]]


def test_normalization_leaves_its_input_alone() -> None:
    relevance = np.array([[1.0, 2.0]], np.float32)
    normalize(relevance)
    place_heat(relevance, WHOLE, (8, 8))
    assert relevance.tolist() == [[1, 2]]


# Placing


@pytest.mark.parametrize("shape", [(90, 270), (270, 90), (31, 31)], ids=str)
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)], ids=str)
def test_corner_of_the_grid_lights_the_corner_of_the_picture(
    shape: tuple[int, int], corner: tuple[int, int]
) -> None:
    heat = place_heat(spot(4, 6, *corner), WHOLE, shape)
    assert heat.shape == shape
    assert heat[corner] > 0.9
    for row in (0, -1):
        for col in (0, -1):
            if (row, col) != corner:
                assert heat[row, col] < 0.01


def test_hottest_pixel_lies_in_the_strongest_patch() -> None:
    for row in range(5):
        for col in range(8):
            heat = place_heat(spot(5, 8, row, col), WHOLE, (150, 160))
            top, left = np.unravel_index(heat.argmax(), heat.shape)
            assert (top // 30, left // 20) == (row, col)


def test_heat_has_the_picture_of_a_ramp() -> None:
    heat = place_heat(np.arange(10, dtype=np.float32)[None], WHOLE, (20, 200))
    assert (np.diff(heat[0]) >= -1e-6).all()
    assert np.allclose(heat, heat[:1])


def cubic_through(line: np.ndarray, length: int) -> list[float]:
    """Interpolate a line by the Bézier points of its monotone cubics, pixel by pixel."""
    ends = [line[0], *line, line[-1]]
    slopes = [0.0]
    for before, here, after in zip(ends, ends[1:], ends[2:], strict=False):
        left, right = float(here - before), float(after - here)
        slopes.append(2 / (1 / left + 1 / right) if left * right > 0 else 0.0)
    slopes.append(0.0)
    values = []
    for pixel in range(length):
        place = (pixel + 0.5) * len(line) / length + 0.5
        cell, t = int(place), place % 1
        points = [
            *(ends[cell], ends[cell] + slopes[cell] / 3),
            *(ends[cell + 1] - slopes[cell + 1] / 3, ends[cell + 1]),
        ]
        while len(points) > 1:  # de Casteljau
            points = [(1 - t) * one + t * other for one, other in pairwise(points)]
        values.append(float(points[0]))
    return values


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 3), (7, 4)], ids=str)
@pytest.mark.parametrize("size", [(7, 5), (64, 31), (50, 200)], ids=str)
def test_interpolation_is_that_of_the_formula(grid: tuple[int, int], size: tuple[int, int]) -> None:
    cells = np.random.default_rng(3).random(grid).astype(np.float32)
    wide = np.array([cubic_through(row, size[1]) for row in cells])
    expected = np.array([cubic_through(col, size[0]) for col in wide.T]).T
    np.testing.assert_allclose(interpolate(cells, size), expected, atol=1e-6)


def test_interpolation_has_the_known_values_of_a_small_line() -> None:
    grown = interpolate(np.array([[0, 1, 4]], np.float32), (1, 27))[0]
    assert grown[[0, 4, 13, 22, 26]].tolist() == [0, 0, 1, 4, 4]  # centres and ends
    t, slope = 8.5 / 9 - 0.5, 1.5  # of pixel 8, and in the middle: 2·1·3/(1 + 3)
    assert grown[8] == pytest.approx(t**2 * (3 - 2 * t) - slope * t**2 * (1 - t), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_interpolation_stays_between_the_cells_around(seed: int) -> None:
    """No rings around hot spots: a pixel is never colder or hotter than the four cells around."""
    cells = (np.random.default_rng(seed).random((6, 9)) ** 8).astype(np.float32)
    size = (6 * 16, 9 * 16)
    grown = interpolate(cells, size)
    padded = np.pad(cells, 1, mode="edge")
    rows, cols = (((np.arange(side) + 0.5) / 16 + 0.5).astype(int) for side in size)
    around = np.stack([padded[np.ix_(rows + down, cols + on)] for down in (0, 1) for on in (0, 1)])
    assert (grown >= around.min(axis=0) - 1e-6).all()
    assert (grown <= around.max(axis=0) + 1e-6).all()


def test_picture_with_fewer_pixels_than_cells_gets_their_averages() -> None:
    cells = np.random.default_rng(0).random((8, 12)).astype(np.float32)
    expected = cells.reshape(4, 2, 3, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(interpolate(cells, (4, 3)), expected, atol=1e-6)


REGIONS = [
    (Region(left=0.25, right=0.75), (100, 200), (slice(0, 100), slice(50, 150))),
    (Region(top=0.1, bottom=0.6), (50, 10), (slice(5, 30), slice(0, 10))),
    (Region(left=1 / 3, right=2 / 3), (10, 300), (slice(0, 10), slice(100, 200))),
    (Region(), (7, 9), (slice(0, 7), slice(0, 9))),
]


@pytest.mark.parametrize(("region", "size", "expected"), REGIONS, ids=str)
def test_heat_covers_exactly_the_region(
    region: Region, size: tuple[int, int], expected: tuple[slice, slice]
) -> None:
    seen = ~np.isnan(place_heat(np.ones((4, 4), np.float32), region, size))
    wanted = np.zeros(size, bool)
    wanted[expected] = True
    assert np.array_equal(seen, wanted)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2), (5, 1000)], ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (14, 14)], ids=str)
def test_any_grid_fits_any_picture(grid: tuple[int, int], size: tuple[int, int]) -> None:
    relevance = np.arange(grid[0] * grid[1], dtype=np.float32).reshape(grid)
    heat = place_heat(relevance, WHOLE, size)
    assert heat.shape == size
    assert np.isfinite(heat).all()
    pixels = np.zeros((*size, 3), np.uint8)
    assert overlay(pixels, heat, Colormap.TURBO, 0.5).shape == (*size, 3)
    assert picture_table([[Cell(picture=pixels)] * 2], title="caption").dtype == np.uint8


def test_sliver_of_a_region_covers_a_pixel() -> None:
    region = Region(left=0.4999, right=0.5001)
    heat = place_heat(np.ones((4, 4), np.float32), region, (3, 10))
    assert (~np.isnan(heat)).any(axis=0).sum() == 1


@pytest.mark.parametrize("side", [7, 8, 15, 16])
def test_lone_hot_patch_is_not_lost_on_any_picture(side: int) -> None:
    # 15×15 patches on pictures both smaller and larger than the grid.
    for row in range(15):
        heat = place_heat(spot(15, 15, row, row), WHOLE, (side, side))
        assert heat.max() > 0


# Colours


@pytest.mark.parametrize("colormap", OF_OPENCV)
def test_strongest_patch_gets_the_last_color(colormap: Colormap) -> None:
    grid = np.random.default_rng(1).random((4, 6)).astype(np.float32) / 2
    grid[1, 2] = 1
    colored = color_heat(place_heat(grid, WHOLE, (60, 90)), colormap)
    assert tuple(colored[22, 37]) == tuple(colors(colormap)[255])


def test_strongest_patch_gets_about_the_last_color_where_no_pixel_is_its_centre() -> None:
    heat = place_heat(spot(14, 14, 6, 9), WHOLE, (224, 224))
    assert heat.max() >= 0.99


def test_weakest_patch_gets_the_first_color() -> None:
    colored = color_heat(place_heat(1 - spot(3, 3, 1, 1), WHOLE, (9, 9)), Colormap.TURBO)
    assert tuple(colored[4, 4]) == tuple(colors(Colormap.TURBO)[0])


def test_colors_are_rgb() -> None:
    hot = color_heat(np.ones((1, 1), np.float32), Colormap.JET)[0, 0]
    cold = color_heat(np.zeros((1, 1), np.float32), Colormap.JET)[0, 0]
    assert hot[0] > 100 > hot[2]
    assert cold[2] > 100 > cold[0]


def test_heat_is_rounded_not_cut() -> None:
    table = colors(Colormap.VIRIDIS)
    levels = color_heat(np.array([[99.99 / 255, 99.01 / 255]], np.float32), Colormap.VIRIDIS)
    assert np.array_equal(levels[0], table[[100, 99]])


@pytest.mark.parametrize("colormap", OF_OPENCV)
def test_colors_are_those_of_opencv(colormap: Colormap) -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    assert np.array_equal(color_heat(ramp, colormap)[0], colors(colormap))


@pytest.mark.parametrize("colormap", list(Colormap))
def test_heat_that_is_rounded_otherwise_has_the_same_color_but_for_one(colormap: Colormap) -> None:
    heat = np.random.default_rng(0).random((200, 200)).astype(np.float32)
    one, other = (color_heat(each, colormap).astype(int) for each in (heat, heat * (1 - 1e-5)))
    assert np.abs(one - other).max() <= 1


def test_unseen_pixels_are_black_in_a_heatmap_and_warn_of_nothing() -> None:
    heat = np.full((2, 2), np.nan, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (color_heat(heat, Colormap.TURBO) == 0).all()


# Overlays


def in_grey(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels @ [0.299, 0.587, 0.114])[..., None]


def test_alpha_zero_shows_the_picture_in_grey() -> None:
    pixels = np.asarray(picture(30, 40))
    heat = place_heat(spot(3, 3, 0, 0), WHOLE, (30, 40))
    shown = overlay(pixels, heat, Colormap.TURBO, 0).astype(float)
    assert np.abs(shown - in_grey(pixels)).max() <= 1


def test_alpha_one_shows_the_hottest_alone() -> None:
    heat = place_heat(spot(3, 3, 0, 0), WHOLE, (30, 40))
    shown = overlay(np.asarray(picture(30, 40)), heat, Colormap.TURBO, 1)
    hottest = heat == 1
    assert np.array_equal(shown[hottest], color_heat(heat, Colormap.TURBO)[hottest])


@pytest.mark.parametrize(("signed", "colormap"), [(False, Colormap.HOT), (True, Colormap.REDBLUE)])
def test_colour_of_an_overlay_weighs_the_more_the_hotter_it_is(
    signed: bool, colormap: Colormap
) -> None:
    pixels = np.asarray(picture(30, 40))
    relevance = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    heat = place_heat(relevance, WHOLE, (30, 40), signed=signed)
    strength = abs(2 * heat - 1) if signed else heat
    weight = 0.3 * (1 - (1 - strength[..., None]) ** 2)
    mixed = weight * color_heat(heat, colormap) + (1 - weight) * in_grey(pixels)
    shown = overlay(pixels, heat, colormap, 0.3, signed=signed)
    assert np.abs(shown - mixed).max() <= 1.01


def test_overlay_leaves_its_inputs_alone() -> None:
    pixels = np.asarray(picture(30, 40)).copy()
    heat = place_heat(spot(3, 3, 0, 0), Region(left=0.5), (30, 40))
    before = pixels.copy(), heat.copy()
    overlay(pixels, heat, Colormap.TURBO, 0.5)
    assert np.array_equal(pixels, before[0])
    assert np.array_equal(heat, before[1], equal_nan=True)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_overlay_dims_what_the_model_did_not_see(alpha: float) -> None:
    pixels = np.asarray(picture(40, 100))
    heat = place_heat(spot(3, 3, 1, 1), Region(left=0.3, right=0.7), (40, 100))
    shown = overlay(pixels, heat, Colormap.TURBO, alpha)
    unseen = np.isnan(heat)
    assert unseen.any()
    assert np.abs(shown[unseen] - 0.4 * in_grey(pixels)[unseen]).max() <= 1.01


# Explanations


def sample(height: int, width: int, fit: Fit, max_size: int = 1024) -> ImageSample:
    frame = InputTransform(
        fit=fit,
        size=(64, 64),
        patch=(16, 16),
        resample=Image.Resampling.BICUBIC,
        crop_pct=1.0,
    )
    return sample_of(picture(height, width), "x", frame, max_size)


def explanation(image: ImageSample, relevance: np.ndarray, **pictures: object) -> Explanation:
    return Explanation(
        method=Rollout(),
        relevance=relevance,
        sample=image,
        pictures=PictureOptions(**pictures),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("fit", Fit)
@pytest.mark.parametrize("shape", [(120, 360), (360, 120)], ids=str)
def test_interesting_top_left_lights_up_top_left(fit: Fit, shape: tuple[int, int]) -> None:
    image = sample(*shape, fit)
    rows, cols = (side // 16 for side in image.pixels.shape[:2])
    shown = np.asarray(explanation(image, spot(rows, cols, 0, 0), alpha=1.0).overlay())
    assert shown.shape == (*shape, 3)
    top, left = 0, 0
    if fit is Fit.CROP:  # the crop begins where its centred square does
        top, left = (max(side - min(shape), 0) // 2 for side in shape)
    hot = colors(Colormap.INFERNO)[255].astype(int)
    distance = np.abs(shown.astype(int) - hot).sum(axis=-1)
    warm = np.argwhere(distance < 60)
    assert len(warm)
    assert warm.min(axis=0).tolist() == [top, left]
    extent = [min(shape) if fit is Fit.CROP else side for side in shape]
    assert (warm.max(axis=0) < [top + 1.5 * extent[0] / rows, left + 1.5 * extent[1] / cols]).all()


@pytest.mark.parametrize("shape", [(120, 360), (360, 120), (121, 365)], ids=str)
def test_crop_dims_the_rest_of_the_picture(shape: tuple[int, int]) -> None:
    image = sample(*shape, Fit.CROP)
    shown = np.asarray(explanation(image, np.zeros((4, 4), np.float32)).overlay())
    changed = np.abs(shown - in_grey(image.picture)).max(axis=-1) <= 1  # no heat: as it is
    changed[:, in_grey(image.picture).max(axis=(0, 2)) < 4] = False  # black, bright or dimmed
    rows, cols = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    side = min(shape)
    assert abs(rows[0] - (shape[0] - side) / 2) <= 1.5
    assert abs(cols[0] - (shape[1] - side) / 2) <= 1.5
    assert abs(rows[-1] + 1 - (shape[0] + side) / 2) <= 1.5
    assert abs(cols[-1] + 1 - (shape[1] + side) / 2) <= 1.5


def test_crop_lies_where_the_model_looked() -> None:
    # A picture whose columns are numbered: what the model saw tells where it came from.
    columns = np.tile(np.arange(200, dtype=np.uint8), (64, 1))
    frame = InputTransform(
        fit=Fit.CROP,
        size=(64, 64),
        patch=(16, 16),
        resample=Image.Resampling.NEAREST,
        crop_pct=1.0,
    )
    image = sample_of(columns, "x", frame, 1024)
    _, cols = image.region.pixels((64, 200))
    assert (image.pixels[0, 0, 0], image.pixels[0, -1, 0]) == (cols.start, cols.stop - 1)


def test_constant_map_shows_no_heat() -> None:
    image = sample(64, 64, Fit.SQUASH)
    shown = np.asarray(explanation(image, np.full((4, 4), 0.2, np.float32)).heatmap())
    assert (shown == colors(Colormap.INFERNO)[0]).all()


def test_panel_sets_three_pictures_side_by_side() -> None:
    image = sample(50, 80, Fit.SQUASH)
    made = explanation(image, spot(4, 4, 1, 1))
    sheet = np.asarray(made.panel())
    height, width = sheet.shape[:2]
    gap = (width - 3 * 80) // 2
    assert width == 3 * 80 + 2 * gap
    (band,) = (
        top
        for top in range(height - 50)
        if np.array_equal(sheet[top : top + 50, :80], image.picture)
    )
    expected = (image.picture, np.asarray(made.overlay()), np.asarray(made.heatmap()))
    for position, shown in enumerate(expected):
        left = position * (80 + gap)
        assert np.array_equal(sheet[band : band + 50, left : left + 80], shown)
    assert (sheet[:band] < 128).any()  # the caption


def test_panel_of_a_tiny_picture_with_any_label_is_drawn() -> None:
    image = sample(1, 1, Fit.SQUASH)
    made = Explanation(
        method=GradRollout(),
        relevance=spot(4, 4, 0, 0),
        sample=image,
        request="c1",
        class_index=1,
        class_label="Égyptian 猫 \U0001f408 \n [red]",
        class_score=0.25,
    )
    assert made.panel().size[0] > 3


def test_pictures_are_as_large_as_max_size() -> None:
    image = sample(100, 400, Fit.CROP, max_size=200)
    made = explanation(image, spot(4, 4, 0, 0))
    assert made.overlay().size == made.heatmap().size == (200, 50)


def test_notebook_shows_the_overlay() -> None:
    made = explanation(sample(20, 30, Fit.SQUASH), spot(4, 4, 0, 0))
    assert made._repr_png_().startswith(b"\x89PNG")


def test_caption_says_class_and_score() -> None:
    image = sample(20, 30, Fit.SQUASH)
    made = Explanation(
        method=GradRollout(),
        relevance=spot(4, 4, 0, 0),
        sample=image,
        request="c3",
        class_index=3,
        class_label="tabby, tabby cat",
        class_score=0.254,
    )
    assert made.caption == "grad-rollout: tabby, tabby cat (25%)"
    assert replace(made, class_score=0.049).caption.endswith("(5%, improbable)")
    assert replace(made, class_score=0.051).caption.endswith("(5%)")
    assert replace(made, class_score=0.0004).caption.endswith("(<1%, improbable)")
    assert explanation(image, spot(4, 4, 0, 0)).caption == "rollout"


def test_sources_are_named(tmp_path: Path) -> None:
    image = sample(20, 30, Fit.SQUASH)
    assert isinstance(image.source, Source)


def test_zero_is_the_middle_of_a_signed_map() -> None:
    relevance = np.array([[-1.0, 0.0], [2.0, 4.0]], np.float32)
    np.testing.assert_allclose(normalize(relevance, signed=True), [[0.375, 0.5], [0.75, 1.0]])


def test_signed_map_without_range_is_all_middle() -> None:
    assert (normalize(np.full((2, 2), 3.0), signed=True) == 0.5).all()
    assert (normalize(np.zeros((2, 2)), signed=True) == 0.5).all()


def test_redblue_is_red_above_the_middle_blue_below_and_white_there() -> None:
    heat = np.array([[0.0, 0.25, 0.5, 0.75, 1.0]], np.float32)
    red, green, blue = np.moveaxis(color_heat(heat, Colormap.REDBLUE)[0].astype(int), -1, 0)
    assert (np.sign(red - blue) == [-1, -1, 0, 1, 1]).all()
    assert min(red[2], green[2], blue[2]) >= 246
    assert green.argmax() == 2  # colours deepen to both sides


def test_evidence_is_drawn_with_its_sign() -> None:
    pixels = np.full((8, 8, 3), 128, np.uint8)
    sample = sample_of(
        pixels,
        "gray",
        InputTransform(
            fit=Fit.SQUASH,
            size=(8, 8),
            patch=(4, 4),
            resample=Image.Resampling.BICUBIC,
            crop_pct=1.0,
        ),
        1024,
    )
    relevance = np.array([[-2.0, 0.0], [0.0, 1.0]], np.float32)
    drawn = Explanation(method=Evidence(), relevance=relevance, sample=sample).heatmap()
    against, speaking = drawn.getpixel((0, 0)), drawn.getpixel((7, 7))
    assert against[2] > against[0] + 50
    assert speaking[0] > speaking[2] + 20


@pytest.mark.parametrize("method", [Evidence(), Relevance()])
def test_all_colour_of_an_overlay_is_heat(method: Method) -> None:
    image = sample(64, 64, Fit.SQUASH)
    made = Explanation(method=method, relevance=spot(4, 4, 0, 0), sample=image)
    shown = np.asarray(made.overlay()).astype(int)
    assert np.ptp(shown[32:, 32:], axis=-1).max() <= 1  # where there is no heat
    assert np.ptp(shown[:16, :16], axis=-1).min() > 20
    assert np.ptp(np.asarray(made.panel())[-64:, :64].astype(int), axis=-1).max() > 20  # the image


def test_heat_with_a_sign_has_the_sign_of_its_cells() -> None:
    relevance = np.zeros((6, 6), np.float32)
    relevance[2:4, 2:4] = 1
    assert place_heat(relevance, Region(), (96, 96), signed=True).min() == 0.5
    assert place_heat(-relevance, Region(), (96, 96), signed=True).max() == 0.5
