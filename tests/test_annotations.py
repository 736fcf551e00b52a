"""Masks and true classes: found by name, fitted as images are, refused when they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitviz.errors import ImageError, LabelError, OptionError
from vitviz.evaluation.annotations import find_mask, fit_mask, load_mask, read_truth, true_class
from vitviz.images.decoding import read_file
from vitviz.images.fitting import InputTransform
from vitviz.images.samples import load_sample, sample_of
from vitviz.images.sources import Source
from vitviz.models.labels import Labels
from vitviz.options import Fit

LABELS = Labels(names=("tench, Tinca tinca", "tabby, tabby cat", "sky"))


def source(key: str) -> Source:
    return Source(path=Path("/somewhere") / key, key=key)


def frame(fit: Fit, size: tuple[int, int] = (32, 32)) -> InputTransform:
    return InputTransform(
        fit=fit, size=size, patch=(8, 8), resample=Image.Resampling.BICUBIC, crop_pct=0.875
    )


# Masks


def test_mask_of_the_most_folders_is_taken(tmp_path: Path) -> None:
    image = source("photos/cats/tom.jpg")
    assert find_mask(tmp_path, image) is None
    for name in ("tom.png", "cats/tom.png", "photos/cats/tom.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert find_mask(tmp_path, image) == path
    assert find_mask(tmp_path, source("dogs/rex.jpg")) is None


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_mask_gives_its_values(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (3, 2), 0)
    image.putpixel((2, 0), 1)
    if mode == "P":
        image.putpalette([9, 9, 9, 200, 0, 0])
    image.save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png").tolist() == [[0, 0, 1], [0, 0, 0]]


def test_mask_with_colours_or_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.new("RGB", (3, 2)).save(path)
    with pytest.raises(ImageError, match=r"mask.*RGB"):
        load_mask(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ImageError, match=r"mask.*no PNG"):
        load_mask(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"mask.*empty"):
        load_mask(path)


@pytest.mark.parametrize("fit", Fit)
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (48, 48)])
def test_mask_lies_where_its_object_lies(fit: Fit, size: tuple[int, int]) -> None:
    """The image is white where its mask says so: what the model sees must agree, but for edges."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[10:31, 26:45] = 7
    picture = np.repeat((mask > 0)[:, :, None] * np.uint8(255), 3, axis=2)
    sample = sample_of(picture, "picture", frame(fit), max_size=1)
    fitted = fit_mask(mask, frame(fit), sample.size)
    assert fitted.shape == sample.pixels.shape[:2]
    assert set(np.unique(fitted)) == {0, 7}
    sure = np.isin(sample.pixels[:, :, 0], (0, 255))
    assert sure.mean() > 0.5
    assert np.array_equal((fitted > 0)[sure], (sample.pixels[:, :, 0] > 127)[sure])


def test_mask_may_be_smaller_than_its_image_but_of_no_other_shape() -> None:
    assert fit_mask(np.ones((30, 45)), frame(Fit.CROP), (60, 90)).shape == (32, 32)
    with pytest.raises(ImageError, match=r"60×90 pixels, but its mask has 45×30"):
        fit_mask(np.ones((45, 30)), frame(Fit.CROP), (60, 90))
    with pytest.raises(ImageError, match="mask has 60×90×3"):
        fit_mask(np.ones((60, 90, 3)), frame(Fit.CROP), (60, 90))


# True classes


def test_truth_is_read_by_index_and_label(tmp_path: Path) -> None:
    path = tmp_path / "truth.txt"
    path.write_text("a.jpg 2\ncats/b c.jpg\ttabby, tabby cat\n\nd.jpg  Tench\n", encoding="utf-8")
    truth = read_truth(path, LABELS, 3)
    assert truth == {"a.jpg": 2, "cats/b c.jpg": 1, "d.jpg": 0}
    assert true_class(truth, source("folder/cats/b c.jpg")) == 1
    assert true_class(truth, source("x/a.jpg")) == 2
    assert true_class(truth, source("e.jpg")) is None


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("a.jpg", OptionError, "line 2: expected a name and a class"),
        ("a.jpg 3", LabelError, r"line 2.*outside"),
        ("a.jpg tabbby", LabelError, r"line 2.*tabby"),
        ("a.jpg top1", LabelError, r"line 2.*rank"),
    ],
)
def test_wrong_line_is_named(
    tmp_path: Path, line: str, error: type[Exception], message: str
) -> None:
    path = tmp_path / "truth.txt"
    path.write_text(f"b.jpg 0\n{line}\n", encoding="utf-8")
    with pytest.raises(error, match=message):
        read_truth(path, LABELS, 3)


def test_truth_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_truth(tmp_path / "gone.txt", LABELS, 3)


@pytest.mark.parametrize("fit", Fit)
@pytest.mark.parametrize("size", [(1366, 683), (683, 1366), (901, 307)])
@pytest.mark.parametrize("smaller", [1, 2, 3])
def test_mask_of_any_size_is_fitted_as_its_large_jpeg_is(
    fit: Fit, size: tuple[int, int], smaller: int, tmp_path: Path
) -> None:
    """Which is decoded to less than its size, and has an aspect ratio between whole patches."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[size[0] // 3 :, size[1] // 3 :] = 7
    white = np.repeat((mask > 0)[:, :, None] * np.uint8(255), 3, axis=2)
    Image.fromarray(white).save(tmp_path / "a.jpg", quality=95)
    file = read_file(Source(path=tmp_path / "a.jpg", key="a.jpg"))
    sample = load_sample(file, frame(fit, (48, 48)), max_size=1)
    rough = np.asarray(Image.fromarray(mask).resize((size[1] // smaller, size[0] // smaller), 0))
    fitted = fit_mask(rough, frame(fit, (48, 48)), sample.size)
    assert fitted.shape == sample.pixels.shape[:2]
    assert ((fitted > 0) != (sample.pixels[:, :, 0] > 127)).mean() < 0.05


def test_mask_of_fractions_is_refused() -> None:
    with pytest.raises(ImageError, match="fractions; expected whole numbers"):
        fit_mask(np.full((8, 8), 0.7), frame(Fit.SQUASH), (8, 8))


def test_image_is_not_its_own_mask(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.touch()
    assert find_mask(tmp_path, Source(path=image, key="a.png")) is None
