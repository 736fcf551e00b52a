"""Names of files, what made them, and how they appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fixtures_io import ROOT, picture
from vitviz.errors import OptionError, OutputError
from vitviz.explaining.explanation import Explanation, Prediction
from vitviz.images.fitting import InputTransform
from vitviz.images.samples import sample_of
from vitviz.images.sources import Source, find_sources
from vitviz.methods.attention import RawAttention
from vitviz.methods.evidence import Evidence
from vitviz.methods.method import Method
from vitviz.methods.rollout import Rollout
from vitviz.options import Fit, OutputKind, PictureFormat, PictureOptions
from vitviz.runs import writing
from vitviz.runs.job import Job
from vitviz.runs.names import output_path
from vitviz.runs.picture_files import animated
from vitviz.runs.provenance import (
    Provenance,
    encode,
    encode_picture,
    is_whole,
    read_provenance,
)
from vitviz.runs.writing import prepare_folder, sweep, write_whole

OUT = Path("vitviz-out")
STILL = [each for each in PictureFormat if each is not PictureFormat.GIF]
MINE = Provenance(
    recipe={"source_sha256": "ab", "options": {"discard": 0.9}, "size": [64, 64], "class": None},
    source="photos/caf\udce9.jpg",
    source_id="1",
    class_index=3,
    class_label="tabby, tabby cat",
    predictions=(Prediction(class_index=3, class_label="Égypt", score=0.1234567890123),),
    versions={"vitviz": "0"},
)
OTHER = replace(MINE, recipe={"source_sha256": "cd"}, source="b.jpg", source_id="2")


def explanation() -> Explanation:
    frame = InputTransform(
        fit=Fit.SQUASH,
        size=(32, 48),
        patch=(16, 16),
        resample=Image.Resampling.BICUBIC,
        crop_pct=1.0,
    )
    return Explanation(
        method=Rollout(),
        relevance=np.random.default_rng(0).random((2, 3)).astype(np.float32),
        sample=sample_of(picture(20, 30), "x", frame, 1024),
    )


def path_of(key: str, method: Method, request: str | None, kind: OutputKind) -> str:
    return str(output_path(OUT, Source(path=Path(key), key=key), method, request, kind))


# Names


@pytest.mark.parametrize(
    ("method", "request_key", "kind", "expected"),
    [
        ("rollout", None, OutputKind.OVERLAY, "rollout.png"),
        ("rollout", None, OutputKind.HEATMAP, "rollout.heatmap.png"),
        ("rollout", None, OutputKind.PANEL, "rollout.panel.png"),
        ("rollout", None, OutputKind.NPY, "rollout.npy"),
        ("rollout", None, OutputKind.GRAY, "rollout.gray.png"),
        ("grad-rollout", "c281", OutputKind.OVERLAY, "grad-rollout.c281.png"),
        ("grad-rollout", "c281", OutputKind.HEATMAP, "grad-rollout.c281.heatmap.png"),
        ("grad-rollout", "top1", OutputKind.PANEL, "grad-rollout.top1.panel.png"),
        ("grad-rollout", "top5", OutputKind.NPY, "grad-rollout.top5.npy"),
    ],
)
def test_name_is_the_contracts(
    method: Method, request_key: str | None, kind: OutputKind, expected: str
) -> None:
    found = path_of("photos/cat.jpg", method, request_key, kind)
    assert found == f"vitviz-out/photos/cat.jpg.{expected}"


@pytest.mark.parametrize("key", ["a", ".hidden", "a.b.c", "a b\n.png", "-x.png", "[red].png"])
def test_odd_names_are_kept(key: str) -> None:
    assert path_of(key, "rollout", None, OutputKind.OVERLAY) == f"vitviz-out/{key}.rollout.png"


LONG = ["x" * 251 + ".png", "é" * 120 + ".png", "猫" * 83 + ".jpg", "\U0001f408" * 62 + ".png"]
LONG += [shift + "猫" * 82 + ".jpg" for shift in ("a", "ab", "abc")]
LONG += [os.fsdecode(b"\xe9" * 250 + b".png")]


@pytest.mark.parametrize("key", LONG, ids=range(len(LONG)))
@pytest.mark.parametrize("kind", OutputKind)
def test_long_name_is_shortened_and_ends_in_its_digest(key: str, kind: OutputKind) -> None:
    path = output_path(OUT, Source(path=Path(key), key=key), "grad-rollout", "c281", kind)
    name = os.fsencode(path.name)
    parts = [key, "grad-rollout", "c281"]
    parts += [kind.value] if kind in (OutputKind.HEATMAP, OutputKind.PANEL, OutputKind.GRAY) else []
    whole = os.fsencode(".".join([*parts, "npy" if kind is OutputKind.NPY else "png"]))
    if len(whole) <= 255:
        assert name == whole
        return
    assert 240 < len(name) <= 255
    ending = b".npy" if kind is OutputKind.NPY else b".png"
    digest = hashlib.sha256(whole).hexdigest()[:12].encode()
    assert name.endswith(digest + ending)
    if b"\xe9" * 9 not in name:
        name.decode("utf-8")  # no character was cut in two


def test_name_of_255_bytes_is_kept() -> None:
    key = "x" * (255 - len(".rollout.png"))
    assert path_of(key, "rollout", None, OutputKind.OVERLAY).endswith("/" + key + ".rollout.png")
    assert key + "x" not in path_of(key + "x", "rollout", None, OutputKind.OVERLAY)


def test_shortened_names_stay_apart() -> None:
    names = {
        path_of("猫" * 83 + tail, "grad-rollout", request, kind)
        for tail in (".jpg", ".png")
        for request in ("c1", "c2", "top1")
        for kind in OutputKind
    }
    assert len(names) == 2 * 3 * len(OutputKind)


def test_all_kinds_have_different_paths() -> None:
    paths = {path_of("a.jpg", "rollout", None, kind) for kind in OutputKind}
    assert len(paths) == len(OutputKind)


def test_shortened_name_can_be_written(tmp_path: Path) -> None:
    source = Source(path=Path("a"), key="é" * 125 + ".png")
    path = output_path(tmp_path, source, "rollout", None, OutputKind.PANEL)
    write_whole(path, b"x", MINE)
    assert path.read_bytes() == b"x"


# What made a file


@pytest.mark.parametrize("kind", OutputKind)
def test_provenance_travels_inside_the_file(tmp_path: Path, kind: OutputKind) -> None:
    path = output_path(tmp_path, Source(path=Path("a"), key="a"), "rollout", None, kind)
    path.write_bytes(encode(explanation(), kind, MINE))
    assert read_provenance(path) == MINE


@pytest.mark.parametrize("format", STILL)
@pytest.mark.parametrize("kind", [OutputKind.OVERLAY, OutputKind.PANEL, OutputKind.GRAY])
def test_each_format_holds_provenance_and_the_picture(
    tmp_path: Path, kind: OutputKind, format: PictureFormat
) -> None:
    made = replace(explanation(), pictures=PictureOptions(kinds=(kind,), format=format))
    source = Source(path=Path("a"), key="a")
    path = output_path(tmp_path, source, "rollout", None, kind, format)
    stored = PictureFormat.PNG if kind is OutputKind.GRAY else format
    assert path.suffix == {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[stored]
    path.write_bytes(encode(made, kind, MINE))
    assert read_provenance(path) == MINE
    with Image.open(path) as image:
        assert image.format == stored.value.upper()
        shown, drawn = np.asarray(image).astype(int), made.draw(kind)
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).mean() < (1e-9 if stored is PictureFormat.PNG else 6)


@pytest.mark.parametrize("format", STILL)
def test_picture_that_was_cut_off_is_not_whole(tmp_path: Path, format: PictureFormat) -> None:
    made = replace(explanation(), pictures=PictureOptions(format=format))
    path = tmp_path / f"a{format.ending}"
    content = encode(made, OutputKind.OVERLAY, MINE)
    path.write_bytes(content)
    assert is_whole(path)
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert not is_whole(path)


@pytest.mark.parametrize("format", [PictureFormat.JPEG, PictureFormat.WEBP])
def test_photograph_of_somebody_else_has_no_provenance(
    tmp_path: Path, format: PictureFormat
) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a photograph of vitviz:{}"
    path = tmp_path / f"a{format.ending}"
    picture(30, 40).save(path, exif=exif)
    assert read_provenance(path) is None
    path.write_bytes(b"")
    assert read_provenance(path) is None


def test_what_a_format_cannot_hold_is_refused() -> None:
    wide = np.zeros((1, 16_384, 3), np.uint8)
    with pytest.raises(OutputError, match="too large for webp.*--format png"):
        encode_picture(wide, MINE, PictureFormat.WEBP)
    crowded = replace(MINE, source="x" * 70_000)
    with pytest.raises(OutputError, match="too large for jpeg"):
        encode_picture(wide, crowded, PictureFormat.JPEG)
    with pytest.raises(OutputError, match=r"too large for webp; use --format gif, or a lower"):
        animated([wide], "", PictureFormat.WEBP)
    with pytest.raises(OutputError, match=r"too large for gif; use a lower --max-size"):
        animated([wide], "x" * 70_000, PictureFormat.GIF)


@pytest.mark.parametrize("format", STILL)
def test_pictures_in_a_folder_of_sources_are_known_and_skipped(
    tmp_path: Path, format: PictureFormat
) -> None:
    made = replace(explanation(), pictures=PictureOptions(format=format))
    (tmp_path / f"a{format.ending}").write_bytes(encode(made, OutputKind.OVERLAY, MINE))
    picture(30, 40).save(tmp_path / "b.jpg")
    found, _ = find_sources([tmp_path], skip=lambda path: read_provenance(path) is not None)
    assert [each.path.name for each in found] == ["b.jpg"]


def test_gray_is_the_heat_in_one_channel() -> None:
    made = explanation()
    gray = made.draw(OutputKind.GRAY)
    assert (gray.dtype, gray.shape) == (np.uint8, (20, 30))
    assert (gray.min(), gray.max()) == (0, 255)
    signed = replace(made, method=Evidence(), relevance=made.relevance - 0.5)
    centres = signed.draw(OutputKind.GRAY)[5::10, 5::10].astype(int)
    assert ((centres > 128) == (signed.relevance > 0)).all()


def test_gray_of_many_maps_is_refused() -> None:
    with pytest.raises(OptionError, match="--save gray .* blocks × heads .* --save npy"):
        Job(method=RawAttention(), pictures=PictureOptions(kinds=(OutputKind.GRAY,)))


def test_npy_gives_the_relevance(tmp_path: Path) -> None:
    made = explanation()
    path = tmp_path / "a.npy"
    path.write_bytes(encode(made, OutputKind.NPY, MINE))
    loaded = np.load(path)
    assert loaded.dtype == np.float32
    assert loaded.shape == (2, 3)
    assert np.array_equal(loaded, made.relevance)
    assert np.array_equal(np.load(path, mmap_mode="r"), made.relevance)


@pytest.mark.parametrize("kind", [OutputKind.OVERLAY, OutputKind.HEATMAP, OutputKind.PANEL])
def test_png_is_a_plain_rgb_picture(kind: OutputKind) -> None:
    with Image.open(io.BytesIO(encode(explanation(), kind, MINE))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")


@pytest.mark.parametrize("kind", OutputKind)
def test_same_map_gives_the_same_bytes(kind: OutputKind) -> None:
    assert encode(explanation(), kind, MINE) == encode(explanation(), kind, MINE)


def png_with(text: str) -> bytes:
    info = PngInfo()
    info.add_text("vitviz", text)
    buffer = io.BytesIO()
    Image.new("L", (2, 2)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def npy_of(*arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    for array in arrays:
        np.save(buffer, array)
    return buffer.getvalue()


def zip_of() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


def giant_npy() -> bytes:
    content = npy_of(np.zeros((1,), np.float32))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999,), }"
    return content[:10] + header.ljust(len(content) - 4 - 10 - 1) + b"\n" + content[-4:]


FOREIGN_PNG = {
    "nothing": b"",
    "text": b"hello",
    "plain": png_with("").replace(b"vitviz", b"Author"),
    "not-json": png_with("mine"),
    "number": png_with("5"),
    "string": png_with('"mine"'),
    "null": png_with("null"),
    "list": png_with("[1, 2]"),
    "empty": png_with("{}"),
    "other-keys": png_with('{"predictions": [], "who": 1}'),
    "bad-predictions": png_with('{"predictions": 5}'),
    "bad-recipe": png_with('{"predictions": [], "recipe": 1, "source": "", "source_id": ""}'),
    "half": encode(explanation(), OutputKind.OVERLAY, MINE)[:60],
    "deep": png_with("[" * 100_000),
}
FOREIGN_NPY = {
    "nothing": b"",
    "text": b"hello",
    "plain": npy_of(np.zeros((2, 2))),
    "two": npy_of(np.zeros(3), np.zeros(3)),
    "objects": b"\x80\x04\x95" + bytes(20),
    "zip": zip_of(),
    "broken-zip": b"PK\x03\x04" + bytes(40),
    "half": npy_of(np.zeros((20, 20)))[:100],
    "half-header": npy_of(np.zeros((20, 20)))[:30],
    "giant": giant_npy(),
}
FOREIGN = [("a.png", name, content) for name, content in FOREIGN_PNG.items()]
FOREIGN += [("a.npy", name, content) for name, content in FOREIGN_NPY.items()]


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, _, content in FOREIGN],
    ids=[f"{name}-{what}" for name, what, _ in FOREIGN],
)
def test_foreign_file_in_the_way_stays(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(OutputError, match="already exists"):
        write_whole(path, b"new", MINE)
    assert path.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_giant_foreign_picture_in_the_way_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OutputError, match="already exists"):
        write_whole(path, b"new", MINE)


def test_folder_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        write_whole(tmp_path / "a.png", b"new", MINE)


def test_dangling_link_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("nowhere")
    with pytest.raises(OutputError, match="already exists"):
        write_whole(tmp_path / "a.png", b"new", MINE)
    assert (tmp_path / "a.png").is_symlink()


@pytest.mark.parametrize("name", ["a.png", "a.npy"])
def test_pipe_in_the_way_never_blocks(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    outcome: list[BaseException | None] = []

    def write() -> None:
        try:
            write_whole(path, b"new", MINE)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(1)
    blocked = thread.is_alive()
    if blocked:  # let the thread go
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        thread.join(5)
    assert not blocked
    assert isinstance(outcome[0], OutputError)


@pytest.mark.parametrize("kind", [OutputKind.OVERLAY, OutputKind.NPY])
def test_file_made_from_another_source_stays(tmp_path: Path, kind: OutputKind) -> None:
    path = tmp_path / ("a.npy" if kind is OutputKind.NPY else "a.png")
    path.write_bytes(before := encode(explanation(), kind, OTHER))
    with pytest.raises(OutputError, match="made from b.jpg"):
        write_whole(path, b"new", MINE)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", [OutputKind.OVERLAY, OutputKind.NPY])
def test_rerun_replaces_its_own(tmp_path: Path, kind: OutputKind) -> None:
    path = tmp_path / ("a.npy" if kind is OutputKind.NPY else "a.png")
    earlier = replace(MINE, recipe={"source_sha256": "old bytes"}, class_label=None)
    path.write_bytes(encode(explanation(), kind, earlier))
    write_whole(path, b"new", MINE)
    assert path.read_bytes() == b"new"


# Whole or not at all


def test_folders_are_made_and_no_temporary_file_remains(tmp_path: Path) -> None:
    write_whole(tmp_path / "p/q/a.png", b"x", MINE)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.png"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["_fill", "hardlink_to", "replace"])
def test_nothing_remains_of_a_file_that_was_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fail(file: Any, *_: object) -> None:
        if step == "_fill":
            file.write(b"ha")
        raise error

    if step == "replace":
        (tmp_path / "a.png").write_bytes(encode(explanation(), OutputKind.OVERLAY, MINE))
    before = [path.read_bytes() for path in tmp_path.iterdir()]
    monkeypatch.setattr(writing if step == "_fill" else Path, step, fail)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_whole(tmp_path / "a.png", b"half a picture", MINE)
    monkeypatch.undo()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == before


def test_old_file_survives_a_failed_rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(before := encode(explanation(), OutputKind.OVERLAY, MINE))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_fill", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_whole(path, b"new", MINE)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.png", b"x", MINE)
    (tmp_path / "b.png").write_bytes(b"x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.png", "b.png")]
    assert modes[0] == modes[1]


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for folder in (tmp_path / "out", tmp_path / "out/deeper"):
        with pytest.raises(OutputError, match="cannot be written to") as caught:
            prepare_folder(folder)
        assert str(folder) in str(caught.value)
        assert "None" not in str(caught.value)


def test_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        prepare_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            prepare_folder(tmp_path)
        with pytest.raises(OutputError, match="Permission denied"):
            write_whole(tmp_path / "a.png", b"x", MINE)
    finally:
        tmp_path.chmod(0o700)


def test_prepared_folder_is_empty(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "p/q")
    assert list((tmp_path / "p/q").iterdir()) == []


def test_provenance_of_a_missing_file_is_none(tmp_path: Path) -> None:
    assert read_provenance(tmp_path / "a.png") is None
    assert read_provenance(tmp_path / "a.npy") is None


def test_provenance_is_readable_json(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(explanation(), OutputKind.OVERLAY, MINE))
    with Image.open(path) as image:
        stored = json.loads(image.info["vitviz"])
    assert stored["class_label"] == "tabby, tabby cat"
    assert stored["source"] == MINE.source


# Not alone


@pytest.mark.parametrize("links", [True, False])
def test_name_taken_meanwhile_by_a_map_of_another_source_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    path = tmp_path / "a.png"
    theirs = encode(explanation(), OutputKind.OVERLAY, OTHER)
    fill = writing._fill

    def fill_after_them(file: io.FileIO, content: bytes) -> None:
        path.write_bytes(theirs)
        fill(file, content)

    monkeypatch.setattr(writing, "_fill", fill_after_them)
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", without_links)
    with pytest.raises(OutputError, match="made from b.jpg"):
        write_whole(path, b"new", MINE)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [theirs]


def test_name_taken_meanwhile_by_the_same_map_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = writing._fill

    def fill_after_them(file: io.FileIO, content: bytes) -> None:
        (tmp_path / "a.png").write_bytes(encode(explanation(), OutputKind.OVERLAY, MINE))
        fill(file, content)

    monkeypatch.setattr(writing, "_fill", fill_after_them)
    write_whole(tmp_path / "a.png", b"new", MINE)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


def without_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")  # as FAT says


def test_file_system_without_links_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "hardlink_to", without_links)
    write_whole(tmp_path / "a.png", b"x", MINE)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"x"]


# What killed runs leave

DAY = 24 * 60 * 60
NAME = ".vitviz-0123456789abcdef.tmp"
WRITER = (
    "import sys, time, pathlib\n"
    "from vitviz.runs import writing\n"
    "with writing._temporary(pathlib.Path(sys.argv[1]), b'half'):\n"
    "    print('locked', flush=True)\n"
    "    time.sleep(60)\n"
)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start another process that is busy writing a file, and was for two days."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline() == b"locked\n"
        (path,) = tmp_path.iterdir()
        os.utime(path, (time.time() - 2 * DAY,) * 2)
        yield process
        process.kill()


def left(folder: Path, age: float = 0, name: str = NAME) -> Path:
    path = folder / name
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_file_of_a_dead_process_is_swept(tmp_path: Path) -> None:
    path = left(tmp_path)
    sweep([tmp_path / "missing", tmp_path])
    assert not path.exists()


def test_file_of_a_living_process_stays_until_it_is_killed(
    tmp_path: Path, writer: subprocess.Popen[bytes]
) -> None:
    (path,) = tmp_path.iterdir()
    sweep([tmp_path])
    assert path.read_bytes() == b"half"
    writer.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    sweep([tmp_path])
    assert not path.exists()


def test_own_file_stays_however_long_it_takes(tmp_path: Path) -> None:
    with writing._temporary(tmp_path, b"half") as path:
        os.utime(path, (time.time() - 2 * DAY,) * 2)
        sweep([tmp_path])
        assert path.read_bytes() == b"half"


@pytest.mark.parametrize("name", [".vitviz-notes.tmp", "a.tmp"])
def test_users_own_file_is_never_swept(tmp_path: Path, name: str) -> None:
    path = left(tmp_path, 2 * DAY, name)
    sweep([tmp_path])
    assert path.exists()


def test_link_is_never_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / NAME).symlink_to("mine")
    sweep([tmp_path])
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_names_of_temporary_files_are_those_that_are_swept(tmp_path: Path) -> None:
    with writing._temporary(tmp_path) as path:
        assert writing._TEMPORARY.fullmatch(path.name)


@pytest.mark.parametrize("system", ["without fcntl", "without locks"])
def test_without_locks_a_file_stays_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if system == "without fcntl":
        monkeypatch.setattr(writing, "fcntl", None)
    else:
        monkeypatch.setattr(writing.fcntl, "flock", refuse)
    young = left(tmp_path, DAY / 2)
    old = left(tmp_path, 2 * DAY, NAME.replace("0", "f"))
    sweep([tmp_path])
    assert young.exists()
    assert not old.exists()
    write_whole(tmp_path / "a.png", b"x", MINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "a.png"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_sweep_between_creating_and_locking_costs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    lock, swept = writing._lock, []

    def lock_late(file: io.FileIO) -> bool | None:
        if swept:
            return lock(file)
        swept.append(Path(str(file.name)))
        if moment == "before":  # the sweep has been, and the lock is free again
            swept[0].unlink()
            return lock(file)
        with swept[0].open("r+b", 0) as other:  # the sweep is about to remove it
            assert lock(other)
            assert lock(file) is False
            swept[0].unlink()
            return False

    monkeypatch.setattr(writing, "_lock", lock_late)
    write_whole(tmp_path / "a.png", b"x", MINE)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"x"]


def test_file_taken_from_its_writer_fails_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(file: io.FileIO, content: bytes) -> None:
        Path(str(file.name)).unlink()

    monkeypatch.setattr(writing, "_fill", take)
    with pytest.raises(OutputError, match="cannot be written"):
        write_whole(tmp_path / "a.png", b"x", MINE)
    assert not list(tmp_path.iterdir())


def test_maker_of_a_large_array_is_read_without_the_array(tmp_path: Path) -> None:
    content = encode(explanation(), OutputKind.NPY, MINE)
    with io.BytesIO(content) as file:
        np.load(file)
        maker = content[file.tell() :]
    path = tmp_path / "large.npy"
    with path.open("wb") as file:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (1 << 14, 1 << 20)}
        np.lib.format.write_array_header_1_0(file, shape)
        file.seek(1 << 36, os.SEEK_CUR)  # a hole: it takes no room
        file.write(maker)
    assert read_provenance(path) == MINE
