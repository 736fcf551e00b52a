"""Images whose metadata is broken, that have several frames, or that need another decoder."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

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
