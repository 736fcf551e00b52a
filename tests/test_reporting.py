"""What a run says on a real terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from vitviz.images import Source
from vitviz.ledger import Result
from vitviz.reporting import Reporter, discard

SCENES = Path(__file__).parents[1] / "sample_images" / "scenes"


def on_a_terminal(*arguments: str) -> str:
    """Run the command line with stdout and stderr on one terminal; return what it was sent."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vitviz", *arguments],
        stdout=theirs,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
        env=environment,
    )
    os.close(theirs)
    sent = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        sent += piece
    os.close(ours)
    assert process.wait() == 0
    return sent.decode()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out")
    return on_a_terminal("rollout", str(SCENES), "-m", "demo", "-o", str(out), "--device", "cpu")


def test_each_path_stands_on_a_line_of_its_own_beside_the_bar(session: str) -> None:
    lines = session.replace("\x1b[2K", "\n").replace("\r", "\n").splitlines()
    paths = [line for line in lines if "rollout.png" in line]
    assert len(paths) == len(list(SCENES.glob("*.png")))
    assert all(line.strip().endswith(".rollout.png") for line in paths)
    assert not any("explaining" in line for line in paths)


def test_bar_shows_how_many_are_done_and_is_gone_in_the_end(session: str) -> None:
    assert "/10" in session
    last = session.rstrip().splitlines()[-1]
    assert last.startswith("\x1b[1A\x1b[2K10 written, 0 skipped, 0 failed")  # over the bar's line


def test_quiet_terminal_shows_paths_alone(tmp_path: Path) -> None:
    scene = SCENES / "star-ring.png"
    said = on_a_terminal("rollout", str(scene), "-m", "demo", "-o", str(tmp_path), "--quiet")
    (line,) = said.splitlines()
    assert line.endswith("star-ring.png.rollout.png")
    assert "\x1b" not in said


def test_reader_that_leaves_is_no_full_disk(tmp_path: Path) -> None:
    result = Result(source=Source(path=Path("a.png"), key="a.png"), status="written")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, pytest.MonkeyPatch.context() as patch:  # noqa: PTH123
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(BrokenPipeError):
            Reporter(quiet=True, as_json=True).show([result], 1, {})
        discard(stdout)
