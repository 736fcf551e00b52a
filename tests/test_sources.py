"""Folders with links in them, and folders that are closed to us: no image is lost unsaid."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fixtures_io import at_most, save_pictures, tiny_model
from vitviz.errors import ImageError, SourceError
from vitviz.images.decoding import read_file
from vitviz.images.sources import SUFFIXES, find_sources
from vitviz.runs.job import Job
from vitviz.runs.pipeline import run

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDERS = ("", "a", "b", "a/c", "a/c/d", ".h", "e.png", "f")
FILES = ("x.png", "y.JPG", "notes.txt", ".z.png", "blob")
LINKS = ("l", "m.png", "n", ".o", "p.txt")


@contextmanager
def closed(names: frozenset[str] | set[str]) -> Iterator[None]:
    """Refuse to list folders of these names, as the system does to anybody but root."""
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:
        if Path(path).name in names:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        yield


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def walk(folder: Path, above: tuple[str, ...], shut: set[str]) -> set[str]:
    """Name the images below a folder, and what is closed, in the plainest way."""
    whole = os.path.realpath(folder)
    if whole in above:
        return set()
    if folder.name in shut:
        return {str(folder)}
    found = set()
    for path in folder.iterdir():
        named_as_image = path.suffix.lower() in SUFFIXES
        if path.name.startswith("."):
            continue
        if os.path.isdir(path):  # noqa: PTH112 (has an answer for links to themselves, too)
            found |= walk(path, (*above, whole), shut)
        elif named_as_image or ("." not in path.name and not os.path.exists(path)):  # noqa: PTH110
            found.add(str(path))
    return found


places = st.sampled_from(FOLDERS)
files = st.sets(st.tuples(places, st.sampled_from(FILES)), max_size=10)
targets = st.sampled_from([*FOLDERS, "x.png", "a/y.JPG", "nowhere", "l", "a/n"])
links = st.dictionaries(st.tuples(places, st.sampled_from(LINKS)), targets, max_size=5)
shut = st.sets(st.sampled_from(["a", "d", "f", "l"]), max_size=1)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(files, links, shut)
@example({("a", "x.png")}, {("", "l"): "a", ("b", "n"): "a"}, set())
@example({("", "x.png")}, {("", "l"): "", ("a", "n"): ""}, set())
@example({("", "x.png")}, {("", "m.png"): "x.png"}, set())
@example({("a", "x.png"), ("f", "y.JPG")}, {}, {"a"})
@example({("a", "x.png")}, {("", "l"): "l", ("a", "n"): "nowhere"}, set())
def test_all_names_of_images_below_a_folder_are_found(
    files: set[tuple[str, str]], links: dict[tuple[str, str], str], shut: set[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        top = Path(name).resolve() / "top"
        for folder in FOLDERS:
            (top / folder).mkdir(parents=True, exist_ok=True)
        touch(top, *(f"{folder}/{name}" for folder, name in files))
        for (folder, link), target in links.items():
            (top / folder / link).symlink_to(top / target)
        expected = walk(top, (), shut)
        with closed(shut):
            found, fruitless = find_sources([str(top)])
            globbed, _ = find_sources([f"{top}/**"])
            typed, _ = find_sources([f"{top}/**/*.png", f"{top}/**/*.JPG"])
            for source in found:
                if source.path.is_dir():
                    with pytest.raises(ImageError, match="cannot be read: Permission denied"):
                        read_file(source)
        assert {str(source.path) for source in found} == expected
        assert len({source.key for source in found}) == len(found) == len(expected)
        assert bool(fruitless) is not bool(expected)
        assert {source.path for source in globbed} == {source.path for source in found}
        images = {each for each in expected if Path(each).suffix or Path(each).is_dir()}
        assert {str(source.path) for source in typed} - expected == set()
        assert {str(source.path) for source in typed} >= images


def test_hub_cache_gives_an_image_for_each_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As huggingface_hub lays data sets out: names are links to blobs, alike blobs are one.
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path, ["blobs/one.png"])
    blob = (tmp_path / "blobs/one.png").rename(tmp_path / "blobs/1f3a")
    for label in ("cat", "dog"):
        (tmp_path / "snapshot" / label).mkdir(parents=True)
        (tmp_path / "snapshot" / label / "a.png").symlink_to(blob)
    (tmp_path / "snapshot/kitten").symlink_to("cat")
    sources, _ = find_sources(["snapshot"])
    results = list(run(tiny_model(), sources, Job()))
    assert [result.status for result in results] == ["written"] * 3
    assert len({output.path.resolve() for result in results for output in result.outputs}) == 3


def test_maps_of_two_names_in_one_place_are_refused_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path, ["p/cat/a.png"])
    (tmp_path / "p/kitten").symlink_to("cat")
    sources, _ = find_sources(["p"])
    with pytest.raises(SourceError, match=r"p/cat/a\.png and p/kitten/a\.png .* --output"):
        next(run(tiny_model(), sources, Job(output=Path())))
    assert sorted(path.name for path in (tmp_path / "p/cat").iterdir()) == ["a.png"]


@pytest.mark.parametrize("argument", ["p", "p/**", "p/*", "p/**/*.png"])
def test_maze_of_links_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(25):  # each with two ways to the next: 2^25 names of the last
        touch(tmp_path, f"p/{number}/a.png")
        for name in ("l", "m"):
            (tmp_path / f"p/{number}" / name).symlink_to(f"../{number + 1}")
    with at_most(10), pytest.raises(SourceError, match="more than 100 names"):
        find_sources([argument])


@pytest.mark.parametrize("argument", ["p", "p/*", "p/*/*.png", "p/**/*.png", "p/*/a.png"])
def test_closed_folder_fails_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "p/open/a.png", "p/secret/a.png")
    lstat = Path.lstat

    def refuse(path: Path) -> os.stat_result:
        if path.parent.name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", refuse)
    with closed({"secret"}):
        sources, _ = find_sources([argument])
    first, second = (source.path for source in sources)
    assert str(first) == "p/open/a.png"
    assert str(second).startswith("p/secret")


def test_folder_whose_path_is_too_long_fails_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "p/a.png")
    monkeypatch.chdir("p")
    for _ in range(20):  # step by step: the whole path is more than the system takes
        Path("d" * 250).mkdir()
        os.chdir("d" * 250)
    Path("b.png").write_bytes(b"b")
    monkeypatch.chdir(tmp_path)
    (first, second), _ = find_sources(["p"])
    assert first.key == "p/a.png"
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        read_file(second)


def test_folders_may_lie_deeper_than_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "p/" + "d/" * 200 + "a.png")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        sources, _ = find_sources(["p"])
    finally:
        sys.setrecursionlimit(before)
    assert [source.path.name for source in sources] == ["a.png"]
