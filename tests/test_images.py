"""ModelOutput, decoding and fitting images."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

import vitviz
from fixtures_io import SIZE, at_most, picture, tiny_model, tiny_module
from vitviz.errors import ImageError, SourceError
from vitviz.explaining.samples import input_transform
from vitviz.images.decoding import ImageFile, read_file
from vitviz.images.fitting import InputTransform, native_size
from vitviz.images.samples import ImageSample, load_sample, sample_of
from vitviz.images.sources import Source, find_sources
from vitviz.models.model import Model, load_model
from vitviz.options import Fit

pytestmark = pytest.mark.usefixtures("one_thread")

SQUASH = InputTransform(
    fit=Fit.SQUASH,
    size=(32, 32),
    patch=(16, 16),
    resample=Image.Resampling.BICUBIC,
    crop_pct=0.9,
)


def frame(fit: Fit, size: tuple[int, int] = (224, 224), crop_pct: float = 0.9) -> InputTransform:
    return InputTransform(
        fit=fit,
        size=size,
        patch=(16, 16),
        resample=Image.Resampling.BICUBIC,
        crop_pct=crop_pct,
    )


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def keys(*arguments: str, skip: Callable[[Path], bool] = lambda path: False) -> list[str]:
    return [source.key for source in find_sources(arguments, skip=skip)[0]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# ModelOutput


def test_file_is_found_whatever_its_ending(here: Path) -> None:
    touch(here, "a.jpg", "scan")
    assert keys("a.jpg", "scan") == ["a.jpg", "scan"]


def test_folder_is_searched_in_a_fixed_order(here: Path) -> None:
    touch(here, "p/z.png", "p/a.PNG", "p/sub/b.jpeg", "p/another/c.webp", "p/notes.txt", "p/d")
    found = keys("p")
    assert sorted(found) == ["p/a.PNG", "p/another/c.webp", "p/sub/b.jpeg", "p/z.png"]
    assert found == keys("p")
    assert found.index("p/a.PNG") < found.index("p/z.png")
    assert found.index("p/another/c.webp") < found.index("p/sub/b.jpeg")


def test_order_does_not_depend_on_the_file_system(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(here, *(f"p/{name}/{name}.png" for name in "abcdef"), *(f"p/{n}.png" for n in "uvw"))
    before = keys("p")
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self._entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> Backwards:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def __iter__(self) -> Backwards:
            return self

        def __next__(self) -> os.DirEntry[str]:
            if not self._entries:
                raise StopIteration
            return self._entries.pop(0)

        def close(self) -> None:
            return None

    monkeypatch.setattr(os, "scandir", Backwards)
    assert keys("p") == before


def test_sources_keep_the_order_of_the_arguments(here: Path) -> None:
    touch(here, "b.png", "p/x.png", "a.png")
    assert keys("b.png", "p", "a.png") == ["b.png", "p/x.png", "a.png"]


def test_quoted_globs_are_expanded(here: Path) -> None:
    touch(here, "p/1.png", "p/2.jpg", "p/q/3.png", "p/.4.png", "p/5.txt")
    assert keys("p/*.png") == ["p/1.png"]
    assert sorted(keys("p/**/*.png")) == ["p/1.png", "p/q/3.png"]
    assert keys("p/[12].*") == ["p/1.png", "p/2.jpg"]


def test_file_whose_name_has_wildcards_is_a_file(here: Path) -> None:
    touch(here, "cat[1].png", "cat1.png", "what?.png", "whatx.png")
    assert keys("cat[1].png", "what?.png") == ["cat[1].png", "what?.png"]


def test_folder_whose_name_has_wildcards_is_a_folder(here: Path) -> None:
    touch(here, "set[1]/a.png", "set1/b.png")
    assert keys("set[1]") == ["set[1]/a.png"]


def test_glob_that_matches_folders_takes_them_in_as_a_shell_would(here: Path) -> None:
    touch(here, "p/day1/a.png", "p/day2/b.png")
    assert keys("p/*") == ["p/day1/a.png", "p/day2/b.png"]


def test_path_reached_twice_runs_once(here: Path) -> None:
    touch(here, "p/a.png")
    assert keys("p/a.png", "p", "p/*.png", "./p/../p/a.png", str(here / "p")) == ["p/a.png"]


def test_two_names_of_one_file_are_two_images(here: Path) -> None:
    touch(here, "p/a.png")
    (here / "link.png").symlink_to(here / "p/a.png")
    (here / "way").symlink_to(here / "p")
    assert keys("p", "link.png", "way") == ["p/a.png", "link.png", "way/a.png"]


def test_hidden_files_and_folders_are_passed_over(here: Path) -> None:
    touch(here, "p/.a.png", "p/.cache/b.png", "p/c.png")
    assert keys("p") == ["p/c.png"]


def test_hidden_file_named_by_itself_is_taken(here: Path) -> None:
    touch(here, ".a.png")
    assert keys(".a.png") == [".a.png"]


def test_folder_named_like_an_image_is_searched(here: Path) -> None:
    touch(here, "p/x.png/y.png")
    assert keys("p") == ["p/x.png/y.png"]
    assert keys("p/x.png") == ["p/x.png/y.png"]


def test_what_is_to_be_skipped_is_never_input(here: Path) -> None:
    touch(here, "a.png", "vitviz-out/a.png.rollout.png", "vitviz-out/p/b.png.rollout.png")
    assert keys(".", "*.png", "*/*.png", skip=lambda path: "vitviz-out" in path.parts) == ["a.png"]


def test_missing_file_stays_a_source_and_fails_when_it_is_read(here: Path) -> None:
    (source,), fruitless = find_sources(["gone.jpg"])
    assert (source.key, fruitless) == ("gone.jpg", [])
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        read_file(source)


def test_arguments_without_images_are_named(here: Path) -> None:
    touch(here, "p/readme.txt", "a.png")
    (here / "empty").mkdir()
    sources, fruitless = find_sources(["p", "empty", "*.tiff", "a.png"])
    assert ([source.key for source in sources], fruitless) == (["a.png"], ["p", "empty", "*.tiff"])


def test_dangling_link_stays_a_source(here: Path) -> None:
    (here / "p").mkdir()
    (here / "p/a.png").symlink_to("nowhere.png")
    (source,), _ = find_sources(["p"])
    with pytest.raises(ImageError, match="cannot be read"):
        read_file(source)


def test_link_to_itself_stays_a_source_and_stops_nothing(here: Path) -> None:
    touch(here, "p/a.png", "p/z.png")
    (here / "p/loop.png").symlink_to("loop.png")
    sources, _ = find_sources(["p", "p/loop.png"])
    assert [source.key for source in sources] == ["p/a.png", "p/loop.png", "p/z.png"]
    with pytest.raises(ImageError):
        read_file(sources[1])


def test_loop_of_folders_ends(here: Path) -> None:
    touch(here, "p/a.png")
    (here / "p/up").symlink_to(here / "p")
    with at_most(10):
        assert keys("p") == ["p/a.png"]


@pytest.mark.parametrize(
    "name", ["n" * 300 + ".png", "d/" * 3000 + "a.png", "a.png\0b.png"], ids=["name", "path", "nul"]
)
def test_impossible_path_stays_a_source_and_fails_when_it_is_read(here: Path, name: str) -> None:
    touch(here, "a.png")
    sources, _ = find_sources([name, "a.png"])
    assert len(sources) == 2
    with pytest.raises(ImageError):
        read_file(sources[0])


def test_unreachable_path_stays_a_source(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder without search permission, as anybody but root meets it.
    touch(here, "a.png")
    real = os.stat

    def refuse(path: object, *rest: object, **more: object) -> os.stat_result:
        if "secret" in os.fsdecode(path):  # type: ignore[arg-type]
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(os, "stat", refuse)
    sources, _ = find_sources(["secret/b.png", "a.png"])
    assert len(sources) == 2


def test_pipe_never_blocks(here: Path) -> None:
    (here / "p").mkdir()
    os.mkfifo(here / "p/pipe.png")
    with at_most(10):
        (source,), _ = find_sources(["p"])
        with pytest.raises(ImageError, match="not a regular file"):
            read_file(source)


def test_device_file_is_no_image(here: Path) -> None:
    with at_most(10), pytest.raises(ImageError, match="not a regular file"):
        read_file(Source(path=Path("/dev/zero"), key="zero"))


def test_key_inside_the_working_directory_is_relative_to_it(here: Path) -> None:
    touch(here, "p/q/a.png")
    absolute = str(here / "p/q/a.png")
    for argument in ("p/q/a.png", absolute, "p/q", str(here / "p"), "p/../p/q/*.png", "."):
        assert keys(argument) == ["p/q/a.png"], argument


def test_key_outside_the_working_directory_is_relative_to_the_arguments_parent(here: Path) -> None:
    away = here.parent / "away"
    touch(away, "p/q/a.png")
    assert keys(str(away / "p/q/a.png")) == ["a.png"]
    assert keys(str(away / "p")) == ["p/q/a.png"]
    assert keys("../away/p/q") == ["q/a.png"]
    assert keys("../away/p/q/*.png") == ["a.png"]
    assert keys("../away/**/*.png") == ["p/q/a.png"]


def test_key_of_the_folder_above_is_relative_to_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "top/a.png", "top/in/deep/b.png")
    monkeypatch.chdir(tmp_path / "top/in")
    assert sorted(keys("..")) == ["deep/b.png", "top/a.png"]
    monkeypatch.chdir(tmp_path / "top/in/deep")
    assert sorted(keys("../..")) == ["b.png", "top/a.png"]


def test_key_of_a_path_that_climbs_is_relative_to_its_parent(here: Path) -> None:
    away = here.parent / "away"
    touch(away, "p/q/a.png", "p/r/b.png")
    assert keys(str(away / "p/q/..")) == ["p/q/a.png", "p/r/b.png"]
    assert keys(str(away / "p/q/../r/b.png")) == ["b.png"]


def test_key_never_leaves_the_output_folder(here: Path) -> None:
    touch(here.parent, "a.png", "away/b.png")
    for argument in ("../a.png", "../away", "../away/*.png", str(here.parent / "away/../a.png")):
        for key in keys(argument):
            assert ".." not in Path(key).parts
            assert not Path(key).is_absolute()


def test_two_files_with_one_key_are_refused_and_both_named(here: Path) -> None:
    touch(here.parent, "one/a.png", "two/a.png")
    first, second = str(here.parent / "one/a.png"), str(here.parent / "two/a.png")
    with pytest.raises(SourceError) as caught:
        find_sources([first, second])
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_names_that_are_no_utf8_are_found(here: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    touch(here, "p/x")
    Path("p", name).write_bytes(b"x")
    assert keys("p") == [f"p/{name}"]


def test_empty_argument_is_not_the_working_directory(here: Path) -> None:
    # vitviz rollout "$UNSET" must not run over whatever lies around.
    touch(here, "a.png")
    try:
        sources, _ = find_sources([""])
    except SourceError:
        return
    assert "a.png" not in [source.key for source in sources]


# Decoding


def decode(content: bytes, frame: InputTransform = SQUASH, max_size: int = 1024) -> ImageSample:
    source = Source(path=Path("a"), key="a")
    return load_sample(ImageFile(source=source, content=content, digest=""), frame, max_size)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def shown(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    return decode(encoded(image, kind, **options)).picture


def marked() -> Image.Image:
    """Draw a wide grey picture with a red top-left corner."""
    pixels = np.full((40, 80, 3), 128, np.uint8)
    pixels[:20, :20] = (255, 0, 0)
    return Image.fromarray(pixels)


STORED = {  # how the upright picture lies in a file of each EXIF orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_undone(orientation: int, kind: str) -> None:
    turn = STORED[orientation]
    stored = marked() if turn is None else marked().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    sample = decode(encoded(stored, kind, exif=exif))
    assert sample.picture.shape == (40, 80, 3)
    expected = np.asarray(marked())
    for row, col in [(9, 9), (9, 70), (30, 9), (30, 70)]:
        assert np.abs(sample.picture[row, col].astype(int) - expected[row, col]).max() < 12
    assert sample.pixels[4, 3, 1] < 20 < sample.pixels[4, 28, 1]  # what the model sees, too


def photograph(width: int, height: int) -> Image.Image:
    """Paint something smooth with some detail, as JPEG likes it."""
    rows, cols = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 37 + shift) + np.cos(cols / 23 - shift) for shift in (0, 1, 2)]
    return Image.fromarray((np.stack(waves, axis=-1) * 60 + 128).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("fit", Fit)
def test_what_the_model_sees_of_a_large_jpeg_is_independent_of_the_picture(
    fit: Fit, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photograph(1203, 801), "JPEG", quality=95, exif=exif)
    upright = (801, 1203) if orientation == 1 else (1203, 801)
    small = frame(fit, size=(48, 48))
    samples = [decode(content, small, max_size) for max_size in (20, 300, 1000, 5000)]
    for sample in samples:
        assert np.array_equal(sample.pixels, samples[0].pixels)
        assert sample.region == samples[0].region
    assert samples[-1].picture.shape[:2] == upright
    assert [max(sample.picture.shape[:2]) for sample in samples] == [20, 300, 1000, 1203]


@pytest.mark.parametrize("fit", Fit)
def test_model_sees_a_large_jpeg_as_if_it_were_decoded_in_full(fit: Fit) -> None:
    """To the eye; sides that are no multiples of 8 may move by a part of a pixel."""
    content = encoded(photograph(1200, 800), "JPEG", quality=95)
    small = frame(fit, size=(48, 48))
    fully, region = small.apply(Image.open(io.BytesIO(content)))
    sample = decode(content, small)
    assert sample.region == region
    assert np.abs(sample.pixels.astype(int) - np.asarray(fully).astype(int)).max() <= 2


def test_large_jpeg_is_not_decoded_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(
        "vitviz.images.decoding.to_rgb", lambda image, _: sizes.append(image.size) or image
    )
    content = encoded(photograph(1600, 1200), "JPEG")
    decode(content, frame(Fit.SQUASH, size=(32, 32)), max_size=100)
    assert sizes == [(200, 150)]
    decode(content, frame(Fit.SQUASH, size=(32, 32)), max_size=500)
    assert sizes[1:] == [(200, 150), (800, 600)]


def test_unknown_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    assert shown(marked(), "JPEG", exif=exif).shape == (40, 80, 3)


def test_palette_is_resolved() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert (shown(image) == (10, 200, 30)).all()


def test_transparent_palette_lies_over_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([9, 9, 9, 10, 200, 30])
    image.putpixel((3, 2), 1)
    pixels = shown(image, transparency=0)
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert tuple(pixels[2, 3]) == (10, 200, 30)


def test_palette_with_alpha_table_lies_over_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((3, 2), 1)
    pixels = shown(image, transparency=bytes([0, 255]))
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert tuple(pixels[2, 3]) == (10, 200, 30)


def test_one_bit_becomes_black_and_white() -> None:
    image = Image.new("1", (8, 8), 0)
    image.putpixel((1, 0), 1)
    pixels = shown(image)
    assert tuple(pixels[0, 1]) == (255, 255, 255)
    assert tuple(pixels[0, 0]) == (0, 0, 0)


def test_greyscale_has_three_equal_channels() -> None:
    pixels = shown(Image.new("L", (8, 8), 77))
    assert pixels.shape == (8, 8, 3)
    assert (pixels == 77).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_lies_over_white(mode: str) -> None:
    clear = (0, 0) if mode == "LA" else (0, 0, 0, 0)
    half = (0, 128) if mode == "LA" else (0, 0, 0, 128)
    image = Image.new(mode, (8, 8), clear)
    image.putpixel((0, 0), half)
    pixels = shown(image)
    assert tuple(pixels[4, 4]) == (255, 255, 255)
    assert np.abs(pixels[0, 0].astype(int) - 127).max() <= 1


def test_transparent_colour_of_rgb_lies_over_white() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    image.putpixel((0, 0), (9, 9, 9))
    pixels = shown(image, transparency=(1, 2, 3))
    assert tuple(pixels[4, 4]) == (255, 255, 255)
    assert tuple(pixels[0, 0]) == (9, 9, 9)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_down(kind: str) -> None:
    values = np.zeros((4, 4), np.uint16)
    values[0], values[1], values[2] = 65535, 32896, 257
    pixels = shown(Image.fromarray(values), kind)
    assert pixels[:, 0, 0].tolist() == [255, 128, 1, 0]


def test_dark_sixteen_bits_stay_dark() -> None:
    assert shown(Image.fromarray(np.full((4, 4), 200, np.uint16))).max() <= 1


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colours_are_scaled_down(channels: int) -> None:
    values = np.full((4, 4, channels), 65535, np.uint16)
    values[..., :3] = (0, 32896, 65535)  # BGR, as OpenCV writes
    _, content = cv2.imencode(".png", values)
    assert tuple(decode(content.tobytes()).picture[0, 0]) == (255, 128, 0)


def test_floats_up_to_one_fill_the_range() -> None:
    values = np.zeros((4, 4), np.float32)
    values[0], values[1], values[2] = 1.0, 0.5, -3.0
    pixels = shown(Image.fromarray(values), "TIFF")
    assert pixels[0, 0, 0] == 255
    assert pixels[1, 0, 0] in (127, 128)
    assert pixels[2, 0, 0] == pixels[3, 0, 0] == 0


def test_floats_that_are_not_finite_do_no_harm() -> None:
    values = np.full((4, 4), 0.5, np.float32)
    values[0, 0] = np.nan
    pixels = shown(Image.fromarray(values), "TIFF")
    assert pixels[2, 2, 0] in (127, 128)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    pixels = shown(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind)
    assert np.abs(pixels[8, 8].astype(int) - (255, 0, 0)).max() < 20


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = shown(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert tuple(pixels[8, 8]) == (255, 0, 0)


def test_truncated_image_fails() -> None:
    content = encoded(picture(64, 64), "JPEG")
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(content[: len(content) // 2])


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG"])
def test_no_cut_of_a_file_raises_anything_but_an_image_error(kind: str) -> None:
    content = encoded(picture(24, 24), kind)
    for length in range(1, len(content), max(1, len(content) // 40)):
        try:
            decode(content[:length])
        except ImageError:
            continue


def test_text_named_like_an_image_fails() -> None:
    with pytest.raises(ImageError, match="no image"):
        decode(b"this is no image")


def test_empty_file_fails(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ImageError, match="empty"):
        read_file(Source(path=tmp_path / "a.jpg", key="a.jpg"))


def test_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        read_file(Source(path=tmp_path, key="a"))


def test_giant_image_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="bomb"):
        decode(encoded(Image.new("L", (64, 64)), "PNG"))


def test_picture_is_at_most_max_size_long() -> None:
    content = encoded(picture(60, 120), "PNG")
    assert decode(content, max_size=50).picture.shape == (25, 50, 3)
    assert decode(content, max_size=120).picture.shape == (60, 120, 3)
    assert decode(content, max_size=1024).picture.shape == (60, 120, 3)
    assert decode(content, max_size=1).picture.shape == (1, 1, 3)


def test_max_size_does_not_change_what_the_model_sees() -> None:
    content = encoded(picture(60, 120), "PNG")
    assert np.array_equal(decode(content, max_size=8).pixels, decode(content).pixels)


# Images in memory


def test_arrays_and_pillow_images_are_taken() -> None:
    image = picture(20, 30)
    array = np.asarray(image)
    expected = sample_of(image, "x", SQUASH, 1024)
    assert np.array_equal(sample_of(array, "x", SQUASH, 1024).pixels, expected.pixels)
    assert sample_of(array[..., 0], "x", SQUASH, 1024).picture.shape == (20, 30, 3)
    alpha = np.dstack([array, np.zeros((20, 30), np.uint8)])
    assert (sample_of(alpha, "x", SQUASH, 1024).picture == 255).all()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((20, 30, 3), np.complex64),
        np.zeros((20, 30, 2), np.float32),
        np.zeros((3, 20, 30), np.uint8),
        np.zeros((2, 20, 30, 3), np.uint8),
        np.zeros((20, 0, 3), np.uint8),
        np.zeros((0, 0, 3), np.uint8),
        "cat.jpg",
    ],
    ids=lambda a: f"{a.dtype}-{a.shape}" if isinstance(a, np.ndarray) else "text",
)
def test_arrays_that_are_no_images_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError):
        sample_of(array, "x", SQUASH, 1024)


def test_sample_of_leaves_its_image_alone() -> None:
    image = picture(20, 30)
    before = image.tobytes()
    sample_of(image, "x", SQUASH, 8)
    assert image.size == (30, 20)
    assert image.tobytes() == before


# Fitting


@cache
def whole_model() -> Model:
    return load_model(tiny_module(img_size=160), device="cpu")


SHAPES = [
    *[(100, 300), (300, 100), (37, 1000), (161, 160), (500, 333), (160, 160), (225, 224)],
    *[(31, 33), (199, 601), (1023, 767), (168, 168), (169, 500), (1200, 1201)],
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crop_equals_timms_evaluation_to_the_bit(shape: tuple[int, int]) -> None:
    model = whole_model()
    seen: list[torch.Tensor] = []
    handle = model.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    config = timm.data.resolve_data_config({}, model=model.module)
    transform = timm.data.create_transform(**config, is_training=False)
    image = picture(*shape)
    try:
        vitviz.rollout(model, [image], fit="crop")
    finally:
        handle.remove()
    assert torch.equal(seen[0][0], transform(image))


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(333, 500), (501, 334), (248, 249), (3, 7)], ids=str)
def test_crop_equals_timms_for_every_share(shape: tuple[int, int], crop_pct: float) -> None:
    transform = timm.data.create_transform(
        (3, 224, 224), interpolation="bicubic", crop_pct=crop_pct, normalize=False
    )
    image = picture(*shape)
    fitted, _ = frame(Fit.CROP, crop_pct=crop_pct).apply(image)
    assert np.array_equal(np.asarray(fitted), transform(image).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("shape", [(200, 500), (500, 200), (224, 224)], ids=str)
def test_crop_region_is_centred_and_has_the_crops_share(shape: tuple[int, int]) -> None:
    _, region = frame(Fit.CROP).apply(picture(*shape))
    rows, cols = region.pixels(shape)
    side = min(shape) * 224 / 248
    assert abs((rows.stop - rows.start) - side) <= 1.5
    assert abs((cols.stop - cols.start) - side) <= 1.5
    assert abs((rows.start + rows.stop) - shape[0]) <= 2
    assert abs((cols.start + cols.stop) - shape[1]) <= 2


@pytest.mark.parametrize("size", [(48, 96), (96, 48)], ids=str)
def test_crop_for_an_oblong_model_fills_it_and_keeps_the_aspect(size: tuple[int, int]) -> None:
    fitted, region = frame(Fit.CROP, size=size).apply(picture(300, 200))
    assert (fitted.height, fitted.width) == size
    height = (region.bottom - region.top) * 300
    width = (region.right - region.left) * 200
    assert height / width == pytest.approx(size[0] / size[1], rel=0.03)
    for edge in (region.left, region.top, region.right, region.bottom):
        assert 0 <= edge <= 1


@pytest.mark.parametrize("shape", [(100, 300), (300, 100), (1, 5000), (5000, 1)], ids=str)
def test_squash_sees_the_whole_image(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    fitted, region = frame(Fit.SQUASH).apply(image)
    assert (fitted.height, fitted.width) == (224, 224)
    assert region.pixels(shape) == (slice(0, shape[0]), slice(0, shape[1]))
    expected = image.resize((224, 224), Image.Resampling.BICUBIC)
    moved = np.abs(np.asarray(fitted).astype(int) - np.asarray(expected).astype(int))
    assert moved.max() <= (1 if max(shape) > 6 * 224 else 0)


@pytest.mark.parametrize("fit", Fit)
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1)], ids=str)
def test_slivers_are_fitted(shape: tuple[int, int], fit: Fit) -> None:
    sample = sample_of(picture(*shape), "x", frame(fit, size=(32, 32)), 1024)
    assert sample.pixels.ndim == 3
    assert min(sample.pixels.shape) >= 1
    assert max(sample.picture.shape) <= 1024
    if fit is not Fit.NATIVE:
        assert sample.pixels.shape == (32, 32, 3)


def test_crop_of_a_sliver_stays_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # Scaling 1×5000 until its short side fills 248 pixels makes 307 million pixels.
    real = Image.Image.resize

    def bounded(self: Image.Image, size: tuple[int, int], *rest: object, **more: object) -> object:
        assert size[0] * size[1] < 50_000_000, f"resized to {size}"
        return real(self, size, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", bounded)
    fitted, region = frame(Fit.CROP).apply(Image.new("RGB", (5000, 1), "red"))
    assert fitted.size == (224, 224)
    assert region.right - region.left < 0.001


ASPECTS = [1 / 400, 1 / 87, 1 / 10, 1 / 3, 0.5, 2 / 3, 0.75, 0.99, 1, 1.01, 4 / 3, 1.5, 16 / 9]
ASPECTS += [2, 2.35, 3, 10, 50, 87, 87.1, 150, 400]


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("side", [2, 7, 14, 37])
def test_native_keeps_the_aspect_within_a_patch(aspect: float, side: int) -> None:
    height, width = native_size((1000, round(1000 * aspect)), (side * 16, side * 16), (16, 16))
    rows, cols = height / 16, width / 16
    assert rows == int(rows) >= 1
    assert cols == int(cols) >= 1
    assert rows * cols <= side * side
    if 1 / side**2 <= aspect <= side**2:
        ratio = round(1000 * aspect) / 1000
        # A patch, and half a one for rounding the other side.
        assert min(abs(cols - rows * ratio), abs(rows - cols / ratio)) <= 1.5


@pytest.mark.parametrize("aspect", [a for a in ASPECTS if 1 / 3 <= a <= 3])
def test_native_uses_about_all_patches_on_ordinary_images(aspect: float) -> None:
    height, width = native_size((1000, round(1000 * aspect)), (224, 224), (16, 16))
    assert 0.85 * 196 <= (height // 16) * (width // 16) <= 196


def test_native_counts_in_oblong_patches() -> None:
    height, width = native_size((480, 480), (128, 256), (16, 32))
    assert height % 16 == 0
    assert width % 32 == 0
    assert height / width == pytest.approx(1, rel=0.15)


def test_native_frame_sees_the_whole_image() -> None:
    fitted, region = frame(Fit.NATIVE).apply(picture(100, 200))
    assert fitted.size == (19 * 16, 10 * 16)
    assert region.pixels((100, 200)) == (slice(0, 100), slice(0, 200))


def test_square_image_is_native_at_the_models_own_size() -> None:
    fitted, _ = input_transform(tiny_model(), Fit.NATIVE).apply(picture(300, 300))
    assert fitted.size == (SIZE, SIZE)


def test_aspect_does_not_flip() -> None:
    wide = native_size((100, 300), (224, 224), (16, 16))
    tall = native_size((300, 100), (224, 224), (16, 16))
    assert wide[1] > wide[0]
    assert tall[0] > tall[1]
    assert math.isclose(wide[0] * wide[1], tall[0] * tall[1], rel_tol=0.1)


# What is less than a patch at an edge


@pytest.mark.parametrize("fit", [Fit.SQUASH, Fit.CROP])
def test_region_ends_with_the_last_whole_patch(fit: Fit) -> None:
    frame = InputTransform(
        fit=fit,
        size=(100, 90),
        patch=(16, 16),
        resample=Image.Resampling.BICUBIC,
        crop_pct=1.0,
    )
    fitted, region = frame.apply(Image.new("RGB", (180, 200)))
    assert fitted.size == (90, 100)
    assert (region.left, region.top) == (0, 0)
    assert region.right == pytest.approx(80 / 90)
    assert region.bottom == pytest.approx(96 / 100)


def test_glob_over_all_folders_takes_each_image_once(here: Path) -> None:
    touch(here, "p/1.png", "p/q/2.png", "p/q/r/3.jpg", "p/notes.txt")
    assert sorted(keys("p/**")) == ["p/1.png", "p/q/2.png", "p/q/r/3.jpg"]
