"""The sample scenes that come with the project are those that its own code paints."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures_io import ROOT
from tests.demo_model import CLASSES, samples
from tests.demo_model.scenes import paint_scene

SHIPPED = ROOT / "sample_images"


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return samples.write_samples(tmp_path_factory.mktemp("samples"))


def pixels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_shipped_scenes_and_masks_are_painted_again(painted: list[Path]) -> None:
    scenes = SHIPPED / "scenes"
    assert sorted(path.name for path in painted) == sorted(p.name for p in scenes.glob("*.png"))
    for path in painted:
        # Another OpenCV may round an edge in another way.
        difference = pixels(path).astype(int) - pixels(scenes / path.name)
        assert np.abs(difference).mean() < 1
        mask = pixels(path.parent / ".masks" / path.name)
        assert (mask == pixels(scenes / ".masks" / path.name)).mean() > 0.999


def test_mask_of_a_sample_shows_where_each_object_of_its_scene_is(painted: list[Path]) -> None:
    for path, seed in zip(painted, samples.SEEDS, strict=True):
        scene = paint_scene(seed)
        mask = pixels(path.parent / ".masks" / path.name)
        assert np.array_equal(mask, scene.mask)
        for item in scene.objects:
            rows, cols = np.nonzero(mask == item.class_index + 1)
            assert len(rows), CLASSES[item.class_index]
            reach = 1.4 * item.radius * len(mask)  # stretched by an eighth; a moon lies off centre
            assert np.abs(rows - item.center[0] * len(mask)).max() <= reach
            assert np.abs(cols - item.center[1] * len(mask)).max() <= reach


def test_every_class_of_a_mask_has_a_colour_of_its_own(painted: list[Path]) -> None:
    with Image.open(painted[0].parent / ".masks" / painted[0].name) as mask:
        palette = mask.getpalette()
    assert palette is not None
    colours = [tuple(palette[3 * index : 3 * index + 3]) for index in range(len(CLASSES) + 1)]
    assert colours[0] == (0, 0, 0)
    assert len(set(colours)) == len(colours)


def test_command_tells_what_it_has_painted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["samples", str(tmp_path)])
    samples.main()
    told = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(told) == sorted((tmp_path / "scenes").glob("*.png"))
    assert len(told) == len(samples.SEEDS)
