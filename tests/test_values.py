"""Pixel values of any type: which become black and white, and what is said of those that do not."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import vitviz
from fixtures_io import NAME, Shell, save_tiny, tiny_model
from vitviz.errors import ImageError, OptionError
from vitviz.images.decoding import ImageFile
from vitviz.images.fitting import InputTransform
from vitviz.images.samples import ImageSample, load_sample, sample_of
from vitviz.images.sources import Source
from vitviz.options import Fit, ValueRange

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32")
KINDS = {"u": 1, "i": 2, "f": 3}
RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def tiff(values: NDArray[Any], *, white_is_zero: bool = False, **tags: str) -> bytes:
    """Write a TIFF of one band, or of bands beside each other, as the standard has it."""
    bands = 1 if values.ndim == 2 else values.shape[2]
    bits = struct.pack(f"<{bands}H", *[8 * values.itemsize] * bands)
    kinds = struct.pack(f"<{bands}H", *[KINDS[values.dtype.kind]] * bands)
    short = {
        256: values.shape[1],
        257: values.shape[0],
        259: 1,
        262: 2 if bands > 1 else int(not white_is_zero),
        277: bands,
        278: values.shape[0],
    }
    entries: dict[int, tuple[int, int, bytes]] = {
        **{tag: (3, 1, struct.pack("<H", number)) for tag, number in short.items()},
        258: (3, bands, bits),
        339: (3, bands, kinds),
        273: (4, 1, b"\0\0\0\0"),
        279: (4, 1, struct.pack("<I", values.nbytes)),
    }
    if "no_data" in tags:
        text = tags["no_data"].encode() + b"\0"
        entries[42113] = (2, len(text), text)
    if "extra" in tags:
        entries[338] = (3, 1, struct.pack("<H", int(tags["extra"])))
    end = 8 + 2 + 12 * len(entries) + 4
    directory, beyond = struct.pack("<H", len(entries)), b""
    for tag, (kind, count, content) in sorted(entries.items()):
        place = content.ljust(4, b"\0")
        if len(content) > 4:
            place = struct.pack("<I", end + len(beyond))
            beyond += content + b"\0" * (len(content) % 2)
        directory += struct.pack("<HHI", tag, kind, count) + place
    pixels = struct.pack("<I", end + len(beyond))
    at = directory.index(struct.pack("<HHI", 273, 4, 1)) + 8
    directory = directory[:at] + pixels + directory[at + 4 :] + b"\0\0\0\0"
    return b"II*\0\x08\0\0\0" + directory + beyond + values.tobytes()


def png(values: NDArray[Any]) -> bytes:
    return bytes(cv2.imencode(".png", values)[1])


def sample(content: bytes, values: object = None) -> ImageSample:
    frame = InputTransform(
        fit=Fit.SQUASH,
        size=(16, 16),
        patch=(8, 8),
        resample=Image.Resampling.BICUBIC,
        crop_pct=1.0,
        values=ValueRange.ensure(values),
    )
    source = Source(path=Path("a"), key="a")
    return load_sample(ImageFile(source=source, content=content, digest=""), frame, 1024)


def grey(content: bytes, values: object = None) -> NDArray[np.uint8]:
    return sample(content, values).picture[..., 0].copy()


def said(content: bytes, values: object = None) -> list[str]:
    return [remark.what for remark in sample(content, values).remarks]


def white(name: str) -> float:
    return 1 if name == "float32" else np.iinfo(name).max


def of_type(name: str, shares: NDArray[np.float64] = RAMP) -> NDArray[Any]:
    return (shares * white(name)).astype(name)


@pytest.mark.parametrize("name", TYPES)
def test_black_is_0_and_white_the_highest_value_of_a_type(name: str) -> None:
    found = grey(tiff(of_type(name)))
    assert np.abs(found - RAMP * 255).max() <= (1.01 if "8" not in name else 2.01)
    assert (found[0, 0], found[-1, -1]) == (0, 255)
    assert not said(tiff(of_type(name)))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(TYPES),
    share=st.floats(0.2, 1),
    outlier=st.floats(-1, 3),
    row=st.integers(0, 15),
)
def test_one_pixel_never_moves_the_others(
    name: str, share: float, outlier: float, row: int
) -> None:
    """A rule without jumps: what a pixel becomes hangs on the pixel alone."""
    values = of_type(name, RAMP * share)
    moved = values.copy()
    ends = (-np.inf, np.inf) if name == "float32" else (np.iinfo(name).min, np.iinfo(name).max)
    moved[row, row] = np.clip(outlier * white(name), *ends)
    others = np.ones_like(values, dtype=bool)
    others[row, row] = False
    before, after = grey(tiff(values)), grey(tiff(moved))
    assert np.array_equal(before[others], after[others])
    expected = np.clip(float(moved[row, row]) / white(name), 0, 1) * 255
    assert abs(float(after[row, row]) - expected) <= 0.51


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(TYPES[2:]),
    low=st.integers(-30000, 30000),
    span=st.integers(10, 30000),
)
def test_range_asked_for_is_the_same_whatever_the_type(name: str, low: int, span: int) -> None:
    low = max(low, 0) if name.startswith("u") else min(low, 32767 - span)
    values = np.rint(low + RAMP * span).astype(name)
    found = grey(tiff(values), (low, low + span))
    assert np.abs(found - (values.astype(float) - low) / span * 255).max() <= 0.51
    stretched = grey(tiff(values), "0%:100%")
    assert np.array_equal(stretched, found)


@pytest.mark.parametrize("name", TYPES)
def test_array_and_file_of_one_type_are_the_same(name: str) -> None:
    frame = InputTransform(
        fit=Fit.SQUASH, size=(16, 16), patch=(8, 8), resample=Image.Resampling.BICUBIC, crop_pct=1.0
    )
    values = of_type(name)
    found = sample_of(values, "x", frame, 1024).picture[..., 0]
    assert np.array_equal(found, grey(tiff(values)))


@pytest.mark.parametrize("name", ["uint16", "int32", "uint32", "int16", "float32"])
@pytest.mark.parametrize("scale", [255, 4095])
def test_values_that_are_not_of_their_type_are_told_of_or_refused(name: str, scale: int) -> None:
    """No picture comes out black or white without a word."""
    content = tiff((RAMP * scale).astype(name))
    try:
        assert said(content)
    except ImageError as error:
        assert f"from 0 to {scale}" in str(error)  # noqa: PT017
        assert f"--value-range 0:{scale}" in str(error)  # noqa: PT017
    assert np.abs(grey(content, f"0:{scale}") - RAMP * 255).max() <= 1.01
    assert not said(content, f"0:{scale}")


def test_hounsfield_units_are_told_of_and_read_with_a_range() -> None:
    values = (RAMP * 4000 - 1000).astype(np.int16)
    assert said(tiff(values)) == [
        "pixel values beyond the ends of their range",
        "pixel values that use almost nothing of their range",
    ]
    assert not said(tiff(values), "-1000:3000")
    assert np.abs(grey(tiff(values), "-1000:3000") - RAMP * 255).max() <= 0.51


def test_eight_bits_in_sixteen_bit_colours_are_told_of_and_no_range_can_mend_them() -> None:
    colours = np.dstack([(RAMP * 255).astype(np.uint16)] * 3)
    assert said(png(colours)) == ["pixel values that use almost nothing of their range"]
    with pytest.raises(ImageError, match="Pillow keeps the upper 8"):
        sample(png(colours), "0:255")
    assert not said(png(colours * 257))


def test_eight_bits_of_greys_in_a_sixteen_bit_png_are_refused_and_read_with_a_range() -> None:
    values = (RAMP * 255).astype(np.uint16)
    with pytest.raises(ImageError, match="16-bit unsigned integers from 0 to 255"):
        sample(png(values))
    assert np.array_equal(grey(png(values), "0:255"), values)
    assert np.array_equal(grey(png(values * 257)), values)


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_black_and_told_of(missing: float) -> None:
    values = RAMP.astype(np.float32)
    expected = grey(tiff(values))
    values[3, 4] = missing
    found = grey(tiff(values))
    assert found[3, 4] == 0
    found[3, 4] = expected[3, 4]
    assert np.array_equal(found, expected)
    assert said(tiff(values)) == ["pixels without a value"]


@pytest.mark.parametrize(
    ("name", "text"), [("float32", "-3.4e+38"), ("int16", "-32768"), ("uint16", "65535")]
)
@pytest.mark.parametrize("values_of", [None, "0%:100%"])
def test_value_declared_as_no_data_counts_as_none(
    name: str, text: str, values_of: str | None
) -> None:
    values = of_type(name, RAMP * 0.9)
    values[2:9, 4] = np.float32(text) if name == "float32" else int(text)
    content = tiff(values, no_data=text)
    assert said(content, values_of) == ["pixels without a value"]
    assert (grey(content, values_of)[2:9, 4] == 0).all()
    assert grey(content, values_of)[-1, -1] in ((229, 230) if values_of is None else (255,))


def test_image_without_any_value_is_refused() -> None:
    with pytest.raises(ImageError, match="no pixel with a value"):
        sample(tiff(np.full((16, 16), np.nan, np.float32)))


@pytest.mark.parametrize("name", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("values", [None, "0%:100%"])
def test_white_is_zero_where_a_tiff_says_so(name: str, values: str | None) -> None:
    as_it_is = grey(tiff(of_type(name)))
    turned = grey(tiff(of_type(name), white_is_zero=True), None if name == "uint8" else values)
    assert np.abs(turned.astype(int) - (255 - as_it_is.astype(int))).max() <= 1


def test_fourth_band_is_alpha_only_where_a_tiff_says_so() -> None:
    values = np.dstack([np.full((16, 16), level, np.uint8) for level in (10, 200, 30, 90)])
    plain = sample(tiff(values))
    assert (plain.picture == (10, 200, 30)).all()
    assert [remark.what for remark in plain.remarks] == [
        "a fourth band that is not declared as transparency"
    ]
    assert (sample(tiff(values, extra="0")).picture == (10, 200, 30)).all()
    assert abs(int(sample(tiff(values, extra="2")).picture[0, 0, 0]) - 169) <= 1


def test_dark_and_constant_images_are_kept_and_told_of() -> None:
    assert grey(tiff(np.full((16, 16), 300, np.uint16))).max() == 1
    assert said(tiff(np.full((16, 16), 300, np.uint16)))


def test_floats_that_leave_their_range_are_told_of_or_refused() -> None:
    assert not said(tiff((RAMP * 1.001).astype(np.float32)))
    assert said(tiff((RAMP * 1.1).astype(np.float32))) == [
        "pixel values beyond the ends of their range"
    ]
    with pytest.raises(ImageError, match="from 0 to 2.5"):
        sample(tiff((RAMP * 2.5).astype(np.float32)))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "LA", "RGBA"])
def test_range_stretches_images_of_eight_bits_too(mode: str) -> None:
    buffer = io.BytesIO()
    image = Image.fromarray((100 + RAMP * 100).astype(np.uint8)).convert(mode)
    image.save(buffer, "TIFF")
    found = grey(buffer.getvalue(), "100:200")
    assert np.abs(found - RAMP * 255).max() <= 4
    assert np.abs(grey(buffer.getvalue(), "0%:100%") - RAMP * 255).max() <= 4


@pytest.mark.parametrize(
    "wrong", ["1", "1:", "a:b", "3:2", "2:2", "1%:200%", "1:99%", "nan:1", "0:inf", (1, 2, 3), 7]
)
def test_range_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(OptionError, match="--value-range is"):
        ValueRange.ensure(wrong)


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9), st.booleans())
def test_range_is_written_as_it_is_read(low: float, span: float, percentiles: bool) -> None:
    if percentiles:
        low, span = abs(low) / 1e9, span / 1e8
    one = ValueRange(low=low, high=low + span, percentiles=percentiles)
    assert ValueRange.ensure(str(one)) == one


def test_range_that_stretches_nothing_is_refused_with_what_was_found() -> None:
    values = np.zeros((16, 16), np.uint16)
    values[0, 0] = 9
    with pytest.raises(ImageError, match="same value, 0, at both ends of --value-range 2%:98%"):
        sample(tiff(values), "2%:98%")
    with pytest.raises(ImageError, match="from 0 to 1"):
        sample(tiff(of_type("float32")), "0:4095")


# The option on the command line, in records, and in Python


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[str, ...]:
    weights = save_tiny(tmp_path / "tiny.safetensors")
    return ("-m", NAME, "--weights", str(weights), "--img-size", "64")


def test_range_is_recorded_and_decides_what_is_skipped(shell: Shell, tiny: tuple[str, ...]) -> None:
    for number in range(2):
        Path(f"{number}.tif").write_bytes(tiff((RAMP * 4095).astype(np.uint16)))
    call = ("rollout", "0.tif", "1.tif", *tiny, "--save", "npy", "--json", "--skip-existing")
    first = shell(*call)
    assert not [each for each in first.records if "value_range" in each["run"]["options"]]
    (told,) = [line for line in first.complaints if "almost nothing" in line]
    assert told.startswith("pixel values that use almost nothing of their range in 2 images, the")
    assert "0.tif: 16-bit unsigned integers from 0 to 4095" in told
    ranged = (*call, "--value-range", "-1:4095")
    done = shell(*ranged)
    assert [record["status"] for record in done.records] == ["written"] * 2
    assert done.records[0]["run"]["options"]["value_range"] == "-1:4095"
    assert not [line for line in done.complaints if "almost nothing" in line]
    assert [record["status"] for record in shell(*ranged).records] == ["skipped"] * 2
    assert shell(*call[:-1], "--value-range", "5").code == 2


def test_evaluate_takes_and_records_the_range_and_tells_of_values(
    shell: Shell, tiny: tuple[str, ...]
) -> None:
    Path("a.tif").write_bytes(tiff((RAMP * 4095).astype(np.uint16)))
    call = ("evaluate", "a.tif", *tiny, "--methods", "rollout", "--json", "--bootstrap", "9")
    assert "almost nothing of their range in 1 image, the first of a.tif" in shell(*call).err
    done = shell(*call, "--value-range", "1%:99%")
    assert "almost nothing" not in done.err
    assert json.loads(done.out)["options"]["value_range"] == "1%:99%"


def test_python_takes_the_range_in_its_own_words(tmp_path: Path) -> None:
    values = (RAMP * 100).astype(np.float32)
    (tmp_path / "a.tif").write_bytes(tiff(values))
    first, second = vitviz.rollout(tiny_model(), [values, tmp_path / "a.tif"], value_range=(0, 100))
    assert np.array_equal(first.relevance, second.relevance)
    for image in (values, tmp_path / "a.tif"):
        with pytest.raises(ImageError, match="try value_range 0:100"):
            vitviz.rollout(tiny_model(), [image])
    with pytest.warns(UserWarning, match="beyond the ends .* value_range sets"):
        vitviz.rollout(tiny_model(), [(RAMP * 1.2).astype(np.float32)])
    with pytest.raises(OptionError, match="value_range is"):
        vitviz.rollout(tiny_model(), [values], value_range="5")
