"""Images whose metadata is broken, that have several frames, or that need another decoder."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageFile

import vitviz
from fixtures_io import picture, tiny_model
from test_values import sample
from vitviz.errors import ImageError

pytestmark = pytest.mark.usefixtures("one_thread")

_LARGE = zlib.compress(bytes(3 << 20))


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or picture(24, 32)).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def chunk(name: bytes, content: bytes, *, flaw: int = 0) -> bytes:
    checksum = zlib.crc32(name + content) ^ flaw
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png_with(extra: bytes, *, at_end: bool = False, content: bytes | None = None) -> bytes:
    content = content or encoded("PNG")
    at = len(content) - 12 if at_end else 33
    return content[:at] + extra + content[at:]


def webp_with_exif(exif: bytes) -> bytes:
    return encoded("WEBP", lossless=True, exif=exif)


def turned(exif_of: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = exif_of
    return exif.tobytes().removeprefix(b"Exif\0\0")


BROKEN = {
    "exif-garbage": chunk(b"eXIf", b"this is no EXIF"),
    "exif-empty": chunk(b"eXIf", b""),
    "exif-cut": chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff\x12\x01"),
    "exif-loop": chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x07\0\xff\xff\xff\x7f\xff\xff\0\0"),
    "exif-checksum": chunk(b"eXIf", turned(1), flaw=1),
    "profile-large": chunk(b"iCCP", b"a\0\0" + _LARGE),
    "profile-garbage": chunk(b"iCCP", b"a\0\0garbage"),
    "profile-method": chunk(b"iCCP", b"a\0\x07garbage"),
    "text-large": chunk(b"zTXt", b"a\0\0" + _LARGE),
    "text-garbage": chunk(b"zTXt", b"a\0\0garbage"),
    "text-checksum": chunk(b"tEXt", b"a\0b", flaw=1),
    "itxt-large": chunk(b"iTXt", b"a\0\1\0\0\0" + _LARGE),
    "gamma-short": chunk(b"gAMA", b""),
    "density-short": chunk(b"pHYs", b"\0"),
    "raw-exif": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 99\nzzzz"),
    "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'tiff:Orientation="x"'),
}


@pytest.mark.parametrize("at_end", [False, True], ids=["before-pixels", "behind-pixels"])
@pytest.mark.parametrize("name", BROKEN)
def test_intact_pixels_of_a_png_survive_its_metadata(name: str, at_end: bool) -> None:
    found = sample(png_with(BROKEN[name], at_end=at_end))
    assert np.array_equal(found.picture, np.asarray(picture(24, 32)))


@pytest.mark.parametrize("name", ["text-large", "profile-large", "text-checksum"])
def test_what_matters_to_pixels_is_kept_beside_broken_metadata(name: str) -> None:
    content = encoded("PNG", exif=turned(6))
    assert sample(png_with(BROKEN[name], content=content)).picture.shape == (32, 24, 3)
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([9, 9, 9, 10, 200, 30])
    content = encoded("PNG", clear, transparency=0)
    assert (sample(png_with(BROKEN[name], content=content)).picture == 255).all()


def test_broken_pixels_of_a_png_fail_as_ever() -> None:
    content = bytearray(encoded("PNG"))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="cannot be decoded"):
        sample(bytes(content))
    with pytest.raises(ImageError, match="cannot be decoded"):
        sample(png_with(BROKEN["text-large"], content=bytes(content)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "PNG"])
@pytest.mark.parametrize(
    "exif", [b"II*\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0", b"x"]
)
def test_intact_pixels_survive_broken_exif(kind: str, exif: bytes) -> None:
    if kind == "TIFF":
        exif = turned(1)  # its tags are its EXIF
    lossless = {"lossless": True} if kind == "WEBP" else {}
    found = sample(encoded(kind, exif=exif, **lossless))
    assert found.picture.shape == (24, 32, 3)
    assert np.abs(found.picture.astype(int) - np.asarray(picture(24, 32)).astype(int)).max() < 40


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_damaged_images_in_memory_raise_image_errors(kind: str) -> None:
    content = encoded(kind)
    for length in range(20, len(content), max(1, len(content) // 12)):
        try:
            image = Image.open(io.BytesIO(content[:length]))
        except Exception:  # noqa: S112 (the user's own to meet)
            continue
        try:
            vitviz.rollout(tiny_model(), [image])
        except ImageError as error:
            assert str(error).startswith("image 0 cannot be decoded")  # noqa: PT017


def test_closed_image_and_one_with_broken_exif_in_memory() -> None:
    image = Image.open(io.BytesIO(encoded("PNG")))
    image.close()
    with pytest.raises(ImageError, match="image 0 cannot be decoded"):
        vitviz.rollout(tiny_model(), [image])
    image = Image.open(io.BytesIO(png_with(BROKEN["exif-garbage"])))
    assert len(vitviz.rollout(tiny_model(), [image])) == 1


# Several frames


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_told_of_and_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(kind, frames[0], save_all=True, append_images=frames[1:], **lossless)
    found = sample(content)
    assert tuple(found.picture[8, 8]) == (255, 0, 0)
    assert [remark.what for remark in found.remarks] == ["several frames or pages"]
    assert not sample(encoded(kind, frames[0], **lossless)).remarks


def test_gif_whose_second_frame_is_broken_still_has_its_first() -> None:
    frames = [picture(16, 16, seed) for seed in range(2)]
    content = encoded("GIF", frames[0], save_all=True, append_images=frames[1:])
    for length in range(len(content) * 6 // 10, len(content), 7):
        assert sample(content[:length]).picture.shape == (16, 16, 3)


def test_frames_are_told_of_once_a_run(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    frames = [picture(16, 16, seed) for seed in range(2)]
    paths = [tmp_path / f"{number}.gif" for number in range(3)]
    for path in paths:
        path.write_bytes(encoded("GIF", frames[0], save_all=True, append_images=frames[1:]))
    vitviz.rollout(tiny_model(), paths)
    (told,) = [str(each.message) for each in recwarn if "frames" in str(each.message)]
    assert told == (
        f"several frames or pages in 3 images, the first of {paths[0]}: "
        "only the first one of each is explained"
    )


# Formats that need another decoder


def heif(brand: bytes = b"heic") -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + bytes(64)


@pytest.fixture
def heif_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stand in for pillow-heif: its opener reads any HEIC as a green picture."""
    module = ModuleType("pillow_heif")

    class Opener(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode, self.tile = (8, 6), "RGB", []
            self.im = Image.new("RGB", (8, 6), "lime").im

    def register() -> None:
        Image.register_open("HEIF", Opener, lambda start: start[4:12] == b"ftypheic")

    monkeypatch.setattr(Image, "ID", Image.ID.copy())
    monkeypatch.setattr(Image, "OPEN", Image.OPEN.copy())
    module.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    return module


@pytest.mark.usefixtures("heif_module")
def test_heic_is_read_where_pillow_heif_is_installed() -> None:
    assert (sample(heif()).picture == (0, 255, 0)).all()


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1", b"hevc"])
def test_heic_without_pillow_heif_says_what_to_install(
    brand: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="is HEIF .* pip install pillow-heif"):
        sample(heif(brand))


@pytest.mark.usefixtures("heif_module")
def test_heic_that_pillow_heif_cannot_read_is_no_image() -> None:
    with pytest.raises(ImageError, match="no image that Pillow can read"):
        sample(heif(b"heix"))


def test_avif_says_which_pillow_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "AVIF"])
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "AVIF"})
    with pytest.raises(ImageError, match=r"is AVIF, which Pillow reads from version 11\.3 on"):
        sample(heif(b"avif"))
