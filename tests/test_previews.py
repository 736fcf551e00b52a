"""Pictures on the terminal: half blocks, and the protocols of kitty and iTerm."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyte
import pytest
from PIL import Image
from rich.console import Console

from fixtures_io import ROOT, Shell, picture
from fixtures_processes import Nursery
from vitviz.cli.previews import Preview, Protocol, protocol_of, shown_files

SCENE = ROOT / "sample_images" / "scenes" / "star-ring.png"


def printed(image: Image.Image, protocol: Protocol, width: int) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=width)
    console.print(Preview(picture=image, protocol=protocol))
    return file.getvalue()


def pixels_of(text: str, columns: int, rows: int) -> np.ndarray[Any, Any]:
    """Read the colours of half blocks from a terminal: (2 · rows, columns, 3)."""
    screen = pyte.Screen(columns + 1, 1000)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    found = np.zeros((2 * rows, columns, 3), np.uint8)
    start = next(row for row, line in enumerate(screen.display) if "▀" in line)
    for row in range(rows):
        for col in range(columns):
            char = screen.buffer[start + row][col]
            assert char.data == "▀"
            for half, color in enumerate((char.fg, char.bg)):
                found[2 * row + half, col] = list(bytes.fromhex(color)) if color != "default" else 0
    return found


def test_half_blocks_are_the_pixels() -> None:
    image = picture(10, 16)
    found = pixels_of(printed(image, Protocol.BLOCKS, 16), 16, 5)
    assert np.array_equal(found, np.asarray(image))


def test_last_row_of_an_odd_height_has_nothing_below() -> None:
    image = picture(9, 16)
    text = printed(image, Protocol.BLOCKS, 16)
    assert np.array_equal(pixels_of(text, 16, 5)[:9], np.asarray(image))


def test_large_picture_is_scaled_to_the_width_and_keeps_its_ratio() -> None:
    lines = printed(picture(200, 400), Protocol.BLOCKS, 40).splitlines()
    assert [line.count("▀") for line in lines] == [40] * 10


def test_kitty_gets_the_picture_in_chunks() -> None:
    image = picture(300, 400)
    commands = re.findall(r"\x1b_G(.*?);(.*?)\x1b\\", printed(image, Protocol.KITTY, 40))
    assert len(commands) > 1
    assert all(len(chunk) <= 4096 for _, chunk in commands)
    assert commands[0][0] == "a=T,f=100,q=2,c=40,m=1"
    assert {keys for keys, _ in commands[1:-1]} <= {"m=1"}
    assert commands[-1][0] == "m=0"
    sent = base64.b64decode("".join(chunk for _, chunk in commands))
    assert np.array_equal(Image.open(io.BytesIO(sent)), image)


def test_iterm_gets_the_picture() -> None:
    image = picture(300, 400)
    found = re.search(
        r"\x1b\]1337;File=inline=1;width=40;\S*?:(.*?)\a", printed(image, Protocol.ITERM, 40)
    )
    assert found
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(found[1]))), image)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Protocol.BLOCKS),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, Protocol.BLOCKS),
        ({"TERM": "xterm-kitty"}, Protocol.KITTY),
        ({"KITTY_WINDOW_ID": "1"}, Protocol.KITTY),
        ({"TERM_PROGRAM": "ghostty"}, Protocol.KITTY),
        ({"TERM_PROGRAM": "iTerm.app"}, Protocol.ITERM),
        ({"TERM_PROGRAM": "WezTerm"}, Protocol.ITERM),
        ({"LC_TERMINAL": "iTerm2"}, Protocol.ITERM),
        ({"KITTY_WINDOW_ID": "1", "TMUX": "/tmp/tmux,1,0"}, Protocol.BLOCKS),
        ({"TERM_PROGRAM": "iTerm.app", "STY": "1.pts"}, Protocol.BLOCKS),
    ],
)
def test_protocol_is_known_by_variables(environment: dict[str, str], expected: Protocol) -> None:
    assert protocol_of(environment) is expected


def test_pictures_of_one_kind_are_shown() -> None:
    kinds = ["npy", "overlay", "panel", "npy", "overlay", "panel"]
    files = [(kind, Path(str(number))) for number, kind in enumerate(kinds)]
    assert shown_files(files) == [Path("1"), Path("4")]
    assert shown_files([("npy", Path("0"))]) == []


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(SCENE, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_run_shows_what_it_writes_below_its_line(nursery: Nursery, here: Path) -> None:
    words = ["relevance", "star-ring.png", "-m", "demo", "-o", "out", "--show"]
    prelude = {"COLORTERM": "truecolor"}
    done = nursery.on_a_terminal(*words, cwd=here, columns=60, variables=prelude)
    assert done.code == 0
    line = next(number for number, line in enumerate(done.lines) if "star-ring.png.rel" in line)
    assert set(done.lines[line + 1]) == {"▀"}
    (path,) = (here / "out").glob("*.png")
    small = Image.open(path).convert("RGB")
    small = small.resize((60, 60), Image.Resampling.LANCZOS, reducing_gap=3)
    shown = pixels_of(done.text.replace("\r\n", "\n"), 60, 30)
    assert np.array_equal(shown, np.asarray(small))


@pytest.mark.slow
def test_every_image_of_many_is_told_where_pictures_are_shown(nursery: Nursery, here: Path) -> None:
    for number in range(11):
        shutil.copy(SCENE, here / f"{number}.png")
    words = ["rollout", ".", "-m", "demo", "-o", "out", "--show"]
    lines = nursery.on_a_terminal(*words, cwd=here, columns=60).lines
    assert sum(".rollout.png" in line for line in lines) == 12
    assert sum(line.startswith("▀") for line in lines) == 12 * 30


def test_show_without_a_terminal_is_refused(
    here: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Shell(capfdbinary, monkeypatch)("rollout", "star-ring.png", "-m", "demo", "--show")
    assert done.code == 2
    assert "--show draws on a terminal" in done.err


@pytest.mark.slow
def test_show_without_pictures_is_refused(nursery: Nursery, here: Path) -> None:
    words = ["rollout", "star-ring.png", "-m", "demo", "--show", "--save", "npy"]
    done = nursery.on_a_terminal(*words, cwd=here)
    assert done.code == 2
    assert "add --save overlay" in done.text
