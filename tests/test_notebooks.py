"""Maps in notebooks: what draws itself, grids of maps, images as people hold them there."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitviz
from fixtures_io import picture, places, tiny_model
from tests import notebook
from vitviz.errors import ImageError, OptionError
from vitviz.explaining.explanation import Explanation
from vitviz.options import OutputKind
from vitviz.pictures.tables import GAP


def opened(png: bytes | None) -> Image.Image:
    assert png is not None
    return Image.open(io.BytesIO(png))


def maps_of(*sizes: tuple[int, int]) -> list[Explanation]:
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    return vitviz.relevance(tiny_model(), images)


def where(sheet: Image.Image, picture: Image.Image) -> list[tuple[int, int]]:
    """Find a picture in a sheet: (left, top) of each place where it stands."""
    return [(left, top) for top, left in places(np.asarray(sheet), np.asarray(picture))]


def test_grid_has_the_overlays_in_order_row_by_row() -> None:
    maps = maps_of((48, 64), (48, 64), (48, 64))
    sheet = vitviz.grid(maps, columns=2, cell=64)
    assert sheet.width == 2 * 64 + GAP
    (first,), (second,), (third,) = (where(sheet, each.overlay()) for each in maps)
    assert (first[0], second[0], third[0]) == (0, 64 + GAP, 0)
    assert first[1] == second[1] < third[1] - 48


def test_grid_scales_to_the_longest_side_and_centres_what_is_smaller() -> None:
    wide, high = maps_of((32, 64), (64, 32))
    sheet = vitviz.grid([wide, high], cell=128)
    assert sheet.width == 2 * 128 + GAP
    small = high.overlay().resize((64, 128), Image.Resampling.LANCZOS)
    ((left, top),) = where(sheet, small)
    assert left == 128 + GAP + 32
    ((_, top_of_wide),) = where(sheet, wide.overlay().resize((128, 64), Image.Resampling.LANCZOS))
    assert top_of_wide == top + 32


def test_grid_says_what_each_map_is_and_what_its_colours_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []

    def write(draw: Any, place: Any, text: str, **how: Any) -> None:
        said.append(text)

    monkeypatch.setattr("vitviz.pictures.tables.write", write)
    (of_class,) = vitviz.evidence(tiny_model(), picture(48, 64), classes="1")
    (blind,) = vitviz.rollout(tiny_model(), picture(48, 64, seed=1))
    vitviz.grid([of_class, blind])
    titles = said[:2]
    assert titles == ["evidence, rollout", of_class.model]
    assert f"image 0: {of_class.subject}" in said
    assert "image 0" in said
    for each in (of_class, blind):
        bar = each.color_bar()
        assert {bar.low, bar.high, bar.unit} <= set(said)


def test_grid_of_fewer_maps_than_columns_has_no_empty_ones() -> None:
    assert vitviz.grid(maps_of((48, 64)), columns=4, cell=64).width == 64


@pytest.mark.parametrize("numbers", [{"columns": 0}, {"cell": 0}, {"columns": 1.5}])
def test_grid_of_impossible_numbers_is_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        vitviz.grid(maps_of((48, 64)), **numbers)


def test_grid_of_no_maps_is_refused() -> None:
    with pytest.raises(OptionError, match="0 maps"):
        vitviz.grid([])


def test_list_of_maps_shows_itself_as_a_grid() -> None:
    maps = vitviz.relevance(tiny_model(), [picture(48, 64), picture(48, 64, seed=1)])
    assert np.array_equal(opened(maps._repr_png_()), vitviz.grid(maps))  # type: ignore[attr-defined]
    assert isinstance(maps, list)


def test_list_of_no_maps_shows_nothing() -> None:
    assert vitviz.relevance(tiny_model(), [])._repr_png_() is None  # type: ignore[attr-defined]


def test_features_show_themselves_as_a_grid_in_their_colours() -> None:
    parts = vitviz.features(tiny_model(), [picture(48, 64), picture(48, 64, seed=1)])
    sheet = opened(parts._repr_png_())  # type: ignore[attr-defined]
    assert np.array_equal(sheet, vitviz.grid(parts))
    overlay = Image.fromarray(parts[0].draw(OutputKind.OVERLAY))
    assert where(sheet.convert("RGB"), overlay.resize((280, 210), Image.Resampling.LANCZOS))


def test_model_shows_its_name_device_readout_and_grid() -> None:
    text = repr(tiny_model())
    assert text.startswith(f"<Model {tiny_model().name} on cpu: ")
    rows, cols = tiny_model().layout.grid
    assert f"class token, {rows}×{cols} patches" in text


def test_one_image_needs_no_list(tmp_path: Path) -> None:
    image = picture(48, 64)
    path = tmp_path / "a.png"
    image.save(path)
    (expected,) = vitviz.relevance(tiny_model(), [image])
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    for one in (image, path, str(path), np.asarray(image), tensor):
        (found,) = vitviz.relevance(tiny_model(), one)
        assert np.array_equal(found.relevance, expected.relevance), type(one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tensor_of_floats_is_an_image(dtype: torch.dtype) -> None:
    pixels = np.asarray(picture(48, 64))
    tensor = (torch.from_numpy(pixels.copy()).permute(2, 0, 1).double() / 255).to(dtype)
    (found,) = vitviz.relevance(tiny_model(), tensor.requires_grad_())
    assert np.array_equal(found.sample.picture, pixels)


def test_several_tensors_are_several_images() -> None:
    batch = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    found = vitviz.relevance(tiny_model(), batch)
    assert len(found) == 3
    (last,) = vitviz.relevance(tiny_model(), batch[2])
    np.testing.assert_allclose(found[2].relevance, last.relevance, rtol=1e-4, atol=1e-7)


def test_floats_beyond_one_are_refused_with_what_they_are() -> None:
    normalised = torch.linspace(-2, 2, 3 * 48 * 64).reshape(3, 48, 64)
    with pytest.raises(ImageError, match=r"image 0 .*-2.*2"):
        vitviz.relevance(tiny_model(), normalised)
    (found,) = vitviz.relevance(tiny_model(), normalised, value_range=(-2, 2))
    assert found.sample.picture[0, 0, 0] == 0
    assert found.sample.picture[-1, -1, 2] == 255


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(OptionError, match="expected images, and got int"):
        vitviz.relevance(tiny_model(), 7)  # type: ignore[arg-type]


@pytest.mark.slow
def test_notebook_runs_and_shows_what_it_gives() -> None:
    cells = [cell for cell in notebook.read()["cells"] if cell["cell_type"] == "code"]
    for cell, outputs in zip(cells, notebook.run(cells), strict=True):
        source = "".join(cell["source"])
        for shown, found in zip(cell["outputs"], outputs, strict=True):
            assert shown["output_type"] == found["output_type"], source
            assert shown.get("text") == found.get("text"), source
            assert set(shown.get("data", ())) == set(found.get("data", ())), source
            if "text/plain" in shown.get("data", ()):
                assert _without_device(shown["data"]) == _without_device(found["data"]), source


def _without_device(data: dict[str, Any]) -> str:
    return re.sub(r" on \w+:", "", "".join(data["text/plain"]))
