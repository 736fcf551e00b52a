"""What people see on a terminal, line by line, at 80 and at 120 columns."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fixtures_io import ROOT, save_pictures
from fixtures_processes import Nursery

pytestmark = pytest.mark.slow

SCENES = ROOT / "sample_images" / "scenes"
BEGIN = ["Using cpu", "Using demo, weights bundled, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"]
STAR = "star-ring.png  star 100%"
STAR_MAP = "  → out/star-ring.png.relevance"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    shutil.copy(SCENES / "star-ring.png", tmp_path)
    return tmp_path


def seen(nursery: Nursery, here: Path, *words: str, columns: int) -> list[str]:
    """Return what stands on the terminal, without times."""
    arguments = [*words, "-m", "demo", "--device", "cpu", "-o", "out"]
    lines = nursery.on_a_terminal(*arguments, cwd=here, columns=columns).lines
    return [re.sub(r" in [\d.]+ s(, [\d.]+ images/s)?", " in # s", line) for line in lines]


@pytest.mark.parametrize("columns", [80, 120])
def test_one_image_is_one_line_of_class_and_path(
    nursery: Nursery, here: Path, columns: int
) -> None:
    assert seen(nursery, here, "relevance", "star-ring.png", columns=columns) == [
        *BEGIN,
        f"{STAR}{STAR_MAP}.top1.png",
        "1 written, 0 skipped, 0 failed in # s → out",
    ]


@pytest.mark.parametrize("columns", [80, 120])
def test_several_files_of_an_image_stand_below_it(
    nursery: Nursery, here: Path, columns: int
) -> None:
    words = ["relevance", "star-ring.png", "--class", "star", "--class", "ring", "--save", "npy"]
    assert seen(nursery, here, *words, "--save", "overlay", columns=columns) == [
        *BEGIN,
        STAR,
        *(f"{STAR_MAP}.c{each}.{kind}" for each in (0, 1) for kind in ("npy", "png")),
        "1 written, 0 skipped, 0 failed in # s → out",
    ]


@pytest.mark.parametrize("columns", [80, 120])
def test_path_that_does_not_fit_stands_below(nursery: Nursery, here: Path, columns: int) -> None:
    folder = here / "photographs-of-a-long-day" / "in-the-garden"
    folder.mkdir(parents=True)
    (here / "star-ring.png").rename(folder / "star-ring.png")
    path = "  → out/photographs-of-a-long-day/in-the-garden/star-ring.png.relevance.top1.png"
    said = [STAR, path] if columns == 80 else [STAR + path]
    found = seen(nursery, here, "relevance", "photographs-of-a-long-day", columns=columns)
    assert found[2:-1] == said


@pytest.mark.parametrize("columns", [80, 120])
def test_many_images_are_summed_up(nursery: Nursery, here: Path, columns: int) -> None:
    for scene in SCENES.glob("*.png"):
        shutil.copy(scene, here)
    (here / "torn.png").write_bytes(b"no image")
    assert seen(nursery, here, "rollout", ".", columns=columns) == [
        *BEGIN,
        "failed: torn.png: is no image that Pillow can read",
        "best classes: spiral 4, moon 2, cross 1 and 3 others",
        "10 written, 0 skipped, 1 failed in # s → out",
    ]


def test_table_alone_is_where_to_look(nursery: Nursery, here: Path) -> None:
    words = ["rollout", "star-ring.png", "--save", "none", "--records", "maps.parquet"]
    assert seen(nursery, here, *words, columns=80)[2:] == [
        STAR,
        "1 written, 0 skipped, 0 failed in # s → maps.parquet",
    ]


def test_images_that_are_skipped_are_counted(nursery: Nursery, here: Path) -> None:
    words = ["rollout", "star-ring.png", "--skip-existing"]
    seen(nursery, here, *words, columns=80)
    assert seen(nursery, here, *words, columns=80)[2:] == [
        "0 written, 1 skipped, 0 failed in # s → out"
    ]


def test_quiet_terminal_gets_every_path(nursery: Nursery, here: Path) -> None:
    save_pictures(here, [f"{number:02}.png" for number in range(12)])
    found = seen(nursery, here, "rollout", ".", "--quiet", columns=120)
    assert len(found) == 13
    assert all(line.endswith(".rollout.png") for line in found)


def test_waiting_for_the_model_is_shown_and_erased(nursery: Nursery, here: Path) -> None:
    words = ["rollout", "star-ring.png", "-m", "demo", "-o", "out"]
    done = nursery.on_a_terminal(*words, cwd=here, columns=80)
    assert "loading demo …" in done.text
    assert not any("loading" in line for line in done.lines)


def test_bar_says_what_is_done(nursery: Nursery, here: Path) -> None:
    words = ["evaluate", "star-ring.png", "-m", "demo", "--methods", "rollout", "--bootstrap", "10"]
    assert "measuring" in nursery.on_a_terminal(*words, cwd=here).text
    words = ["rollout", "star-ring.png", "-m", "demo", "-o", "out"]
    assert re.search(r"rollout \S*━", nursery.on_a_terminal(*words, cwd=here).text)
