"""What colours mean: units, scales, colour bars, and the tables of pictures that show them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fixtures_io import Shell, picture
from vitviz.errors import OptionError
from vitviz.explaining.explanation import Explanation
from vitviz.images.fitting import InputTransform
from vitviz.images.samples import ImageSample, sample_of
from vitviz.methods.attention import RawAttention
from vitviz.methods.evidence import Evidence
from vitviz.methods.method import Method
from vitviz.methods.relevance import Relevance
from vitviz.options import Colormap, Fit, Outliers, OutputKind, PictureOptions, Scale, Unit
from vitviz.pictures.colors import color_heat
from vitviz.pictures.heat import in_unit, limits
from vitviz.pictures.tables import GAP, Cell, ColorBar, picture_table

GRID = np.array([[1, 3], [0, 4]], np.float32)


def sample(height: int = 64, width: int = 64) -> ImageSample:
    frame = InputTransform(fit=Fit.SQUASH, size=(64, 64), patch=(16, 16), resample=3, crop_pct=1.0)
    return sample_of(picture(height, width), "photo.jpg", frame, 1024)


def explained(method: Method, relevance: NDArray[np.float32], **pictures: object) -> Explanation:
    return Explanation(
        method=method,
        relevance=relevance,
        sample=sample(),
        model="tiny",
        pictures=PictureOptions(**pictures),  # type: ignore[arg-type]
    )


# Units


def test_relevance_counts_in_times_what_an_even_map_would_have() -> None:
    assert in_unit(GRID * 1e-6, Unit.AVERAGE).tolist() == [[0.5, 1.5], [0, 2]]
    assert in_unit(np.full((3, 5), 1e-9, np.float32), Unit.AVERAGE) == pytest.approx(1)
    assert not in_unit(np.zeros((3, 5), np.float32), Unit.AVERAGE).any()


@pytest.mark.parametrize("unit", [Unit.LOGIT, Unit.COSINE])
def test_evidence_and_similarity_count_as_they_are(unit: Unit) -> None:
    assert np.array_equal(in_unit(GRID, unit), GRID)


def test_limits_are_those_of_the_map_unless_a_scale_is_given() -> None:
    assert limits(GRID) == (0, 4)
    assert limits(GRID - 3, signed=True) == (-3, 3)
    assert limits(GRID, extent=(0, 10)) == (0, 10)
    assert limits(GRID, signed=True, extent=(-1, 2)) == (-2, 2)
    assert limits(np.ones((2, 2))) is None
    assert limits(np.ones((2, 2)), extent=(0, 2)) == (0, 2)


# Scales


@pytest.mark.parametrize("given", ["0:10", (0, 10), Scale(low=0, high=10), [0.0, "10"]])
def test_scale_is_read_in_each_form(given: object) -> None:
    assert PictureOptions(scale=given).extent == (0, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [None, "image"])
def test_each_map_decides_by_default(given: str | None) -> None:
    assert PictureOptions(scale=given).extent is None


@pytest.mark.parametrize("given", ["1", "2:1", "1:1", "a:b", "0:inf", "nan:1", "0:1:2", 3, (1,)])
def test_scale_that_is_none_is_refused(given: object) -> None:
    with pytest.raises(OptionError, match="--scale is .*LOW:HIGH"):
        PictureOptions(scale=given)  # type: ignore[arg-type]


def test_two_images_of_one_scale_have_one_colour_for_one_relevance() -> None:
    one, other = GRID, np.array([[4, 0], [2, 2]], np.float32)  # both of sum 8: 4 is twice the mean
    maps = [explained(Relevance(), each, scale="0:4").heatmap() for each in (one, other)]
    assert maps[0].getpixel((63, 63)) == maps[1].getpixel((0, 0))
    half = color_heat(np.full((1, 1), 0.5, np.float32), Colormap.INFERNO)[0, 0]
    assert maps[0].getpixel((63, 63)) == tuple(half)


def test_scale_is_in_the_recipe_of_pictures_but_not_of_numbers() -> None:
    options = PictureOptions(scale="0:2.5")
    assert options.to_record(OutputKind.OVERLAY, Colormap.HOT)["scale"] == "0:2.5"
    assert PictureOptions().to_record(OutputKind.OVERLAY, Colormap.HOT)["scale"] == "image"
    assert not options.to_record(OutputKind.NPY, Colormap.HOT)


def test_pictures_of_another_scale_are_not_skipped(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shell = Shell(capfdbinary, monkeypatch)
    picture(40, 40).save("a.png")
    statuses = []
    for extra in ([], [], ["--scale", "0:9"], ["--scale", "0:9"], ["--scale", "-1:9"]):
        done = shell("relevance", "-m", "demo", "a.png", "--skip-existing", "--json", *extra)
        statuses += [record["status"] for record in done.records]
    assert statuses == ["written", "skipped", "written", "skipped", "written"]
    assert done.records[0]["run"]["options"]["scale"] == "-1:9"


# Colour bars


def test_bar_has_the_numbers_of_the_map() -> None:
    bar = explained(Relevance(), GRID / 7).color_bar()
    assert (bar.low, bar.high, bar.unit) == ("0", "2", "times average")
    bar = explained(Evidence(), GRID - 3).color_bar()
    assert (bar.low, bar.high, bar.unit) == ("-3", "3", "logit")
    bar = explained(Evidence(), GRID - 3, scale="-0.5:0.5").color_bar()
    assert (bar.low, bar.high) == ("-0.5", "0.5")
    assert explained(Relevance(), np.ones((2, 2), np.float32)).color_bar().unit == "no heat"


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0.0003, 15.28), ("0", "15.3")),
        ((-2.041, 2.041), ("-2.04", "2.04")),
        ((-0.0001, 3), ("0", "3")),
        ((0.0123, 0.4567), ("0.012", "0.457")),
        ((120, 1234.5), ("120", "1234")),
        ((0, 1.5e-9), ("0.00e+00", "1.50e-09")),
    ],
)
def test_numbers_of_a_bar_have_the_figures_of_the_larger_one(
    ends: tuple[float, float], expected: tuple[str, str]
) -> None:
    relevance = np.array([ends], np.float32)
    bar = explained(Relevance(), relevance, scale=ends).color_bar()
    assert (bar.low, bar.high) == expected


def test_bar_of_many_heads_has_numbers_only_where_they_share_a_scale() -> None:
    heads = np.random.default_rng(0).random((2, 3, 2, 2)).astype(np.float32)
    bar = explained(RawAttention(), heads).color_bar()
    assert (bar.low, bar.high, bar.unit) == ("least", "most", "of each head")
    bar = explained(RawAttention(), heads, scale="0:5").color_bar()
    assert (bar.low, bar.high, bar.unit) == ("0", "5", "times average")


def test_bar_goes_from_the_first_colour_to_the_last() -> None:
    bar = ColorBar(colormap=Colormap.INFERNO, low="0", high="1", unit="logit")
    drawn = np.asarray(bar.draw(200, 12))
    assert drawn.shape == (ColorBar.height(12), 200, 3)
    ramp = np.linspace(0, 1, 200, dtype=np.float32)[None]
    assert np.array_equal(drawn[GAP], color_heat(ramp, Colormap.INFERNO)[0])
    words = drawn[GAP + 6 :] < 200
    assert words[:, :50].any()
    assert words[:, 75:125].any()
    assert words[:, 150:].any()


# Outliers

CORNER = np.array([[True, False], [False, False]])
HOT_CORNER = np.array([[8, 1], [0, 2]], np.float32)


def framed(made: Explanation) -> list[tuple[int, int]]:
    """Return which quarters of a picture of 64 × 64 have a frame, white around dark."""
    shown = made.draw(OutputKind.HEATMAP)
    return [
        (row, col)
        for row in (0, 1)
        for col in (0, 1)
        for quarter in [shown[32 * row : 32 * row + 32, 32 * col : 32 * col + 32]]
        if (quarter[0] == 255).all()
        and (quarter[:, -1] == 255).all()
        and (quarter[1, 1] == 30).all()
    ]


def with_outlier(choice: str, relevance: NDArray[np.float32] = HOT_CORNER) -> Explanation:
    made = explained(Evidence(), relevance, outliers=Outliers(choice))
    return replace(made, outliers=CORNER)


def test_muted_outliers_are_no_part_of_the_range_and_framed_beyond_it() -> None:
    made = with_outlier("mute")
    assert made.color_bar().high == "2"
    assert framed(made) == [(0, 0)]
    assert made.heatmap().getpixel((48, 48)) == made.heatmap().getpixel((16, 16))  # hottest both


def test_muted_outlier_within_the_range_is_left_alone() -> None:
    relevance = np.array([[1, 1], [0, 2]], np.float32)
    made = with_outlier("mute", relevance)
    assert framed(made) == []
    assert np.array_equal(made.heatmap(), with_outlier("show", relevance).heatmap())


def test_marked_outliers_are_framed_and_part_of_the_range() -> None:
    made = with_outlier("mark")
    assert made.color_bar().high == "8"
    assert framed(made) == [(0, 0)]


def test_shown_outliers_are_like_all_others() -> None:
    made = with_outlier("show")
    assert made.color_bar().high == "8"
    assert framed(made) == []


def test_finer_map_is_muted_and_framed_by_patches() -> None:
    made = with_outlier("mute", np.kron(HOT_CORNER, np.array([[1, 0.5], [0.5, 1]])))
    assert made.color_bar().high == "2"
    assert framed(made) == [(0, 0)]


@pytest.mark.parametrize(("choice", "framed"), [("mark", True), ("mute", True), ("show", False)])
def test_panel_says_what_frames_mean(choice: str, framed: bool) -> None:
    assert with_outlier(choice).details.endswith("framed: patches of outlying norm") is framed


def test_map_of_nothing_but_outliers_is_drawn_all_the_same() -> None:
    made = replace(with_outlier("mute"), outliers=np.ones((2, 2), dtype=bool))
    assert made.color_bar().high == "8"


def test_outliers_of_a_picture_are_in_its_recipe() -> None:
    options = PictureOptions(outliers=Outliers.MARK).to_record(OutputKind.GRAY, Colormap.HOT)
    assert options["outliers"] == "mark"


# Tables


@pytest.mark.parametrize("names", [(), ("tabby", "beagle")])
@pytest.mark.parametrize("has_bar", [False, True])
def test_table_sets_rows_and_columns(names: tuple[str, ...], has_bar: bool) -> None:
    pictures = [np.full((60, 90, 3), 20 * number, np.uint8) for number in range(6)]
    bar = ColorBar(colormap=Colormap.HOT, low="0", high="1", unit="logit") if has_bar else None
    cells = [Cell(picture=each, title="map", bar=bar) for each in pictures]
    sheet = picture_table([cells[:3], cells[3:]], title="title", names=names)
    assert sheet.shape[1] == 3 * 90 + 2 * GAP
    places = [
        np.argwhere((sheet[:, left] == pictures[number][0, 0]).all(axis=-1)).ravel()
        for number, left in ((1, 90 + GAP + 45), (4, 90 + GAP + 45))
    ]
    assert [len(rows) for rows in places] == [60, 60]
    between = places[1][0] - places[0][-1] - 1
    line, title = 12 * 7 // 4, 11 * 7 // 4
    assert between == (ColorBar.height(11) if has_bar else 0) + title + (line if names else 0)


@pytest.mark.parametrize("width", [1, 30, 200])
def test_long_words_stay_in_their_room(width: int) -> None:
    pixels = np.zeros((10, width, 3), np.uint8)
    words = "Ölgötz \u732b \U0001f408 " * 20
    cells = [Cell(picture=pixels, title=words), Cell(picture=pixels)]
    sheet = picture_table([cells], title=words, subtitle=words)
    assert sheet.shape[1] == 2 * width + GAP
    band = sheet[: len(sheet) - 10]
    assert (band[-(11 * 7 // 4) :, width + GAP :] == 255).all()  # the title is of the other one
