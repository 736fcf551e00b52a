"""The report: what a run keeps for it, what is found in a folder, whose files are replaced."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fixtures_io import ROOT, Shell, run_process, save_pictures
from vitviz.errors import ImageError, OutputError
from vitviz.images.fitting import Region
from vitviz.images.sources import Source
from vitviz.report import sink as sinks
from vitviz.report.failures import Failure, put_failures, read_failures
from vitviz.report.files import is_own, put_picture
from vitviz.report.maps import read_map
from vitviz.report.sink import Sink
from vitviz.runs.provenance import source_id
from vitviz.runs.records import Result, failure

pytestmark = pytest.mark.usefixtures("one_thread")

OUT = Path("vitviz-out")
PAGE = OUT / "report.html"
FILES = OUT / "report-files"


def index() -> dict[str, Any]:
    """Return what the page knows."""
    found = re.search(r'id="data">(.*?)</script>', PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def images() -> dict[str, Any]:
    return {each["name"]: each for each in index()["images"]}


def numbers(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Read the numbers of a map as the page does."""
    stored = read_map(OUT, name)
    assert stored is not None and tuple(stored.shape) == shape
    levels = np.frombuffer(base64.b64decode(stored.values), "<u2").reshape(-1, *shape[-2:])
    low, high = np.array(stored.ranges).T[:, :, None, None]
    return (low + levels / 65535 * (high - low)).reshape(shape)


def test_page_lists_images_maps_and_classes(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "q/b.png"])
    done = shell("grad-rollout", "p", *tiny, "--class", "top1", "--class", "tabby", "--report")
    assert done.code == 0
    assert done.err.splitlines()[-1] == "report: vitviz-out/report.html"
    assert str(PAGE) not in done.paths  # stdout has maps alone
    assert list(images()) == ["p/a.png", "p/q/b.png"]
    found, words = images()["p/a.png"], index()["words"]
    assert [each["request"] for each in found["maps"]] == ["c3", "top1"]
    assert words[found["maps"][0]["label"]] == "tabby, tabby cat"
    assert len(found["predictions"]) == 5
    assert found["size"] == [48, 64]
    for name in (found["picture"], found["thumbnail"]):
        with Image.open(FILES / name) as kept:
            assert kept.size == (64, 48)
    assert (OUT / found["maps"][0]["files"]["overlay"]).is_file()


@pytest.mark.parametrize(
    ("method", "unit", "signed"),
    [
        ("rollout", "times average", False),
        ("evidence", "logit", True),
        ("attention", "times average", False),
    ],
)
def test_numbers_are_those_of_the_map(
    shell: Shell, tiny: list[str], method: str, unit: str, signed: bool
) -> None:
    save_pictures(Path(), ["a.png"])
    assert shell(method, "a.png", *tiny, "--save", "npy", "--report").code == 0
    (found,) = images()["a.png"]["maps"]
    truth = np.load(OUT / found["files"]["npy"])
    kept = numbers(found["id"], truth.shape)
    if unit == "times average":
        truth = truth / truth.mean(axis=(-2, -1), dtype=np.float64, keepdims=True)
    least, most = truth.min(axis=(-2, -1)), truth.max(axis=(-2, -1))
    step = (most - least) / 65535
    assert (np.abs(kept - truth).max(axis=(-2, -1)) <= step * 0.51 + 1e-6 * most).all()
    ends = (-np.abs(truth).max(), np.abs(truth).max()) if signed else (least.min(), most.max())
    assert found["range"] == pytest.approx(ends, rel=1e-5)
    stored = read_map(OUT, found["id"])
    assert stored is not None and (stored.unit, stored.is_signed) == (unit, signed)


def test_runs_of_other_methods_join_the_page(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png", "b.png"])
    shell("rollout", "a.png", *tiny, "--report")
    shell("relevance", "a.png", "b.png", *tiny, "--report")
    assert [len(each["maps"]) for each in images().values()] == [2, 1]
    assert index()["words"][index()["newest"][0]] == "relevance"


def test_skipped_maps_are_listed(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png", "b.png"])
    shell("rollout", "a.png", *tiny, "--report")
    done = shell("rollout", "a.png", "b.png", *tiny, "--report", "--skip-existing")
    assert "1 written, 1 skipped" in done.err
    assert all("range" in each["maps"][0] for each in images().values())
    PAGE.unlink()
    shell("rollout", "a.png", "b.png", *tiny, "--report", "--skip-existing")
    assert list(images()) == ["a.png", "b.png"]


def test_failures_are_listed_until_they_are_mended(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    Path("b.png").write_bytes(b"nothing")
    assert shell("rollout", "a.png", "b.png", *tiny, "--report").code == 1
    (failure,) = index()["failures"]
    assert failure["name"] == "b.png" and "image" in failure["error"]
    shell("relevance", "a.png", *tiny, "--report")
    assert len(index()["failures"]) == 1  # of the other run
    save_pictures(Path(), ["b.png"])
    shell("rollout", "b.png", *tiny)  # without a report
    shell("report", OUT)
    assert index()["failures"] == []
    Path("b.png").write_bytes(b"nothing")
    shell("rollout", "b.png", *tiny, "--report")
    save_pictures(Path(), ["b.png"])
    shell("rollout", "b.png", *tiny, "--report")
    assert index()["failures"] == []


def test_failures_of_runs_that_share_a_folder_are_all_kept(tmp_path: Path) -> None:
    for name in ("kept.png", "mended.png"):
        put_failures(tmp_path, [*read_failures(tmp_path), _failed(name)])
    one, other = Sink(tmp_path, "rollout"), Sink(tmp_path, "rollout")
    for sink, name in ((one, "a.png"), (other, "b.png")):
        list(sink.watch([failure(_source(name), ImageError("bad"))]))
    list(one.watch([Result(source=_source("mended.png"), status="written")]))
    at_once = threading.Thread(target=one.finish)
    at_once.start()
    other.finish()
    at_once.join()
    assert {each.source for each in read_failures(tmp_path)} == {"kept.png", "a.png", "b.png"}


def test_folder_that_vanishes_is_made_again_for_failures(tmp_path: Path) -> None:
    sink = Sink(tmp_path, "rollout")
    list(sink.watch([failure(_source("a.png"), ImageError("bad"))]))
    shutil.rmtree(tmp_path / FILES.name)
    sink.finish()
    assert [each.source for each in read_failures(tmp_path)] == ["a.png"]


def _failed(name: str) -> Failure:
    return Failure(source=name, source_id=source_id(name), method="rollout", error="bad")


def _source(name: str) -> Source:
    return Source(path=Path(name), key=name)


# vitviz report FOLDER


def test_tables_of_other_programs_are_left_alone(shell: Shell, tiny: list[str]) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    save_pictures(Path(), ["a.png"])
    shell("rollout", "a.png", *tiny, "--records", OUT / "ours.parquet")
    (OUT / "theirs.parquet").mkdir()
    parquet.write_table(arrow.table({"x": [1]}), OUT / "theirs.parquet" / "part.parquet")
    assert shell("report", OUT).code == 0
    assert list(images()) == ["a.png"]


def test_damaged_table_is_named(shell: Shell, tiny: list[str]) -> None:
    pytest.importorskip("pyarrow")
    save_pictures(Path(), ["a.png"])
    words = ["rollout", "a.png", *tiny, "--save", "table", "--records", "t.parquet"]
    shell(*words)
    (part,) = Path("t.parquet").iterdir()
    content = bytearray(part.read_bytes())
    content[4:200] = bytes(196)  # pages, not the footer
    part.write_bytes(content)
    for code, command in ((2, ["report", "t.parquet"]), (1, [*words, "--skip-existing"])):
        done = shell(*command)
        assert done.code == code
        assert f"{part} cannot be read" in done.err and "move it away" in done.err


def test_folder_without_a_report_is_read_from_its_files(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png", "b.png"])
    crop = ["--fit", "crop", "--save", "overlay", "--save", "npy"]
    shell("evidence", "a.png", *tiny, *crop)
    shell("rollout", "b.png", *tiny)
    done = shell("report", OUT)
    assert (done.code, done.paths) == (0, [str(PAGE)])
    a, b = images()["a.png"], images()["b.png"]
    truth = np.load(OUT / a["maps"][0]["files"]["npy"])
    assert np.allclose(numbers(a["maps"][0]["id"], truth.shape), truth, atol=1e-4)
    found = read_map(OUT, a["maps"][0]["id"])
    shutil.rmtree(FILES)
    shell("evidence", "a.png", *tiny, *crop, "--report")
    kept = read_map(OUT, a["maps"][0]["id"])
    assert found is not None and kept is not None
    assert found == kept  # region, score and caveats included
    assert Region(left=0) != Region(left=kept.region[0])
    assert "range" not in b["maps"][0] and b["maps"][0]["picture"] == "b.png.rollout.png"
    assert b["original"] and b["size"] == [48, 64]


def test_original_that_is_gone_gives_way_to_the_map(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    shell("rollout", "a.png", *tiny)
    save_pictures(Path(), ["other.png", "a.png"])  # other bytes under the old name
    shell("report", OUT)
    found = images()["a.png"]
    assert not found["original"] and found["size"] == [48, 64]
    shell("report", OUT)
    assert not images()["a.png"]["original"]


def test_numbers_of_other_options_are_not_taken(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    shell("rollout", "a.png", *tiny, "--report")
    assert "range" in images()["a.png"]["maps"][0]
    shell("rollout", "a.png", *tiny, "--discard", "0.5")
    shell("report", OUT)
    assert "range" not in images()["a.png"]["maps"][0]
    shell("rollout", "a.png", *tiny, "--colormap", "hot", "--alpha", "0.7")  # the same numbers
    shell("report", OUT)
    assert "range" in images()["a.png"]["maps"][0]


@pytest.mark.slow
def test_report_loads_no_torch(tmp_path: Path, tiny: list[str]) -> None:
    save_pictures(tmp_path, ["a.png"])
    run_process("-m", "vitviz", "rollout", "a.png", *tiny, cwd=tmp_path)
    code = (
        "import sys\nfrom vitviz.cli.app import main\n"
        "try: main(['report'])\nfinally: print('torch' in sys.modules)"
    )
    assert run_process("-c", code, cwd=tmp_path).out.decode().split() == [str(PAGE), "False"]


@pytest.mark.slow
def test_run_without_a_report_imports_nothing_of_it(tmp_path: Path, tiny: list[str]) -> None:
    save_pictures(tmp_path, ["a.png"])
    code = (
        f"import sys\nfrom vitviz.cli.app import main\ntry: main({['rollout', 'a.png', *tiny]})\n"
        "finally: print([each for each in sys.modules if 'jinja' in each or 'vitviz.rep' in each])"
    )
    assert run_process("-c", code, cwd=tmp_path).out.decode().splitlines()[-1] == "[]"
    assert not (tmp_path / FILES).exists()


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_folder_without_maps_is_told(shell: Shell, folder: str) -> None:
    Path("empty").mkdir()
    done = shell("report", folder)
    assert done.code == 2
    assert len(done.complaints) == 1 and folder in done.complaints[0]
    assert list(Path("empty").iterdir()) == []


# Tables


TABLE = ["--records", "m.parquet", "--save", "table"]


def table_index() -> dict[str, Any]:
    text = Path("m.report/report.html").read_text(encoding="utf-8")
    found = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def test_table_is_read_as_files_are(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png", "b.png"])
    Path("c.png").write_bytes(b"nothing")
    words = ["evidence", "b.png", "a.png", "c.png", *tiny, "--fit", "crop", "--class", "tabby"]
    shell(*words, *TABLE)
    done = shell("report", "m.parquet")
    assert (done.code, done.paths) == (0, ["m.report/report.html"])
    assert not list(Path("m.parquet").glob("*[!t]"))  # whose readers would take it for a part
    found = {each["name"]: each for each in table_index()["images"]}
    assert list(found) == ["a.png", "b.png"]
    assert [each["name"] for each in table_index()["failures"]] == ["c.png"]
    assert found["a.png"]["size"] == [48, 64] and found["a.png"]["original"]
    shell(*words, "--save", "npy", "--report")
    (kept,) = images()["a.png"]["maps"]
    (read,) = found["a.png"]["maps"]
    assert {**kept, "files": {}, "picture": 0} == {**read, "picture": 0}
    left, right = read_map(OUT, kept["id"]), read_map(Path("m.report"), read["id"])
    assert left is not None and right is not None
    assert replace(left, recipe={}) == replace(right, recipe={})  # region and numbers included
    assert left.region[0] > 0


def test_table_is_read_without_its_images(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    shell("rollout", "a.png", *tiny, *TABLE)
    Path("a.png").unlink()
    assert shell("report", "m.parquet").code == 0
    (found,) = table_index()["images"]
    assert found["size"] is None and len(found["predictions"]) == 5
    stored = read_map(Path("m.report"), found["maps"][0]["id"])
    assert stored is not None and [stored.size, stored.shape] == [[48, 64], [4, 4]]


def test_table_in_the_folder_joins_the_page(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    shell("rollout", "a.png", *tiny, "--records", str(OUT / "m.parquet"))
    shell("relevance", "a.png", *tiny, "--records", str(OUT / "m.parquet"), "--save", "table")
    shell("report", OUT)
    rollout, relevance = images()["a.png"]["maps"]
    assert "overlay" in rollout["files"] and "range" not in rollout
    assert relevance["files"] == {} and "range" in relevance


def test_table_of_somebody_else_is_told(shell: Shell) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    Path("m.parquet").mkdir()
    parquet.write_table(arrow.table({"a": [1]}), "m.parquet/part.parquet")
    done = shell("report", "m.parquet")
    assert (done.code, len(done.complaints)) == (2, 1)
    assert "not written by vitviz" in done.complaints[0]
    assert not Path("m.report").exists()


# Opening


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stand in for what opens files, and give the file that it notes them in."""
    noted, programs = tmp_path / "opened.txt", tmp_path / "programs"
    programs.mkdir()
    program = programs / "xdg-open"
    program.write_text(f'#!/bin/sh\nprintf %s "$1" > {noted}.new; mv {noted}.new {noted}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return noted


def opened(noted: Path) -> Path:
    for _ in range(200):
        if noted.exists():
            return Path(noted.read_text())
        time.sleep(0.02)
    raise AssertionError("nothing was opened")


@pytest.mark.skipif(
    sys.platform != "linux", reason="each system opens files by a program of its own"
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it runs on
@pytest.mark.parametrize(
    ("words", "target"),
    [(["rollout", "a.png"], OUT), (["rollout", "a.png", "--report"], PAGE), (["report"], PAGE)],
)
def test_report_or_folder_is_opened(
    shell: Shell, tiny: list[str], opener: Path, words: list[str], target: Path
) -> None:
    save_pictures(Path(), ["a.png"])
    if words == ["report"]:
        shell("rollout", "a.png", *tiny)
        assert not opener.exists()
    assert shell(*words, *(tiny if words != ["report"] else []), "--open").code == 0
    assert opened(opener) == target.absolute()


def test_system_that_opens_nothing_is_told_of(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path(), ["a.png"])
    monkeypatch.setenv("PATH", "")
    done = shell("rollout", "a.png", *tiny, "--open")
    assert done.code == 0
    assert "nothing here opens vitviz-out; open it elsewhere" in done.err


def test_report_goes_by_files(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    done = shell("rollout", "a.png", *tiny, "--report", "--save", "none", "--json")
    assert (done.code, len(done.complaints)) == (2, 1)
    assert "--save overlay" in done.complaints[0]


# Whose files


@pytest.mark.parametrize("command", ["rollout", "report"])
def test_page_of_somebody_else_is_left_alone(shell: Shell, tiny: list[str], command: str) -> None:
    save_pictures(Path(), ["a.png"])
    shell("rollout", "a.png", *tiny)
    PAGE.write_text("<!doctype html><title>mine</title> vitviz")
    words = ["rollout", "a.png", *tiny, "--report"] if command == "rollout" else ["report", OUT]
    done = shell(*words)
    assert (done.code, done.out) == (2, b"")
    assert done.complaints == [
        "Error: vitviz-out/report.html already exists and was not written by vitviz; "
        "move it, or use another folder"
    ]
    assert "mine" in PAGE.read_text()


@pytest.mark.parametrize("target", ["mine.html", "nowhere.html"])
def test_link_in_the_way_is_not_followed(shell: Shell, tiny: list[str], target: str) -> None:
    save_pictures(Path(), ["a.png"])
    Path("mine.html").write_text("mine")
    OUT.mkdir()
    PAGE.symlink_to(Path(target).absolute())
    assert shell("rollout", "a.png", *tiny, "--report").code == 2
    assert Path("mine.html").read_text() == "mine" and not Path("nowhere.html").exists()


def test_pictures_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report-files").mkdir()
    place = tmp_path / "report-files" / "0123456789abcdef.jpg"
    Image.new("RGB", (8, 8)).save(place)
    mine = place.read_bytes()
    with pytest.raises(OutputError, match="not written by vitviz"):
        put_picture(tmp_path, "0123456789abcdef", np.zeros((8, 8, 3), np.uint8), "0" * 64)
    assert place.read_bytes() == mine and not is_own(place)


def test_kept_pictures_are_no_images_to_explain(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png"])
    for _ in range(2):
        done = shell("rollout", ".", *tiny, "--report")
        assert done.paths == ["vitviz-out/p/a.png.rollout.png"]


def test_pictures_are_written_once(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    shell("rollout", "a.png", *tiny, "--report")
    before = {path: path.stat().st_mtime_ns for path in FILES.glob("*.jpg")}
    shell("relevance", "a.png", *tiny, "--report")
    assert {path: path.stat().st_mtime_ns for path in FILES.glob("*.jpg")} == before
    save_pictures(Path(), ["other.png", "a.png"])  # other bytes
    shell("rollout", "a.png", *tiny, "--report")
    assert {path: path.stat().st_mtime_ns for path in FILES.glob("*.jpg")} != before


def test_page_appears_whole_or_not_at_all(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path(), ["a.png", "b.png"])
    shell("rollout", "a.png", *tiny, "--report")
    before = PAGE.read_bytes()
    keep = sinks.Sink.keep

    def full(self: sinks.Sink, *given: Any) -> None:
        keep(self, *given)
        raise OutputError("no room") from OSError(28, "No space left on device")

    monkeypatch.setattr(sinks.Sink, "keep", full)
    done = shell("rollout", "b.png", *tiny, "--report")
    assert done.code == 1
    assert "no room" in done.err
    assert PAGE.read_bytes() == before


@pytest.mark.slow
def test_interrupted_run_leaves_the_older_page(tmp_path: Path, tiny: list[str]) -> None:
    save_pictures(tmp_path, ["a.png"])
    save_pictures(tmp_path / "many", [f"{number}.png" for number in range(600)])
    words = [sys.executable, "-m", "vitviz", "rollout"]
    options = [*tiny, "--report", "--batch-size", "1"]
    settings: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    subprocess.run([*words, "a.png", *options], check=True, capture_output=True, **settings)
    before = (tmp_path / PAGE).read_bytes()
    running = subprocess.Popen(
        [*words, "many", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings
    )
    assert running.stdout
    running.stdout.readline()
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    assert (tmp_path / PAGE).read_bytes() == before
    for line in out.splitlines():  # what was told is whole, and the next page has it
        assert (tmp_path / os.fsdecode(line)).is_file()
    assert not list((tmp_path / OUT).rglob("*.tmp"))


def test_damaged_leftovers_cost_no_more_than_their_numbers(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png", "b.png"])
    shell("rollout", "a.png", "b.png", *tiny, "--report")
    first = images()["a.png"]["maps"][0]["id"]
    (FILES / f"{first}.js").write_text('vitvizMap("x",{"recipe":')
    (FILES / "failures.json").write_text('{"vitviz": "failures", "failures": [{"odd": 1}]}')
    time.sleep(0.01)
    assert shell("report", OUT).code == 0
    assert "range" not in images()["a.png"]["maps"][0]
    assert "range" in images()["b.png"]["maps"][0]


# The page


def test_hostile_texts_stay_texts(shell: Shell, tiny: list[str]) -> None:
    name = "</script><img src=x onerror=alert(1)>\u2028'\".png"
    save_pictures(Path("p"), ["x.png"])
    hostile = Path(name.replace("/", "\u2215"))
    shutil.copy("p/x.png", hostile)
    shutil.copy("p/x.png", os.fsdecode(b"caf\xe9.png"))
    Path("<b>broken</b>.png".replace("/", "\u2215")).write_bytes(b"no")
    assert shell("rollout", ".", *tiny, "--report").code == 1
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img src=x" not in text and "<b>broken" not in text
    assert "&lt;b&gt;broken" in text
    assert "caf%E9.png.rollout.png" in text


def test_policy_names_no_host(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    shell("rollout", "a.png", *tiny, "--report")
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert found
    assert found[1].startswith("default-src 'none'; ")
    assert not re.search(r"\*|https?:|unsafe", found[1])
    assert not re.search(r"(src|href)=\"?(https?:)?//|@import|url\((?!#)|fetch\(", text)


def test_what_made_the_maps_is_told(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    shell("rollout", "a.png", *tiny, "--report", "--discard", "0.7")
    (record,) = shell("rollout", "a.png", *tiny, "--json", "--discard", "0.7").records
    text = PAGE.read_text(encoding="utf-8")
    made = text[text.index("What made this") :]
    for each in (record["run"]["model"], "discard 0.7", *record["run"]["versions"].values()):
        assert each in made
    assert record["run"]["weights"]["sha256"] in made


def test_features_are_shown_as_they_were_drawn(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    assert shell("features", "a.png", *tiny, "--report").code == 0
    (found,) = images()["a.png"]["maps"]
    assert "range" not in found and found["picture"] == "a.png.features.heatmap.png"


def test_similarity_keeps_its_scale(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png", "b.png"])
    assert shell("similarity", "a.png", "b.png", "--patch", "1,2", *tiny, "--report").code == 0
    kept = [read_map(OUT, each["maps"][0]["id"]) for each in images().values()]
    assert kept[0] and kept[1] and kept[0].extent == kept[1].extent
    assert kept[0].extent is not None and kept[0].extent[1] == 1
