"""A folder as hostile as folders get, through the real command: one record a file, no more."""

from __future__ import annotations

import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from fixtures_io import ROOT, TIFF_YCBCR, at_most, picture

SECONDS = 300  # many times what is needed, however busy the machine
MOST_MEMORY = 900_000  # KiB, beside what a run over a single small file takes

pytestmark = pytest.mark.slow


# What users have


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if options.get("save_all"):
        options["append_images"] = [image.transpose(Image.Transpose.ROTATE_180), image]
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_mode(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    """Draw a picture (height, width) of any mode."""
    image = picture(*size, seed)
    grey = np.asarray(image.convert("L"))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) << 23)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(grey))
    return image.convert(mode)


def oriented(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


ANIMATED = {"save_all": True}
TIFF_MODES = "1", "L", "P", "LA", "RGB", "RGBA", "CMYK"
KINDS: list[tuple[str, str, str, dict[str, Any]]] = [  # mode, format, ending, options
    *(("RGB", "JPEG", ".jpg", oriented(number)) for number in range(1, 9)),
    ("RGB", "JPEG", ".jpeg", {"progressive": True}),
    ("L", "JPEG", ".JPG", {}),
    ("CMYK", "JPEG", ".jpg", {}),
    *((mode, "PNG", ".png", {}) for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16")),
    *((mode, "TIFF", ".tif", {}) for mode in (*TIFF_MODES, *TIFF_YCBCR)),
    *((mode, "TIFF", ".tiff", {}) for mode in ("I;16", "I", "F")),
    ("RGB", "TIFF", ".tif", {"compression": "tiff_lzw"}),
    ("RGB", "TIFF", ".tif", {"compression": "tiff_adobe_deflate"}),
    ("RGB", "TIFF", ".tif", {"compression": "jpeg"}),
    ("RGB", "WEBP", ".webp", {}),
    ("RGBA", "WEBP", ".webp", {"lossless": True}),
    *((mode, "BMP", ".bmp", {}) for mode in ("1", "L", "P", "RGB")),
    *((mode, "GIF", ".gif", {}) for mode in ("L", "P", "RGB")),
    *((mode, "TGA", ".tga", {}) for mode in ("L", "RGBA")),
    *((mode, "PPM", ".ppm", {}) for mode in ("L", "RGB")),
    *(("RGB", kind, ending, ANIMATED) for kind, ending in (("GIF", ".gif"), ("WEBP", ".webp"))),
    *(("RGB", kind, ending, ANIMATED) for kind, ending in (("PNG", ".png"), ("TIFF", ".tif"))),
    *(
        (mode, "AVIF", ".avif", {})
        for mode in ("RGB", "RGBA")
        if "avif" in features.get_supported()
    ),
    *((mode, "JPEG2000", ".jp2", {}) for mode in ("L", "RGB") if features.check("jpg_2000")),
]
SIZES = ((37, 53), (1, 1), (90, 5))
LARGE: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("I;16", "PNG", "deep.png", {"compress_level": 1}),  # beside the next one: two threads meet
    ("RGBA", "PNG", "glass.png", {"compress_level": 1}),
    ("RGB", "JPEG", "photo.jpg", {}),
)
ODD_NAMES = (
    b" spaces .png",
    b"new\nline.png",
    b"tab\tand\rreturn.png",
    b'it\'s "quoted".png',
    b"caf\xe9-latin1.png",
    b"\xff\xfe\x80.png",
    b"-dash.png",
    b"--weights.png",
    b"[red]markup[bold].png",
    b"\x1b[31mred\x1b]0;title\x07.png",
    b"$(touch mark).png",
    b"*?[a].png",
    b"%s%n{0}.png",
    b"CON.png",
    b"a.png.rollout.png",
    "👩‍🔬🐈.png".encode(),
    "مرحبا-\u202egnp.png".encode(),
    ("n" * 246).encode() + b".png",
    ("é" * 123).encode() + b".png",
)


# What nobody should have


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Write a PNG whose header promises more than follows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


ZEROS = zlib.compress(bytes(1 << 26), 1)  # 64 MiB in a third of one
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\nshowpage\n%%EOF\n"
FITS = b"".join(
    f"{key:8}= {value:>20}".encode().ljust(80)
    for key, value in {
        "SIMPLE": "T",
        "BITPIX": "8",
        "NAXIS": "2",
        "NAXIS1": "3",
        "NAXIS2": "2",
    }.items()
)
FITS = (FITS + b"END").ljust(2880) + bytes(2880)
BAD: dict[str, bytes] = {
    **{f"empty{number}{kind[2]}": b"" for number, kind in enumerate(KINDS)},
    **{f"text{number}{kind[2]}": b"no image at all\n" * 9 for number, kind in enumerate(KINDS)},
    "page.jpg": b"<!doctype html><html><body>404</body></html>",
    "archive.png": b"PK\x03\x04" + bytes(60),
    "script.png": b"#!/bin/sh\ntouch mark\n",
    "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "program.jpg": EPS,
    "stars.png": FITS,
    "bomb.png": png(65_000, 65_000, chunk(b"IDAT", ZEROS)),
    "negative.png": png(0x80000001, 1),
    "no-pixels.png": png(0, 10),
    "profile-bomb.png": png(30, 20, chunk(b"iCCP", b"x\0\0" + ZEROS)),
    "text-bomb.png": png(30, 20, chunk(b"zTXt", b"x\0\0" + ZEROS)),
    "bomb.gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;",
    "bomb.bmp": b"BM"
    + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6),
    "bomb.ppm": b"P6 60000 60000 255\n" + bytes(99),
}


@dataclass(kw_only=True)
class Corpus:
    """The files of a folder, by what must become of them."""

    folder: Path
    good: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    either: set[str] = field(default_factory=set)

    def put(self, kind: set[str], name: str | bytes, content: bytes) -> None:
        path = self.folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        kind.add(str(path))


def draw_corpus(folder: Path) -> Corpus:
    corpus = Corpus(folder=folder)
    rng = random.Random(20)
    for number, (mode, kind, ending, options) in enumerate(KINDS):
        name = f"{number:02}-{kind}-{mode.replace(';', '')}"
        for seed, size in enumerate(SIZES):
            whole = encoded(in_mode(mode, size, seed), kind, **options)
            corpus.put(corpus.good, f"{kind}/{name}-{seed}{ending}", whole)
        whole = encoded(in_mode(mode, SIZES[0], number), kind, **options)
        for cut in range(2):
            content = whole[: rng.randrange(1, len(whole))]
            corpus.put(corpus.either, f"cut/{name}-{cut}{ending}", content)
        for flip in range(4):
            flipped = bytearray(whole)
            for _ in range(rng.choice([1, 5, 40])):
                flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            corpus.put(corpus.either, f"flip/{name}-{flip}{ending}", bytes(flipped))
    for seed, odd in enumerate(ODD_NAMES):
        corpus.put(corpus.good, b"names/" + odd, encoded(picture(20, 30, seed), "PNG"))
    for name, content in BAD.items():
        corpus.put(corpus.bad, f"bad/{name}", content)
    corpus.put(corpus.good, "sizes/line.png", encoded(picture(1, 5000), "PNG"))
    corpus.put(corpus.good, "sizes/column.jpg", encoded(picture(5000, 1), "JPEG"))
    for mode, kind, name, options in LARGE:
        content = encoded(Image.new(mode, (12_000, 9_000)), kind, **options)
        corpus.put(corpus.good, f"sizes/{name}", content)
    draw_oddities(corpus)
    return corpus


def draw_oddities(corpus: Corpus) -> None:
    """Put into the folder what is no regular file, or cannot be read."""
    folder = corpus.folder / "odd"
    corpus.put(corpus.good, "odd/folder.png/inside.png", encoded(picture(20, 30, 90), "PNG"))
    corpus.put(corpus.good, "odd/real.png", encoded(picture(20, 30, 91), "PNG"))
    (folder / "empty-folder.png").mkdir()
    (folder / "loop").symlink_to(folder)
    (folder / "z-link.png").symlink_to(folder / "real.png")
    corpus.good.add(str(folder / "z-link.png"))  # a name of its own is an image of its own
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "ring-a.png").symlink_to(folder / "ring-b.png")
    (folder / "broken.png").symlink_to(folder / "gone.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "random.jpg").symlink_to("/dev/urandom")
    (folder / "memory.png").symlink_to("/proc/self/mem")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path may have no more than 107 bytes
        listener.bind("socket.png")
        os.chdir(here)
    with (folder / "sparse.png").open("wb") as sparse:
        sparse.truncate(1 << 40)
    locked = folder / "locked.png"
    corpus.put(
        corpus.good if os.geteuid() == 0 else corpus.bad, locked, encoded(picture(9, 9), "PNG")
    )
    locked.chmod(0)
    names = ("self", "ring-a", "broken", "zero", "memory", "pipe", "socket", "sparse")
    corpus.bad |= {str(folder / f"{name}.png") for name in names} | {str(folder / "random.jpg")}


@dataclass(frozen=True, kw_only=True)
class Aftermath:
    """What the command left of the folder."""

    corpus: Corpus
    home: Path
    code: int
    memory: int
    records: list[dict[str, Any]]
    err: str

    def of(self, kind: set[str]) -> list[dict[str, Any]]:
        return [record for record in self.records if record["source"] in kind]


def explain(folder: Path, home: Path) -> tuple[int, int]:
    """Run the command in a process of its own; return its exit code and most memory in KiB."""
    home.mkdir()
    (home / "gs").write_text(f"#!/bin/sh\ntouch {home}/mark\n")  # what decodes EPS for Pillow
    (home / "gs").chmod(0o755)
    words = [sys.executable, "-m", "vitviz", "rollout", str(folder), "-m", "demo", "--json"]
    path = f"{home}{os.pathsep}{os.environ['PATH']}"
    with (home / "out").open("wb") as out, (home / "err").open("wb") as err:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
        child = subprocess.Popen(words, cwd=home, stdout=out, stderr=err, env=environment)
        try:
            with at_most(SECONDS):
                _, status, used = os.wait4(child.pid, 0)
        except TimeoutError:
            child.kill()
            raise
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, used.ru_maxrss


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    """Run the command once over the whole folder, and once over a file to compare with."""
    folder = tmp_path_factory.mktemp("hostile")
    corpus = draw_corpus(folder / "corpus")
    code, memory = explain(corpus.folder, folder / "home")
    good, usual = explain(corpus.folder / "odd/real.png", folder / "usual")
    assert good == 0
    return Aftermath(
        corpus=corpus,
        home=folder / "home",
        code=code,
        memory=memory - usual,
        records=[json.loads(line) for line in (folder / "home/out").read_bytes().splitlines()],
        err=(folder / "home/err").read_text(errors="replace"),
    )


def test_corpus_is_large(aftermath: Aftermath) -> None:
    corpus = aftermath.corpus
    assert len(corpus.good | corpus.bad | corpus.either) >= 500
    assert len(corpus.good) >= 150


def test_every_file_is_one_record_and_nothing_else_is(aftermath: Aftermath) -> None:
    corpus = aftermath.corpus
    counted = Counter(record["source"] for record in aftermath.records)
    assert counted == Counter(corpus.good | corpus.bad | corpus.either)
    assert {record["status"] for record in aftermath.records} == {"written", "failed"}


def test_every_good_file_is_written(aftermath: Aftermath) -> None:
    for record in aftermath.of(aftermath.corpus.good):
        assert record["status"] == "written", record
        assert record["error"] is None


def test_every_bad_file_fails_with_one_line(aftermath: Aftermath) -> None:
    for record in aftermath.of(aftermath.corpus.bad):
        assert record["status"] == "failed", record
        assert not record["outputs"]
    for record in aftermath.records:
        assert (record["error"] is None) == (record["status"] == "written")
        reason = record["error"] or "none"
        assert reason.isprintable(), reason
        assert 3 < len(reason) < 200


def test_every_picture_that_was_written_opens(aftermath: Aftermath) -> None:
    written = [output for record in aftermath.records for output in record["outputs"]]
    folder = aftermath.home / "vitviz-out"
    paths = [aftermath.home / output["path"] for output in written]
    assert len(set(paths)) == len(paths)
    assert set(paths) == {path for path in folder.rglob("*") if path.is_file()}
    for path in paths:
        assert path.resolve().is_relative_to(folder)
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert max(image.size) <= 1024


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bad/bomb.png", "decompression bomb"),
        ("bad/bomb.gif", "decompression bomb"),
        ("bad/bomb.bmp", "decompression bomb"),
        ("bad/bomb.ppm", "decompression bomb"),
        ("bad/empty0.jpg", "is empty"),
        ("bad/text0.jpg", "is no image"),
        ("bad/program.jpg", "would run a program"),
        ("bad/stars.png", "may unpack to any size"),
        ("odd/pipe.png", "not a regular file"),
        ("odd/socket.png", "not a regular file"),
        ("odd/zero.png", "not a regular file"),
        ("odd/self.png", "symbolic links"),
        ("odd/broken.png", "No such file"),
        ("odd/sparse.png", "bytes; expected at most"),
    ],
)
def test_reason_names_what_is_wrong(aftermath: Aftermath, name: str, says: str) -> None:
    (record,) = aftermath.of({str(aftermath.corpus.folder / name)})
    assert says in record["error"]


def test_folder_ends_with_exit_code_1_and_no_traceback(aftermath: Aftermath) -> None:
    assert aftermath.code == 1
    assert "Traceback" not in aftermath.err
    assert "Error" not in aftermath.err
    told = [line for line in aftermath.err.splitlines() if line.startswith("failed: ")]
    failed = [record for record in aftermath.records if record["status"] == "failed"]
    assert len(told) == len(failed)
    assert "\x1b" not in aftermath.err


def test_memory_is_bounded(aftermath: Aftermath) -> None:
    assert aftermath.memory < MOST_MEMORY


def test_no_file_of_the_folder_is_executed_or_changed(aftermath: Aftermath) -> None:
    assert not list(aftermath.home.parent.rglob("mark"))
    assert (aftermath.corpus.folder / "bad/script.png").read_bytes() == BAD["script.png"]
